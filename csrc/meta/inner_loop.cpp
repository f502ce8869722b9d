// Adaptation and evaluation: K inner steps of every task, the query loss after each.

#include "meta/layout.h"

namespace fm {
namespace {

struct AdaptPlan {
  TapePlan support, query;
  index_t theta0 = 0, rates = 0, shared = 0;
  index_t theta = 0, gradient = 0, support_x = 0, query_x = 0, tape = 0, scratch = 0, slot = 0;
  index_t slots = 0;
};

template <class S>
AdaptPlan make_plan(const AdaptCall<S>& call) {
  const Program& program = *call.program;
  const index_t P = program.param_count();
  AdaptPlan plan;
  plan.slots = call.slots;
  plan.support = plan_tape(program, call.support.count, true);
  plan.query = plan_tape(program, call.query.count, true);
  Arena shared, slot;
  plan.theta0 = shared.take(call.params.per_task ? 0 : P);
  plan.rates = shared.take(RateTable<S>::size(program, call.rates));
  plan.shared = shared.size();
  plan.theta = slot.take(P);
  plan.gradient = slot.take(P);
  plan.support_x = slot.take(staging_size(program, call.support));
  plan.query_x = slot.take(staging_size(program, call.query));
  plan.tape = slot.take(max_of(plan.support.size, plan.query.size));
  plan.scratch = slot.take(plan_scratch(program, max_of(call.support.count, call.query.count)));
  plan.slot = slot.size();
  return plan;
}

template <class S>
class InnerLoop {
 public:
  InnerLoop(const AdaptCall<S>& call, const AdaptPlan& plan, S* workspace)
      : call_(call),
        plan_(plan),
        program_(*call.program),
        backend_(*call.backend),
        network_(program_, backend_),
        shared_(workspace),
        slots_(workspace + plan.shared),
        rates_(program_, backend_, call.rates, workspace + plan.rates) {}

  void run() {
    if (!call_.params.per_task) {
      load_parameters(program_, backend_, call_.params, 0, shared_ + plan_.theta0);
    }
    backend_.for_each_task(
        call_.tasks, plan_.slots,
        [](void* self, index_t slot, index_t task, const Exec& exec) {
          static_cast<const InnerLoop*>(self)->task(slot, task, exec);
        },
        this);
  }

 private:
  void task(index_t slot, index_t t, Exec exec) const {
    S* base = slots_ + slot * plan_.slot;
    S* theta = base + plan_.theta;
    S* g = base + plan_.gradient;
    exec.scratch = base + plan_.scratch;
    if (call_.params.per_task) {
      load_parameters(program_, backend_, call_.params, t, theta);
    } else {
      backend_.vector.scale(program_.param_count(), S(1), shared_ + plan_.theta0, theta);
    }
    const Batch<S> support =
        load_samples(program_, backend_, call_.support, t, base + plan_.support_x);
    const Batch<S> query =
        call_.query_loss ? load_samples(program_, backend_, call_.query, t, base + plan_.query_x)
                         : Batch<S>{};
    for (index_t k = 0;; ++k) {
      if (call_.query_loss) evaluate(theta, query, base, t, k, exec);
      if (k == call_.steps) break;
      double unused;
      network_.gradient(theta, support, {&plan_.support, base + plan_.tape}, g, {}, &unused, exec);
      backend_.vector.descend(rates_.at(k), theta, g, theta);
    }
    store_parameters(program_, backend_, theta, call_.adapted, t);
  }

  void evaluate(const S* theta, const Batch<S>& query, S* base, index_t t, index_t k,
                const Exec& exec) const {
    const Tape<S> tape{&plan_.query, base + plan_.tape};
    const index_t i = t * (call_.steps + 1) + k;
    network_.forward(theta, query, tape, exec);
    network_.loss(query, tape, false, call_.query_loss + i, call_.query_accuracy + i, exec);
  }

  const AdaptCall<S>& call_;
  const AdaptPlan& plan_;
  const Program& program_;
  const Backend<S>& backend_;
  Network<S> network_;
  S* shared_;
  S* slots_;
  RateTable<S> rates_;
};

}  // namespace

template <class S>
CallPlan plan_adapt(const AdaptCall<S>& call) {
  const AdaptPlan plan = make_plan(call);
  const index_t size = sizeof(S);
  CallPlan result;
  result.slots = plan.slots;
  result.slot_bytes = plan.slot * size;
  result.shared_bytes = plan.shared * size;
  result.tape_bytes = plan.support.size * size;
  result.bytes = result.shared_bytes + result.slots * result.slot_bytes;
  return result;
}

template <class S>
void adapt(const AdaptCall<S>& call, void* workspace) {
  check_labels(*call.program, call.support, call.tasks, "support_y");
  check_labels(*call.program, call.query, call.tasks, "query_y");
  const AdaptPlan plan = make_plan(call);
  InnerLoop<S>(call, plan, static_cast<S*>(workspace)).run();
}

template CallPlan plan_adapt(const AdaptCall<float>&);
template CallPlan plan_adapt(const AdaptCall<double>&);
template void adapt(const AdaptCall<float>&, void*);
template void adapt(const AdaptCall<double>&, void*);

}  // namespace fm
