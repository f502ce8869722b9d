// The driver: K inner steps, then the chain of Hessian-vector products, one task at a time.
//
//   theta_{k+1} = theta_k - a_k (.) g_s(theta_k)
//   lambda_K    = w_K g_q(theta_K)
//   lambda_k    = lambda_{k+1} - H_s(theta_k) [a_k (.) lambda_{k+1}] + w_k g_q(theta_k)
//   d / d a_k   = - g_s(theta_k) (.) lambda_{k+1}
//
// The meta-gradient is the mean of lambda_0 over tasks; first order leaves the product out. Memory
// of a task in work: K copies of the parameters and one tape, or K tapes where they fit. The layers
// apply the updates of theta and lambda themselves, where they store a gradient or product.

#include <cmath>
#include <limits>

#include "meta/layout.h"
#include "meta/resident.h"

namespace fm {
namespace {

// Elements a thread adds up at a time in a mean over tasks.
constexpr index_t kMeanGrain = 16384;

// Where everything is, in elements from the start of the workspace (shared) or of a slot.
struct MetaPlan {
  TapePlan support, query;
  TangentPlan tangent;
  index_t theta0 = 0, rates = 0, lambdas = 0, rate_rows = 0, mean = 0, shared = 0;
  std::vector<index_t> thetas, gradients, tapes;  // thetas[k] for k >= 1
  index_t own_theta0 = 0, gradient = 0, direction = 0, rate_row = 0, support_x = 0, query_x = 0,
          late = 0, scratch = 0, slot = 0;
  index_t slots = 0;
  bool kept = false;
  ResidentSizes resident;  // with a slot if the backend does a whole task in one call
  index_t resident_theta = 0;
};

// Per layer: none of its parameters is adapted.
template <class S>
std::vector<std::uint8_t> still_layers(const MetaCall<S>& call) {
  std::vector<std::uint8_t> still;
  for (const LayerDesc& d : call.program->layers()) {
    bool any = false;
    for (index_t i = 0; i < d.segments(); ++i) any |= call.rates.adapted[d.segment + i] != 0;
    still.push_back(!any);
  }
  return still;
}

// Whether a chain step needs no direction beside lambda.
template <class S>
bool moves_in_place(const MetaCall<S>& call) {
  return has_one_rate(call) && call.program->chunk(call.support.count) == call.support.count;
}

template <class S>
void plan_shared(const MetaCall<S>& call, MetaPlan& plan) {
  const Program& program = *call.program;
  const index_t P = program.param_count(), R = RateTable<S>::size(program, call.rates);
  Arena shared;
  plan.theta0 = shared.take(call.params.per_task ? 0 : P);
  plan.rates = shared.take(R);
  plan.lambdas = shared.take(call.tasks * P);
  plan.rate_rows = shared.take(call.rate_gradient ? call.tasks * R : 0);
  plan.mean = shared.take(max_of(P, R));
  plan.resident_theta = shared.take(plan.resident.shared);
  plan.shared = shared.size();
}

template <class S>
index_t plan_slot(const MetaCall<S>& call, index_t tapes, MetaPlan& plan) {
  const Program& program = *call.program;
  const index_t P = program.param_count(), K = call.steps;
  Arena slot;
  plan.own_theta0 = slot.take(call.params.per_task ? P : 0);
  plan.thetas.assign(K + 1, 0);
  for (index_t k = 1; k <= K; ++k) plan.thetas[k] = slot.take(P);
  plan.gradient = slot.take(call.rates.layout == RateLayout::per_parameter ? P : 0);
  plan.gradients.assign(K, plan.gradient);
  if (call.rate_gradient) {
    for (index_t k = 0; k < K; ++k) plan.gradients[k] = slot.take(P);
    plan.rate_row = slot.take(RateTable<S>::width(program, call.rates));
  }
  plan.direction = slot.take(call.first_order || moves_in_place(call) ? 0 : P);
  plan.support_x = slot.take(staging_size(program, call.support));
  plan.query_x = slot.take(staging_size(program, call.query));
  plan.tapes.assign(K, 0);
  for (index_t k = 0; k < K; ++k) {
    plan.tapes[k] = k < tapes ? slot.take(plan.support.size) : plan.tapes[0];
  }
  // the query's tape and the tangents are never alive together
  plan.late = slot.take(max_of(plan.query.size, call.first_order ? 0 : plan.tangent.size));
  plan.scratch = slot.take(plan_scratch(program, max_of(call.support.count, call.query.count)));
  return slot.size();
}

template <class S>
MetaPlan make_plan(const MetaCall<S>& call) {
  const Program& program = *call.program;
  MetaPlan plan;
  plan.slots = call.slots;
  plan.resident = plan_resident(call);
  if (plan.resident.slot > 0) {
    plan_shared(call, plan);
    plan.kept = !call.first_order && call.steps > 0;
    plan.slot = align_up(plan.resident.slot, kAlignment);
    plan.support.size = plan.resident.tape;
    return plan;
  }
  plan.support = plan_tape(program, call.support.count, call.first_order);
  plan.query = plan_tape(program, program.chunk(call.query.count), true);
  plan.tangent = plan_tangent(program, program.chunk(call.support.count));
  plan_shared(call, plan);
  const index_t kept_bytes = plan.slots * call.steps * plan.support.size * index_t(sizeof(S));
  plan.kept = !call.first_order && call.steps > 0 &&
              (call.memory == Memory::keep ||
               (call.memory == Memory::automatic && kept_bytes <= kKeepBytes));
  plan.slot = plan_slot(call, plan.kept ? call.steps : min_of<index_t>(call.steps, 1), plan);
  return plan;
}

template <class S>
class MetaGradient {
 public:
  MetaGradient(const MetaCall<S>& call, const MetaPlan& plan, S* workspace)
      : call_(call),
        plan_(plan),
        program_(*call.program),
        backend_(*call.backend),
        network_(program_, backend_),
        shared_(workspace),
        slots_(workspace + plan.shared),
        rates_(program_, backend_, call.rates, workspace + plan.rates),
        still_(still_layers(call)),
        in_place_(moves_in_place(call)) {}

  void run() {
    if (!call_.params.per_task) {
      load_parameters(program_, backend_, call_.params, 0, shared_ + plan_.theta0);
    }
    if (plan_.resident.slot > 0) return run_resident();
    backend_.for_each_task(
        call_.tasks, plan_.slots,
        [](void* self, index_t slot, index_t task, const Exec& exec) {
          static_cast<const MetaGradient*>(self)->task(slot, task, exec);
        },
        this);
    mean(plan_.lambdas, program_.param_count());
    store_parameters(program_, backend_, shared_ + plan_.mean, call_.gradients, 0);
    if (call_.rate_gradient) {
      mean(plan_.rate_rows, RateTable<S>::size(program_, call_.rates));
      rates_.store(shared_ + plan_.mean, call_.rate_gradient);
    }
  }

 private:
  void run_resident() {
    resident_ = resident_call(call_);
    resident_.rates = rates_.at(0).per_segment;
    resident_.lambdas = shared_ + plan_.lambdas;
    backend_.resident.share(resident_, shared_ + plan_.theta0, shared_ + plan_.resident_theta);
    backend_.for_each_task(
        call_.tasks, plan_.slots,
        [](void* self, index_t slot, index_t task, const Exec&) {
          static_cast<const MetaGradient*>(self)->resident_task(slot, task);
        },
        this);
    S* sum = resident_.lambdas;
    backend_.vector.scale(program_.param_count(), S(1.0 / double(call_.tasks)), sum, sum);
    store_parameters(program_, backend_, sum, call_.gradients, 0);
  }

  void resident_task(index_t slot, index_t t) const {
    const Batch<S> support = load_samples(program_, backend_, call_.support, t, (S*)nullptr);
    const Batch<S> query = load_samples(program_, backend_, call_.query, t, (S*)nullptr);
    const index_t row = t * (call_.steps + 1);
    const ResidentTask<S> task{t,
                               support.x,
                               query.x,
                               support.y,
                               query.y,
                               call_.query_loss + row,
                               call_.query_accuracy + row};
    backend_.resident.task(resident_, shared_ + plan_.resident_theta, slots_ + slot * plan_.slot,
                           task);
  }

  // One task in work.
  struct Work {
    S* base;
    const S* theta0;
    S* lambda;
    S* rate_rows;
    Batch<S> support, query;
    Exec exec;
    double *loss, *accuracy;  // [K + 1]
  };

  const S* theta(const Work& w, index_t k) const {
    return k == 0 ? w.theta0 : w.base + plan_.thetas[k];
  }
  Tape<S> tape(const Work& w, index_t k) const { return {&plan_.support, w.base + plan_.tapes[k]}; }

  Work begin(index_t slot, index_t t, const Exec& exec) const {
    Work w;
    w.base = slots_ + slot * plan_.slot;
    w.theta0 = shared_ + plan_.theta0;
    if (call_.params.per_task) {
      S* own = w.base + plan_.own_theta0;
      load_parameters(program_, backend_, call_.params, t, own);
      w.theta0 = own;
    }
    w.lambda = shared_ + plan_.lambdas + t * program_.param_count();
    w.rate_rows = shared_ + plan_.rate_rows + t * RateTable<S>::size(program_, call_.rates);
    w.support = load_samples(program_, backend_, call_.support, t, w.base + plan_.support_x);
    w.query = load_samples(program_, backend_, call_.query, t, w.base + plan_.query_x);
    w.exec = exec;
    w.exec.scratch = w.base + plan_.scratch;
    w.loss = call_.query_loss + t * (call_.steps + 1);
    w.accuracy = call_.query_accuracy + t * (call_.steps + 1);
    return w;
  }

  void task(index_t slot, index_t t, const Exec& exec) const {
    const Work w = begin(slot, t, exec);
    const index_t P = program_.param_count(), K = call_.steps;
    for (index_t k = 0; k < K; ++k) inner_step(w, k);
    if (call_.loss_weights[K] == 0) backend_.vector.scale(P, S(0), theta(w, K), w.lambda);
    if (call_.rate_gradient) {
      const index_t n = RateTable<S>::size(program_, call_.rates);
      for (index_t i = 0; i < n; ++i) w.rate_rows[i] = S(0);
    }
    for (index_t k = K;; --k) {
      add_query_gradient(w, k);
      if (k == 0) return;
      chain_step(w, k - 1);
    }
  }

  // theta_{k+1} = theta_k - a_k (.) g_s(theta_k)
  void inner_step(const Work& w, index_t k) const {
    double unused;
    S* next = w.base + plan_.thetas[k + 1];
    const StepRates<S> rates = rates_.at(k);
    if (rates.per_segment && !call_.rate_gradient) {
      const Update<S> update{theta(w, k), S(-1), rates.per_segment};
      network_.gradient(theta(w, k), w.support, tape(w, k), next, update, &unused, w.exec);
      return;
    }
    S* g = w.base + plan_.gradients[k];
    network_.gradient(theta(w, k), w.support, tape(w, k), g, {}, &unused, w.exec);
    backend_.vector.descend(rates, theta(w, k), g, next);
  }

  // lambda += w_k g_q(theta_k), which is where lambda starts at the last step
  void add_query_gradient(const Work& w, index_t k) const {
    const double weight = call_.loss_weights[k];
    w.loss[k] = w.accuracy[k] = std::numeric_limits<double>::quiet_NaN();
    if (weight == 0) return;
    const Tape<S> tape{&plan_.query, w.base + plan_.late};
    const Update<S> update{k == call_.steps ? nullptr : w.lambda, S(weight), nullptr};
    w.loss[k] =
        network_.gradient(theta(w, k), w.query, tape, w.lambda, update, &w.accuracy[k], w.exec);
  }

  // lambda -= H_s(theta_k) [a_k (.) lambda]
  void chain_step(const Work& w, index_t k) const {
    if (call_.rate_gradient) {
      rates_.accumulate(k, w.base + plan_.gradients[k], w.lambda, w.base + plan_.rate_row,
                        w.rate_rows);
    }
    if (call_.first_order) return;
    // a lone tape still holds the last inner step
    if (!plan_.kept && k + 1 < call_.steps) {
      double unused;
      network_.gradient(theta(w, k), w.support, tape(w, k), nullptr, {}, &unused, w.exec);
    }
    const Tangent<S> tangent{&plan_.tangent, w.base + plan_.late};
    if (in_place_) {
      const Update<S> update{w.lambda, -rates_.number(k), nullptr};
      network_.hessian_vector(theta(w, k), w.lambda, w.support, tape(w, k), tangent, w.lambda,
                              update, w.exec, still_.data());
      return;
    }
    S* v = w.base + plan_.direction;
    backend_.vector.scale_by_rates(rates_.at(k), w.lambda, v);
    network_.hessian_vector(theta(w, k), v, w.support, tape(w, k), tangent, w.lambda,
                            {w.lambda, S(-1), nullptr}, w.exec);
  }

  // mean over tasks of rows [T, n] at `rows`
  void mean(index_t rows, index_t n) const {
    struct Mean {
      const MetaGradient* self;
      index_t rows, n;
    } state{this, rows, n};
    const index_t grain = align_up(kMeanGrain / call_.tasks + 1, kAlignment);
    backend_.for_each_range(
        n, grain,
        [](void* s, index_t begin, index_t end) {
          const Mean& m = *static_cast<const Mean*>(s);
          m.self->backend_.vector.mean_rows(m.self->call_.tasks, m.n, begin, end,
                                            m.self->shared_ + m.rows,
                                            m.self->shared_ + m.self->plan_.mean);
        },
        &state);
  }

  const MetaCall<S>& call_;
  const MetaPlan& plan_;
  const Program& program_;
  const Backend<S>& backend_;
  Network<S> network_;
  S* shared_;
  S* slots_;
  RateTable<S> rates_;
  std::vector<std::uint8_t> still_;
  bool in_place_;
  ResidentCall<S> resident_;
};

}  // namespace

template <class S>
CallPlan plan_meta_gradient(const MetaCall<S>& call) {
  const MetaPlan plan = make_plan(call);
  const index_t size = sizeof(S);
  CallPlan result;
  result.slots = plan.slots;
  result.slot_bytes = plan.slot * size;
  result.shared_bytes = plan.shared * size;
  result.tape_bytes = plan.support.size * size;
  result.bytes = result.shared_bytes + result.slots * result.slot_bytes;
  result.kept = plan.kept;
  result.resident = plan.resident.slot > 0;
  return result;
}

// Returns the weighted query loss, mean over tasks.
template <class S>
double meta_gradient(const MetaCall<S>& call, void* workspace) {
  check_labels(*call.program, call.support, call.tasks, "support_y");
  check_labels(*call.program, call.query, call.tasks, "query_y");
  const MetaPlan plan = make_plan(call);
  MetaGradient<S>(call, plan, static_cast<S*>(workspace)).run();
  double loss = 0;
  for (index_t i = 0; i < call.tasks * (call.steps + 1); ++i) {
    const double weight = call.loss_weights[i % (call.steps + 1)];
    if (weight != 0) loss += weight * call.query_loss[i];
  }
  return loss / double(call.tasks);
}

template CallPlan plan_meta_gradient(const MetaCall<float>&);
template CallPlan plan_meta_gradient(const MetaCall<double>&);
template double meta_gradient(const MetaCall<float>&, void*);
template double meta_gradient(const MetaCall<double>&, void*);

}  // namespace fm
