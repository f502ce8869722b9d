// Outer optimizers: one pass over a parameter and its state. Formulas in math/optimizer.h.

namespace FM_KERNELS {

template <bool Decay, bool Largest>
FM_INLINE void adam_loop(const math::AdamRule<S>& rule, index_t n, const S* FM_RESTRICT g,
                         S* FM_RESTRICT p, S* FM_RESTRICT m, S* FM_RESTRICT v,
                         S* FM_RESTRICT largest) {
  const math::AdamRule<S> r = rule;  // by value, so that it stays in registers
  for (index_t i = 0; i < n; ++i) {
    const S slope = math::outer_gradient<Decay>(r.sign, r.decay, g[i], p[i]);
    S mean = m[i], square = v[i];
    math::adam_moments(r, slope, mean, square);
    m[i] = mean;
    v[i] = square;
    if constexpr (Largest) {
      // NaN stays NaN, as it does in torch
      const S before = largest[i];
      square = before > square || before != before ? before : square;
      largest[i] = square;
    }
    p[i] = math::adam_update(r, p[i], mean, square);
  }
}

inline void adam_tensor(const math::AdamRule<S>& r, index_t n, const S* g, S* p, S* m, S* v,
                        S* largest) {
  if (r.decay != S(0)) {
    largest ? adam_loop<true, true>(r, n, g, p, m, v, largest)
            : adam_loop<true, false>(r, n, g, p, m, v, largest);
  } else {
    largest ? adam_loop<false, true>(r, n, g, p, m, v, largest)
            : adam_loop<false, false>(r, n, g, p, m, v, largest);
  }
}

inline void adam(const math::AdamOptions& given, const double* lr, unsigned*,
                 const AdamTensor<S>* tensors, index_t count, const Exec&) {
  math::AdamOptions options = given;
  if (lr) options.lr = *lr;
  math::AdamRule<S> rule{};
  for (index_t i = 0; i < count; ++i) {
    const AdamTensor<S>& t = tensors[i];
    const float step = *t.step += 1;
    if (i == 0 || step != *tensors[i - 1].step) rule = math::adam_rule<S>(options, double(step));
    adam_tensor(rule, t.n, t.g, t.p, t.m, t.v, t.largest);
  }
}

template <bool Decay, bool Momentum>
FM_INLINE void sgd_loop(const math::SgdRule<S>& rule, index_t n, const S* FM_RESTRICT g,
                        S* FM_RESTRICT p, S* FM_RESTRICT b) {
  const math::SgdRule<S> r = rule;
  for (index_t i = 0; i < n; ++i) {
    S direction = math::outer_gradient<Decay>(r.sign, r.decay, g[i], p[i]);
    if constexpr (Momentum) {
      b[i] = math::sgd_buffer(r, direction, b[i]);
      direction = math::sgd_direction(r, direction, b[i]);
    }
    p[i] -= r.lr * direction;
  }
}

inline void sgd_tensor(const math::SgdRule<S>& r, index_t n, const S* g, S* p, S* buffer) {
  if (r.decay != S(0)) {
    buffer ? sgd_loop<true, true>(r, n, g, p, buffer) : sgd_loop<true, false>(r, n, g, p, buffer);
  } else {
    buffer ? sgd_loop<false, true>(r, n, g, p, buffer) : sgd_loop<false, false>(r, n, g, p, buffer);
  }
}

inline void sgd(const math::SgdRule<S>& given, const double* lr, const SgdTensor<S>* tensors,
                index_t count, const Exec&) {
  math::SgdRule<S> rule = given;
  if (lr) rule.lr = S(*lr);
  for (index_t i = 0; i < count; ++i) {
    const SgdTensor<S>& t = tensors[i];
    rule.first = t.first;
    sgd_tensor(rule, t.n, t.g, t.p, t.buffer);
  }
}

}  // namespace FM_KERNELS
