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
  plan.support = plan_tape(program, chunk_of(program, *call.backend, call.support.count), true);
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
        rates_(call, call.rates, workspace + plan.rates) {}

  void run() {
    rates_.load();
    if (!call_.params.per_task) {
      load_parameters(call_, call_.params, 0, 1, {shared_ + plan_.theta0, 0}, call_.exec);
    }
    backend_.for_each_task(
        call_.tasks, plan_.slots, call_.exec,
        [](void* self, index_t slot, index_t first, index_t count, const Exec& exec) {
          static_cast<const InnerLoop*>(self)->work(slot, first, count, exec);
        },
        this);
  }

 private:
  void work(index_t slot, index_t first, index_t count, Exec exec) const {
    const index_t P = program_.param_count();
    S* base = slots_ + slot * call_.together() * plan_.slot;
    const auto at = [&](index_t offset) { return base + count * offset; };
    const Rows<S> theta{at(plan_.theta), P}, g{at(plan_.gradient), P};
    const Tape<S> support_tape{&plan_.support, at(plan_.tape), count};
    exec.scratch = at(plan_.scratch);
    if (call_.params.per_task) {
      load_parameters(call_, call_.params, first, count, theta, exec);
    } else {
      backend_.vector.copy(count, P, {shared_ + plan_.theta0, 0}, theta, exec);
    }
    const Batch<S> support =
        load_samples(call_, call_.support, first, count, at(plan_.support_x), exec);
    const Batch<S> query =
        call_.query_loss ? load_samples(call_, call_.query, first, count, at(plan_.query_x), exec)
                         : Batch<S>{};
    const Tape<S> query_tape{&plan_.query, at(plan_.tape), count};
    const index_t row = call_.steps + 1;
    for (index_t k = 0;; ++k) {
      if (call_.query_loss) {
        const index_t i = first * row + k;
        network_.forward({theta.data, P}, query, query_tape, exec);
        network_.loss(query, query_tape, false,
                      {call_.query_loss + i, call_.query_accuracy + i, row}, exec);
      }
      if (k == call_.steps) break;
      network_.gradient({theta.data, P}, support, support_tape, g, {}, {}, exec);
      backend_.vector.descend(rates_.at(k), count, {theta.data, P}, {g.data, P}, theta, exec);
    }
    store_parameters(call_, {theta.data, P}, call_.adapted, first, count, exec);
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
  return told_sizes<S>(call, plan.slots, plan.slot, plan.shared, plan.support.size);
}

template <class S>
void adapt(const AdaptCall<S>& call, void* workspace) {
  check_labels(call, call.support, "support_y");
  check_labels(call, call.query, "query_y");
  const AdaptPlan plan = make_plan(call);
  InnerLoop<S>(call, plan, static_cast<S*>(workspace)).run();
}

template CallPlan plan_adapt(const AdaptCall<float>&);
template CallPlan plan_adapt(const AdaptCall<double>&);
template void adapt(const AdaptCall<float>&, void*);
template void adapt(const AdaptCall<double>&, void*);

}  // namespace fm
