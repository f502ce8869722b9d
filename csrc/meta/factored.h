// Factored layers: dense layers whose adapted weights are never formed.
//
// With x_k [S, in] and d_k [S, out] the input and the output's adjoint of inner step k, for one
// task,
//
//   W_k      = W_0 - sum over j < k of a_j x_j' d_j
//   lambda_K = w_K x_q' d_q
//   lambda_k = lambda_{k+1} - a_k (x_k' td_k + tx_k' d_k) + w_k x_q' d_q,      t along lambda_{k+1}
//
// so both are factors, A' B of few rows, and W_0 is all tasks'. What reads them is in
// cpu/factored.inl.h; the meta-gradient, mean over tasks of A' B, is one product over all tasks'
// rows. Biases are vectors, and stay in the rows of theta and lambda.
//
// Rows of A, of the three B and U on its side, in the order in which the chain adds to lambda:
//
//   rows of A    x_0 .. x_{K-1}          x_q(K)    tx_{K-1}          x_q(K-1)   tx_{K-2} ..
//   U            -a_0 d_0 ..             updates: rows before x_k are those of W_k
//   B            -a_0 td_0 ..            w_K d_q   -a_{K-1} d_{K-1}  ..
//
// The rows of lambda_k are adjacent: from x_k on. Nothing moves the input of a network's first
// layer with parameters: it has one x and one x_q, on which B adds up, and no tx. U is then the sum
// of the updates up to each step, since the chain comes back to W_k.
#pragma once

#include "meta/network.h"
#include "meta/options.h"

namespace fm {

// Which rows of A are whose, of one layer.
struct FactorOrder {
  std::vector<index_t> support, query, tangent;  // [K + 1] where x_k, x_q of step k and tx_k are
  std::vector<index_t> updates;                  // [K + 1] rows of U in W_k
  std::vector<index_t> begin, end;               // [K + 1] rows of lambda_k in B
  index_t first_query = -1;                      // the step whose x_q comes first, -1: none
  index_t support_rows = 0, rows = 0;

  template <class Call>
  FactorOrder(const Call& call, bool fixed_input, bool first_order);
};

template <class Call>
FactorOrder::FactorOrder(const Call& call, bool fixed_input, bool first_order) {
  const index_t K = call.steps, S = call.support.count, Q = call.query.count;
  for (index_t k = 0; k <= K; ++k) {
    support.push_back(fixed_input ? 0 : k * S);
    updates.push_back(fixed_input ? min_of<index_t>(k, 1) * S : k * S);
  }
  support_rows = rows = updates[K];
  query.assign(K + 1, rows);
  tangent = begin = end = query;
  for (index_t k = K; k >= 0; --k) {
    if (call.loss_weights[k] != 0) {
      const bool again = fixed_input && first_query >= 0;
      if (first_query < 0) first_query = k;
      query[k] = again ? support_rows : rows;
      rows += again ? 0 : Q;
    }
    begin[k] = k == K || first_order ? support_rows : support[k];
    end[k] = rows;
    if (k == 0 || first_order) continue;
    tangent[k - 1] = rows;
    rows += fixed_input ? 0 : S;
  }
}

struct FactoredLayer {
  size_t layer;
  index_t in, out;
  bool fixed_input, moves;  // whether the inner loop changes the weights
  FactorOrder order;
  index_t transposed = 0;  // of W_0, from the start of the shared memory
  index_t updates = 0;     // U, in a slot
  index_t a = 0, b = 0;    // in a task's row of factors
};

struct FactoredPlan {
  std::vector<FactoredLayer> layers;
  Places places;
  index_t transposed = 0, updates = 0;  // elements of all layers
  index_t row = 0;                      // of a task's factors A and B
};

// Multiply-adds that moving an element of a weight to and from the last cache costs as much as.
constexpr double kMovedElement = 16;

// Smaller weights stay in the nearest cache, whoever's they are.
constexpr index_t kLeastWeights = 4096;

// Whether factors pay. They save the direct way's products for K updates, and all passes over
// parameters of the task's own; they cost two small products for every pass, of all rows that are
// there. First order goes as second order does, so that its losses have the same bits.
template <class S>
bool pays(const MetaCall<S>& call, const FactoredLayer& f) {
  const FactorOrder o(call, f.fixed_input, false);
  const double K = double(call.steps), size = double(f.in * f.out);
  double pairs = 0;  // of a sample and a factor's row
  for (index_t k = 0; k <= call.steps; ++k) {
    const double updates = double(o.updates[k]), lambda = double(o.end[k] - o.begin[k]);
    const double support = double(call.support.count), query = double(call.query.count);
    if (k < call.steps) pairs += 2 * support * updates;
    if (call.loss_weights[k] != 0) pairs += 2 * query * updates;
    if (k > 0) pairs += 2 * support * (lambda + double(o.updates[k - 1]));
  }
  // theta is written and read by two passes a step, lambda by three, and by the mean
  const double moved = 8 * K + 3;
  const double saved = size * (K * double(call.support.count) + moved * kMovedElement);
  const bool fits =
      o.rows * max_of(call.support.count, call.query.count) <= f.in * f.out;  // scratch
  return fits && pairs * double(f.in + f.out) < saved;
}

template <class S>
FactoredPlan plan_factored(const MetaCall<S>& call, bool wanted) {
  const Program& program = *call.program;
  const auto& layers = program.layers();
  const index_t most = max_of(call.support.count, call.query.count);
  FactoredPlan plan;
  std::vector<std::uint8_t> apart(layers.size(), 0);
  const bool possible = wanted && call.backend->factored.layer.forward && !call.params.per_task &&
                        !call.rate_gradient && call.rates.layout != RateLayout::per_parameter &&
                        program.chunk(most) == most;
  Arena transposed, updates, row;
  for (size_t l = 0; possible && l < layers.size(); ++l) {
    const LayerDesc& d = layers[l];
    if (!d.dense() || d.in.pixels() > 1 || d.in.channels == 1 || d.out.channels == 1) continue;
    const bool fixed = index_t(l) == program.first_trainable();
    FactoredLayer f{l,
                    d.in.channels,
                    d.out.channels,
                    fixed,
                    call.rates.adapted[d.segment] != 0,
                    FactorOrder(call, fixed, call.first_order)};
    if (f.in * f.out < kLeastWeights || !pays(call, f)) continue;
    f.transposed = transposed.take(fixed ? 0 : f.in * f.out);
    f.updates = updates.take(call.steps * call.support.count * f.out);
    f.a = row.take(f.order.rows * f.in);
    f.b = row.take(f.order.rows * f.out);
    apart[l] = 1;
    plan.layers.push_back(std::move(f));
  }
  plan.places = plan_places(program, apart);
  plan.transposed = transposed.size();
  plan.updates = updates.size();
  plan.row = row.size();
  return plan;
}

// The factors of tasks in work, as the passes of a step read and store them. Rows of A, B and U are
// in memory of the caller's.
template <class S>
class FactoredTasks {
 public:
  using List = std::vector<Factors<S>>;
  using Stores = std::vector<FactorRows<S>>;

  FactoredTasks() = default;
  FactoredTasks(const MetaCall<S>& call, const FactoredPlan& plan, const S* theta0,
                const S* transposed, S* updates, S* rows, index_t tasks)
      : call_(&call),
        plan_(&plan),
        theta0_(theta0),
        transposed_(transposed),
        updates_(updates),
        rows_(rows),
        tasks_(tasks) {}

  // W_k
  List weights(index_t k) const {
    return list<Factors<S>>([&](const FactoredLayer& f) {
      Factors<S> w = slice(f, 0, f.moves ? f.order.updates[k] : 0);
      w.weights = theta0_ + plan_->places.weights[f.layer];
      w.transposed = transposed_ + f.transposed;
      const Rows<S> u = update_rows(f, f.fixed_input && k > 0 ? k - 1 : 0);
      w.b = u.data;
      w.b_stride = u.stride;
      return w;
    });
  }

  // lambda_k, times one rate per segment where there are `rates`
  List lambda(index_t k, const S* rates) const {
    return list<Factors<S>>([&](const FactoredLayer& f) {
      const FactorOrder& o = f.order;
      Factors<S> w = slice(f, o.begin[k], f.moves ? o.end[k] - o.begin[k] : 0);
      if (rates) w.rate = rates + call_->program->layers()[f.layer].segment;
      return w;
    });
  }

  // Of the gradient that makes W_{k+1}.
  Stores inner_step(index_t k) const {
    return list<FactorRows<S>>([&](const FactoredLayer& f) {
      FactorRows<S> to;
      const index_t row = f.order.support[k];
      const bool again = f.fixed_input && k > 0;
      if (!again) to.a = a_rows(f, row);
      if (f.moves) to.b = update_rows(f, k);
      if (again) to.base = constant(update_rows(f, k - 1));
      return to;
    });
  }

  Stores query_gradient(index_t k) const {
    return list<FactorRows<S>>([&](const FactoredLayer& f) {
      FactorRows<S> to;
      const index_t row = f.order.query[k];
      const bool again = f.fixed_input && k != f.order.first_query;
      if (!again) to.a = a_rows(f, row);
      to.b = b_rows(f, row);
      if (again) to.base = constant(to.b);
      return to;
    });
  }

  Stores chain_step(index_t k) const {
    return list<FactorRows<S>>([&](const FactoredLayer& f) {
      FactorRows<S> to;
      to.b = b_rows(f, f.order.support[k]);
      if (f.fixed_input && k + 1 < call_->steps) to.base = constant(to.b);
      if (f.fixed_input) return to;
      to.ta = a_rows(f, f.order.tangent[k]);
      to.tb = b_rows(f, f.order.tangent[k]);
      return to;
    });
  }

  // Rows of lambda_0, for the mean.
  FactorSum<S> sum(const FactoredLayer& f) const {
    const index_t row = f.order.begin[0];
    FactorSum<S> sum;
    sum.in = f.in;
    sum.out = f.out;
    sum.tasks = tasks_;
    sum.rows = f.order.end[0] - row;
    const Rows<S> a = a_rows(f, row), b = b_rows(f, row);
    sum.a = {a.data, a.stride};
    sum.b = {b.data, b.stride};
    return sum;
  }

 private:
  // Of all layers; empty for those that aren't factored.
  template <class T, class Of>
  std::vector<T> list(const Of& of) const {
    if (!plan_ || plan_->layers.empty()) return {};
    std::vector<T> all(call_->program->layers().size());
    for (const FactoredLayer& f : plan_->layers) all[f.layer] = of(f);
    return all;
  }
  Factors<S> slice(const FactoredLayer& f, index_t row, index_t rows) const {
    const Rows<S> a = a_rows(f, row), b = b_rows(f, row);
    return {nullptr, nullptr, a.data, b.data, a.stride, b.stride, rows, nullptr};
  }
  Rows<S> a_rows(const FactoredLayer& f, index_t row) const {
    return {rows_ + f.a + row * f.in, plan_->row};
  }
  Rows<S> b_rows(const FactoredLayer& f, index_t row) const {
    return {rows_ + f.b + row * f.out, plan_->row};
  }
  // U of an inner step.
  Rows<S> update_rows(const FactoredLayer& f, index_t step) const {
    const index_t size = call_->support.count * f.out;
    return {updates_ + tasks_ * f.updates + step * size, call_->steps * size};
  }
  static Rows<const S> constant(const Rows<S>& rows) { return {rows.data, rows.stride}; }

  const MetaCall<S>* call_ = nullptr;
  const FactoredPlan* plan_ = nullptr;
  const S *theta0_ = nullptr, *transposed_ = nullptr;
  S *updates_ = nullptr, *rows_ = nullptr;
  index_t tasks_ = 0;
};

}  // namespace fm
