// Outer optimizers: the update of one element p with gradient g; t counts the steps, this one
// included.
//
//   Adam   m <- m + (1 - b1) (g - m)          v <- b2 v + (1 - b2) g^2
//          p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   SGD    b <- mu b + (1 - dampening) g      p <- p - lr b, with Nesterov p - lr (g + mu b)
//
// Weight decay adds decay p to g, or decoupled (AdamW) scales p by 1 - lr decay before the step.
// Sources: Kingma and Ba 2015; Reddi et al. 2018 (the largest v so far in place of v); Loshchilov
// and Hutter 2019; Sutskever et al. 2013.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace fm::math {

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

template <class S>
struct AdamRule {
  S sign;                 // -1 climbs
  S decay, shrink;        // coupled: joins the gradient; decoupled: scales p
  S rest1, beta2, rest2;  // 1 - b1, b2, 1 - b2
  S rate;                 // lr / (1 - b1^t)
  S root;                 // sqrt(1 - b2^t)
  S eps;
};

template <class S>
FM_INLINE AdamRule<S> adam_rule(const AdamOptions& o, double t) {
  AdamRule<S> r;
  r.sign = S(o.maximize ? -1 : 1);
  r.decay = S(o.decoupled ? 0.0 : o.weight_decay);
  r.shrink = S(o.decoupled ? 1 - o.lr * o.weight_decay : 1.0);
  r.rest1 = S(1 - o.beta1);
  r.beta2 = S(o.beta2);
  r.rest2 = S(1 - o.beta2);
  r.rate = S(o.lr / (1 - std::pow(o.beta1, t)));
  r.root = S(std::sqrt(1 - std::pow(o.beta2, t)));
  r.eps = S(o.eps);
  return r;
}

// The gradient an update uses. Without decay p is left out: 0 * inf would be NaN.
template <bool Decay, class S>
FM_INLINE S outer_gradient(S sign, S decay, S g, S p) {
  if constexpr (Decay) return sign * g + decay * p;
  return sign * g;
}

// Moments m and v of one element.
template <class S>
FM_INLINE void adam_moments(const AdamRule<S>& r, S g, S& m, S& v) {
  m += r.rest1 * (g - m);
  v = r.beta2 * v + r.rest2 * g * g;
}

// The new p; `square` is v, or the largest v so far.
template <class S>
FM_INLINE S adam_update(const AdamRule<S>& r, S p, S m, S square) {
  return p * r.shrink - r.rate * (m / (std::sqrt(square) / r.root + r.eps));
}

template <class S>
struct SgdRule {
  S sign, decay, lr, momentum, fresh;  // fresh = 1 - dampening
  bool nesterov;
  bool first;  // the buffer begins as the gradient
};

template <class S>
FM_INLINE S sgd_buffer(const SgdRule<S>& r, S g, S b) {
  return r.first ? g : r.momentum * b + r.fresh * g;
}

template <class S>
FM_INLINE S sgd_direction(const SgdRule<S>& r, S g, S b) {
  return r.nesterov ? g + r.momentum * b : b;
}

}  // namespace fm::math
