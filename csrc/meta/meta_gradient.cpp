// The driver: K inner steps, then the chain of Hessian-vector products, of one task or, in
// lockstep, of all.
//
//   theta_{k+1} = theta_k - a_k (.) g_s(theta_k)
//   lambda_K    = w_K g_q(theta_K)
//   lambda_k    = lambda_{k+1} - H_s(theta_k) [a_k (.) lambda_{k+1}] + w_k g_q(theta_k)
//   d / d a_k   = - g_s(theta_k) (.) lambda_{k+1}
//
// The meta-gradient is the mean of lambda_0 over tasks; first order leaves the product out. Memory
// of a task in work: K copies of the parameters and one tape, or K tapes where they fit. The layers
// apply the updates of theta and lambda themselves, where they store a gradient or product.

#include <limits>
#include <utility>

#include "meta/meta_plan.h"

namespace fm {
namespace {

// Elements a thread adds up at a time in a mean over tasks.
constexpr index_t kMeanGrain = 16384;

// Rows of a factored layer's weights likewise: a few tiles of a product.
constexpr index_t kSumGrain = 48;

template <class S>
class MetaGradient {
 public:
  MetaGradient(const MetaCall<S>& call, const MetaPlan& plan, S* workspace)
      : call_(call),
        plan_(plan),
        program_(*call.program),
        backend_(*call.backend),
        network_(program_, backend_, &plan.factored.places),
        shared_(workspace),
        slots_(workspace + plan.shared),
        rates_(call, call.rates, workspace + plan.rates),
        still_(still_layers(call)),
        in_place_(moves_in_place(call)),
        alternates_(alternates(call)),
        reads_number_(in_place_ && call.backend->lockstep && !call.rate_gradient) {}

  void run() {
    if (plan_.resident.taken && backend_.lockstep) return run_resident_together();
    if (!reads_number_) rates_.load();
    if (!call_.params.per_task) {
      load_parameters(call_, call_.params, 0, 1, {shared_ + plan_.theta0, 0}, call_.exec,
                      &plan_.factored.places);
    }
    if (plan_.resident.taken) return run_resident();
    transpose_factored();
    for (index_t first = 0; first < call_.tasks; first += plan_.wave) wave(first);
    const TaskLosses<S> losses{call_.steps + 1, call_.loss_weights.data(), call_.query_loss,
                               call_.query_accuracy, call_.loss};
    if (backend_.vector.mean_tensors) {
      mean_parameters<S>(call_, {shared_ + plan_.lambdas, plan_.row()}, call_.gradients, losses);
    } else {
      if (losses.out) backend_.vector.mean_loss(call_.tasks, losses, call_.exec);
      store_parameters<S>(call_, {shared_ + plan_.mean, 0}, call_.gradients, 0, 1, call_.exec,
                          &plan_.factored.places);
    }
    if (call_.rate_gradient) {
      const index_t R = RateTable<S>::size(program_, call_.rates);
      for_columns(R, [&](index_t begin, index_t end) {
        backend_.vector.mean_rows(call_.tasks, R, begin, end, shared_ + plan_.rate_rows,
                                  shared_ + plan_.mean, call_.exec);
      });
      rates_.store(shared_ + plan_.mean, call_.rate_gradient);
    }
  }

 private:
  void run_resident_together() {
    resident_ = resident_call(call_);
    resident_.lambdas = shared_ + plan_.lambdas;
    const Rates<S>& rates = call_.rates;
    const std::uint8_t* adapted = rates.adapted_there ? rates.adapted_there : rates.adapted.data();
    const ResidentBatch<S> batch{call_.params.tensors.data(),
                                 call_.gradients.tensors.data(),
                                 rates.values,
                                 rates.layout == RateLayout::per_tensor,
                                 adapted,
                                 call_.support.x,
                                 call_.query.x,
                                 call_.support.y,
                                 call_.query.y,
                                 call_.query_loss,
                                 call_.query_accuracy,
                                 call_.loss};
    backend_.resident.all(resident_, batch, call_.exec);
  }

  // W_0' of the layers that hand down an adjoint by it.
  void transpose_factored() const {
    for (const FactoredLayer& f : plan_.factored.layers) {
      if (f.fixed_input) continue;
      backend_.factored.transpose(f.in, f.out,
                                  shared_ + plan_.theta0 + plan_.factored.places.weights[f.layer],
                                  shared_ + plan_.transposed + f.transposed, call_.exec);
    }
  }

  // The factors of `tasks` tasks whose rows begin at task `first` of a wave.
  FactoredTasks<S> factors(index_t first, index_t tasks, S* updates) const {
    return {call_,
            plan_.factored,
            shared_ + plan_.theta0,
            shared_ + plan_.transposed,
            updates,
            shared_ + plan_.factor_rows + first * plan_.factored.row,
            tasks};
  }

  // Tasks from `first` on, and their lambdas into the mean.
  void wave(index_t first) {
    struct Wave {
      const MetaGradient* self;
      index_t first;
    } state{this, first};
    const index_t count = min_of(plan_.wave, call_.tasks - first), P = plan_.row();
    const bool last = first + count == call_.tasks;
    backend_.for_each_task(
        count, plan_.slots, call_.exec,
        [](void* state, index_t slot, index_t first, index_t count, const Exec& exec) {
          const Wave& wave = *static_cast<const Wave*>(state);
          wave.self->work(slot, wave.first + first, count, exec);
        },
        &state);
    if (backend_.vector.mean_tensors) return;
    const S* rows = shared_ + plan_.lambdas;
    S* mean = shared_ + plan_.mean;
    for_columns(P, [&](index_t begin, index_t end) {
      if (plan_.wave == call_.tasks) {
        backend_.vector.mean_rows(count, P, begin, end, rows, mean, call_.exec);
      } else {
        backend_.vector.add_rows(count, P, begin, end, rows, first == 0,
                                 reinterpret_cast<double*>(shared_ + plan_.sums), call_.tasks,
                                 last ? mean : nullptr, call_.exec);
      }
    });
    const FactoredTasks<S> factors = this->factors(0, count, nullptr);
    for (const FactoredLayer& f : plan_.factored.layers) {
      FactorSum<S> sum = factors.sum(f);
      sum.begins = first == 0;
      if (last) sum.scale = S(1.0 / double(call_.tasks));
      sum.sum = mean + plan_.factored.places.weights[f.layer];
      for_ranges(f.in, kSumGrain, [&](index_t begin, index_t end) {
        backend_.factored.add_products(sum, begin, end, call_.exec);
      });
    }
  }

  void run_resident() {
    resident_ = resident_call(call_);
    resident_.rates = rates_.at(0).per_segment;
    resident_.lambdas = shared_ + plan_.lambdas;
    backend_.resident.share(resident_, shared_ + plan_.theta0, shared_ + plan_.resident_theta);
    backend_.for_each_task(
        call_.tasks, plan_.slots, call_.exec,
        [](void* self, index_t slot, index_t task, index_t, const Exec& exec) {
          static_cast<const MetaGradient*>(self)->resident_task(slot, task, exec);
        },
        this);
    const Rows<S> sum{resident_.lambdas, 0};
    backend_.vector.update(1, program_.param_count(), {}, S(1.0 / double(call_.tasks)), nullptr,
                           {sum.data, 0}, sum, call_.exec);
    store_parameters<S>(call_, {sum.data, 0}, call_.gradients, 0, 1, call_.exec);
  }

  void resident_task(index_t slot, index_t t, const Exec& exec) const {
    S* none = nullptr;  // vectors need no staging
    const Batch<S> support = load_samples(call_, call_.support, t, 1, none, exec);
    const Batch<S> query = load_samples(call_, call_.query, t, 1, none, exec);
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

  // Tasks in work together.
  struct Work {
    S* base;
    index_t tasks;
    Rows<const S> theta0;
    Rows<S> lambda, next_lambda, rate_rows;  // next_lambda: where a chain step puts it
    Batch<S> support, query;
    Exec exec;
    Metrics metrics;  // [T, K + 1]
    FactoredTasks<S> factors;
    S* at(index_t offset) const { return base + tasks * offset; }
  };

  // All of it but the weights of factored layers.
  Rows<const S> theta(const Work& w, index_t k) const {
    if (k == 0) return w.theta0;
    return {w.at(plan_.thetas[k]), plan_.row()};
  }
  static Params<S> with(const Rows<const S>& rows, const std::vector<Factors<S>>& factors) {
    return {rows.data, rows.stride, factors.empty() ? nullptr : factors.data()};
  }
  Rows<S> gradient(const Work& w, index_t k) const {
    return {w.at(plan_.gradients[k]), program_.param_count()};
  }
  Tape<S> tape(const Work& w, index_t k) const {
    return {&plan_.support, w.at(plan_.tapes[k]), w.tasks};
  }

  Work begin(index_t slot, index_t first, index_t count, const Exec& exec) const {
    const index_t P = program_.param_count(), R = RateTable<S>::size(program_, call_.rates);
    const index_t row = plan_.row();
    Work w;
    w.base = slots_ + slot * call_.together() * plan_.slot;
    w.tasks = count;
    w.exec = exec;
    w.exec.scratch = w.at(plan_.scratch);
    w.theta0 = {shared_ + plan_.theta0, 0};
    if (call_.params.per_task) {
      S* own = w.at(plan_.own_theta0);
      load_parameters(call_, call_.params, first, count, {own, P}, w.exec);
      w.theta0 = {own, P};
    }
    w.lambda = {shared_ + plan_.lambdas + first % plan_.wave * row, row};
    w.next_lambda = w.lambda;
    if (alternates_) {  // K steps end where the mean looks for it
      w.next_lambda = {w.at(plan_.direction), row};
      if (call_.steps % 2 == 1) std::swap(w.lambda, w.next_lambda);
    }
    w.factors = factors(first % plan_.wave, count, w.at(plan_.updates));
    w.rate_rows = {shared_ + plan_.rate_rows + first * R, R};
    w.support = load_samples(call_, call_.support, first, count, w.at(plan_.support_x), w.exec);
    w.query = load_samples(call_, call_.query, first, count, w.at(plan_.query_x), w.exec);
    const index_t losses = call_.steps + 1, loss = first * losses;
    w.metrics = {call_.query_loss + loss, call_.query_accuracy + loss, losses};
    return w;
  }

  void work(index_t slot, index_t first, index_t count, const Exec& exec) const {
    Work w = begin(slot, first, count, exec);
    const index_t K = call_.steps;
    for (index_t k = 0; k < K; ++k) inner_step(w, k);
    const auto& vector = backend_.vector;
    if (call_.loss_weights[K] == 0) {
      vector.fill(w.tasks, plan_.row(), S(0), w.lambda, w.exec);
    }
    if (call_.rate_gradient) {
      const index_t R = RateTable<S>::size(program_, call_.rates);
      vector.fill(w.tasks, R, S(0), w.rate_rows, w.exec);
    }
    for (index_t k = K;; --k) {
      add_query_gradient(w, k);
      if (k == 0) return;
      chain_step(w, k - 1);
      if (alternates_) std::swap(w.lambda, w.next_lambda);
    }
  }

  // theta_{k+1} = theta_k - a_k (.) g_s(theta_k)
  void inner_step(const Work& w, index_t k) const {
    const Rows<S> next{w.at(plan_.thetas[k + 1]), plan_.row()};
    const StepRates<S> rates = rates_.at(k);
    if (rates.per_segment && !call_.rate_gradient) {
      const auto weights = w.factors.weights(k);
      const auto stores = w.factors.inner_step(k);
      const S* rate = reads_number_ ? rates_.number(k) : rates.per_segment;
      const std::uint8_t* adapted = reads_number_ ? call_.rates.adapted.data() : nullptr;
      const index_t apart = reads_number_ ? 0 : 1;
      const Update<S> update{theta(w, k), S(-1), rate, apart, stores.data(), adapted};
      network_.gradient(with(theta(w, k), weights), w.support, tape(w, k), next, update, {},
                        w.exec);
      return;
    }
    const Rows<S> g = gradient(w, k);
    network_.gradient(theta(w, k), w.support, tape(w, k), g, {}, {}, w.exec);
    backend_.vector.descend(rates, w.tasks, theta(w, k), {g.data, g.stride}, next, w.exec);
  }

  // lambda += w_k g_q(theta_k), which is where lambda starts at the last step
  void add_query_gradient(const Work& w, index_t k) const {
    const double weight = call_.loss_weights[k];
    const Metrics metrics{w.metrics.value + k, w.metrics.accuracy + k, w.metrics.stride};
    if (weight == 0) return skip(w, metrics);
    const Tape<S> tape{&plan_.query, w.at(plan_.late), w.tasks};
    const S* base = k == call_.steps ? nullptr : w.lambda.data;
    const auto weights = w.factors.weights(k);
    const auto stores = w.factors.query_gradient(k);
    const Update<S> update{{base, w.lambda.stride}, S(weight), nullptr, 1, stores.data()};
    network_.gradient(with(theta(w, k), weights), w.query, tape, w.lambda, update, metrics, w.exec);
  }

  void skip(const Work& w, const Metrics& metrics) const {
    if (!backend_.host_memory) return;
    for (index_t t = 0; t < w.tasks; ++t) {
      metrics.value[t * metrics.stride] = metrics.accuracy[t * metrics.stride] =
          std::numeric_limits<double>::quiet_NaN();
    }
  }

  // lambda -= H_s(theta_k) [a_k (.) lambda]
  void chain_step(const Work& w, index_t k) const {
    const Rows<const S> lambda{w.lambda.data, w.lambda.stride};
    if (call_.rate_gradient) {
      const Rows<S> g = gradient(w, k);
      rates_.accumulate(k, w.tasks, {g.data, g.stride}, lambda, w.at(plan_.rate_row), w.rate_rows,
                        w.exec);
    }
    if (call_.first_order) return;
    const auto weights = w.factors.weights(k);
    const Params<S> at = with(theta(w, k), weights);
    // a lone tape still holds the last inner step
    if (!plan_.kept && k + 1 < call_.steps) {
      network_.gradient(at, w.support, tape(w, k), {}, {}, {}, w.exec);
    }
    const auto direction = w.factors.lambda(k + 1, in_place_ ? nullptr : rates_.at(k).per_segment);
    const auto stores = w.factors.chain_step(k);
    const Tangent<S> tangent{&plan_.tangent, w.at(plan_.late), w.tasks};
    if (in_place_) {
      const Update<S> update{lambda, S(-1), rates_.number(k), 0, stores.data()};
      network_.hessian_vector(at, with(lambda, direction), w.support, tape(w, k), tangent,
                              w.next_lambda, update, w.exec, still_.data());
      return;
    }
    const Rows<S> v{w.at(plan_.direction), plan_.row()};
    scale_by_rates(w, k, lambda, v);
    const Update<S> update{lambda, S(-1), nullptr, 1, stores.data()};
    network_.hessian_vector(at, with({v.data, v.stride}, direction), w.support, tape(w, k), tangent,
                            w.lambda, update, w.exec);
  }

  // v = a_k (.) lambda, but for factored weights, which are scaled where they are read
  void scale_by_rates(const Work& w, index_t k, Rows<const S> lambda, Rows<S> v) const {
    const StepRates<S> rates = rates_.at(k);
    if (plan_.factored.layers.empty()) {
      return backend_.vector.scale_by_rates(rates, w.tasks, lambda, v, w.exec);
    }
    const Places& places = plan_.factored.places;
    for (size_t i = 0; i < places.parameter.size(); ++i) {
      const index_t at = places.parameter[i];
      if (at >= plan_.row()) continue;
      backend_.vector.update(w.tasks, program_.parameters()[i].count, {}, S(1),
                             rates.per_segment + i, {lambda.data + at, lambda.stride},
                             {v.data + at, v.stride}, w.exec);
    }
  }

  // Calls body(begin, end) for ranges of n columns of rows of all tasks.
  template <class Body>
  void for_columns(index_t n, Body&& body) const {
    for_ranges(n, align_up(kMeanGrain / call_.tasks + 1, kAlignment), body);
  }
  template <class Body>
  void for_ranges(index_t n, index_t grain, Body&& body) const {
    backend_.for_each_range(
        n, grain,
        [](void* body, index_t begin, index_t end) {
          (*static_cast<std::remove_reference_t<Body>*>(body))(begin, end);
        },
        &body);
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
  bool in_place_, alternates_;
  bool reads_number_;  // launches read the one rate where it is: a table would be one more
  ResidentCall<S> resident_;
};

}  // namespace

template <class S>
double meta_gradient(const MetaCall<S>& call, const CallPlan& plan, void* workspace) {
  check_labels(call, call.support, "support_y");
  check_labels(call, call.query, "query_y");
  MetaGradient<S>(call, *plan.meta, static_cast<S*>(workspace)).run();
  if (!call.backend->host_memory) return std::numeric_limits<double>::quiet_NaN();
  double loss = 0;
  for (index_t i = 0; i < call.tasks * (call.steps + 1); ++i) {
    const double weight = call.loss_weights[i % (call.steps + 1)];
    if (weight != 0) loss += weight * call.query_loss[i];
  }
  return loss / double(call.tasks);
}

template double meta_gradient(const MetaCall<float>&, const CallPlan&, void*);
template double meta_gradient(const MetaCall<double>&, const CallPlan&, void*);

}  // namespace fm
