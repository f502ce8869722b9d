// Policy losses of one sample. z is what the network puts out, `scale` the reduction's factor.
//
// Gaussian with A actions: z = (mean m [A], log-std s [A]). Below kLogStdFloor s counts as the
// floor, and has no derivative.
//   log pi = sum -u^2/2 - s - log(2 pi)/2          u = (a - m) e^-s
//   score  = d log pi / dz:  m: u e^-s             s: u^2 - 1
//   along tz:                m: e^-s (tu - u ts)   s: 2 u tu           tu = -tm e^-s - u ts
// Categorical with O actions: z = scores, p = softmax(z).
//   log pi = log p_a         score = e_a - p       along tz: -p (tz - <p, tz>)
//
//   policy gradient   L = -scale A log pi              target (a, A)
//   likelihood ratio  L = -scale A exp(log pi - old)   target (a, A, old = log pi when sampled)
//   KL                L = scale W KL(old || pi)        target (old z, weight W)
//     Gaussian        s - s0 + (q + e^2 - 1) / 2       q = e^2(s0 - s), e = (m - m0) e^-s
//     categorical     sum p0 (log p0 - log p)
//
// The ratio's Hessian has <score, tz> score beside the score's tangent. Where pi = old the KL's
// gradient is zero and its Hessian the Fisher information. Actions of categorical policies are
// whole numbers in a floating target.
#pragma once

#include <cmath>

#include "common/types.h"
#include "math/elementary.h"
#include "math/loss.h"

namespace fm::math {

constexpr double kLogStdFloor = -13.815510557964274;  // a standard deviation of 1e-6

template <class S>
FM_INLINE S floored_log_std(S s) {
  return s < S(kLogStdFloor) ? S(kLogStdFloor) : s;
}

// One of the A actions of a Gaussian.
template <class S>
struct GaussianAction {
  S s, on, inverse_std, u;  // on: 1, or 0 where s is the floor

  FM_INLINE GaussianAction(S m, S log_std, S action)
      : s(floored_log_std(log_std)),
        on(log_std < S(kLogStdFloor) ? S(0) : S(1)),
        inverse_std(exp(-s)),
        u((action - m) * inverse_std) {}

  FM_INLINE double log_probability() const {
    return -0.5 * double(u) * double(u) - double(s) - 0.91893853320467274178;
  }
  // c times the score
  FM_INLINE S mean_score(S c) const { return c * u * inverse_std; }
  FM_INLINE S log_std_score(S c) const { return c * on * (u * u - S(1)); }
  // c (the score's tangent along (tm, ts) + k times the score)
  FM_INLINE S mean_tangent(S tm, S ts, S c, S k) const {
    return c * inverse_std * (tu(tm, ts) - u * on * ts + k * u);
  }
  FM_INLINE S log_std_tangent(S tm, S ts, S c, S k) const {
    return c * on * (S(2) * u * tu(tm, ts) + k * (u * u - S(1)));
  }

 private:
  FM_INLINE S tu(S tm, S ts) const { return -tm * inverse_std - u * on * ts; }
};

struct Gaussian {
  static constexpr bool kIndexed = false;
  static FM_INLINE constexpr index_t actions(index_t outputs) { return outputs / 2; }
  static FM_INLINE constexpr index_t action_size(index_t outputs) { return outputs / 2; }

  template <class S>
  static FM_INLINE GaussianAction<S> at(const S* z, const S* action, index_t n, index_t i) {
    return {z[i], z[n + i], action[i]};
  }

  template <class S>
  static FM_INLINE double log_probability(const S* z, const S* action, index_t outputs) {
    const index_t n = actions(outputs);
    double sum = 0;
    for (index_t i = 0; i < n; ++i) sum += at(z, action, n, i).log_probability();
    return sum;
  }

  // dz = c times the score
  template <class S>
  static FM_INLINE void score(const S* z, const S* action, index_t outputs, S c, S* dz) {
    const index_t n = actions(outputs);
    for (index_t i = 0; i < n; ++i) {
      const GaussianAction<S> g = at(z, action, n, i);
      dz[i] = g.mean_score(c);
      dz[n + i] = g.log_std_score(c);
    }
  }

  // <score, tz>
  template <class S>
  static FM_INLINE S slope(const S* z, const S* action, const S* tz, index_t outputs) {
    const index_t n = actions(outputs);
    S sum = S(0);
    for (index_t i = 0; i < n; ++i) {
      const GaussianAction<S> g = at(z, action, n, i);
      sum += g.mean_score(S(1)) * tz[i] + g.log_std_score(S(1)) * tz[n + i];
    }
    return sum;
  }

  // tdz = c (the score's tangent along tz + k times the score)
  template <class S>
  static FM_INLINE void score_tangent(const S* z, const S* action, const S* tz, index_t outputs,
                                      S c, S k, S* tdz) {
    const index_t n = actions(outputs);
    for (index_t i = 0; i < n; ++i) {
      const GaussianAction<S> g = at(z, action, n, i);
      const S tm = tz[i], ts = tz[n + i];
      tdz[i] = g.mean_tangent(tm, ts, c, k);
      tdz[n + i] = g.log_std_tangent(tm, ts, c, k);
    }
  }

  template <class S>
  static FM_INLINE double kl(const S* z, const S* old, index_t outputs, S c, S* dz) {
    const index_t n = actions(outputs);
    double sum = 0;
    for (index_t i = 0; i < n; ++i) {
      const GaussianAction<S> g = at(z, old, n, i);
      const S s0 = floored_log_std(old[n + i]), q = exp(S(2) * (s0 - g.s)), e = -g.u;
      sum += double(g.s) - double(s0) + 0.5 * (double(q) + double(e) * double(e) - 1);
      if (dz) {
        dz[i] = c * e * g.inverse_std;
        dz[n + i] = c * g.on * (S(1) - q - e * e);
      }
    }
    return sum;
  }

  template <class S>
  static FM_INLINE void kl_hessian(const S* z, const S* old, const S* tz, index_t outputs, S c,
                                   S* tdz) {
    const index_t n = actions(outputs);
    for (index_t i = 0; i < n; ++i) {
      const GaussianAction<S> g = at(z, old, n, i);
      const S q = exp(S(2) * (floored_log_std(old[n + i]) - g.s)), e = -g.u;
      const S tm = g.inverse_std * tz[i], ts = g.on * tz[n + i];
      tdz[i] = c * g.inverse_std * (tm - S(2) * e * ts);
      tdz[n + i] = c * g.on * S(2) * ((q + e * e) * ts - e * tm);
    }
  }
};

struct Categorical {
  static constexpr bool kIndexed = true;  // an action is the number of an output
  static FM_INLINE constexpr index_t action_size(index_t) { return 1; }

  template <class S>
  static FM_INLINE double log_normalizer(const S* z, index_t outputs) {
    const Softmax<S> s = softmax(z, outputs);
    return double(s.top) - std::log(double(s.inverse));
  }

  template <class S>
  static FM_INLINE double log_probability(const S* z, const S* action, index_t outputs) {
    return double(z[index_t(*action)]) - log_normalizer(z, outputs);
  }

  template <class S>
  static FM_INLINE void score(const S* z, const S* action, index_t outputs, S c, S* dz) {
    const Softmax<S> s = softmax(z, outputs);
    for (index_t o = 0; o < outputs; ++o) {
      dz[o] = c * ((o == index_t(*action) ? S(1) : S(0)) - exp(z[o] - s.top) * s.inverse);
    }
  }

  template <class S>
  static FM_INLINE S slope(const S* z, const S* action, const S* tz, index_t outputs) {
    return tz[index_t(*action)] - mean(z, tz, outputs);
  }

  template <class S>
  static FM_INLINE void score_tangent(const S* z, const S* action, const S* tz, index_t outputs,
                                      S c, S k, S* tdz) {
    const Softmax<S> s = softmax(z, outputs);
    const S average = mean(z, tz, outputs);
    for (index_t o = 0; o < outputs; ++o) {
      const S p = exp(z[o] - s.top) * s.inverse, hit = o == index_t(*action) ? S(1) : S(0);
      tdz[o] = c * (k * (hit - p) - p * (tz[o] - average));
    }
  }

  template <class S>
  static FM_INLINE double kl(const S* z, const S* old, index_t outputs, S c, S* dz) {
    const Softmax<S> s = softmax(z, outputs), s0 = softmax(old, outputs);
    const double shift = log_normalizer(z, outputs) - log_normalizer(old, outputs);
    double sum = 0;
    for (index_t o = 0; o < outputs; ++o) {
      const S p0 = exp(old[o] - s0.top) * s0.inverse;
      sum += double(p0) * (double(old[o]) - double(z[o]) + shift);
      if (dz) dz[o] = c * (exp(z[o] - s.top) * s.inverse - p0);
    }
    return sum;
  }

  template <class S>
  static FM_INLINE void kl_hessian(const S* z, const S*, const S* tz, index_t outputs, S c,
                                   S* tdz) {
    cross_entropy_hessian(z, tz, outputs, c, tdz);
  }

 private:
  template <class S>
  static FM_INLINE S mean(const S* z, const S* tz, index_t outputs) {
    const Softmax<S> s = softmax(z, outputs);
    S sum = S(0);
    for (index_t o = 0; o < outputs; ++o) sum += exp(z[o] - s.top) * s.inverse * tz[o];
    return sum;
  }
};

// The three losses, for either distribution.

template <class Policy>
struct PolicyGradient {
  static constexpr bool kIndexed = Policy::kIndexed;
  static FM_INLINE constexpr index_t target_size(index_t outputs) {
    return Policy::action_size(outputs) + 1;
  }

  template <class S>
  static FM_INLINE double value(const S* z, const S* target, index_t outputs, S scale, S* dz) {
    const S c = -scale * target[Policy::action_size(outputs)];
    if (dz) Policy::score(z, target, outputs, c, dz);
    return double(c) * Policy::log_probability(z, target, outputs);
  }
  template <class S>
  static FM_INLINE void hessian(const S* z, const S* target, const S* tz, index_t outputs, S scale,
                                S* tdz) {
    const S c = -scale * target[Policy::action_size(outputs)];
    Policy::score_tangent(z, target, tz, outputs, c, S(0), tdz);
  }
};

template <class Policy>
struct LikelihoodRatio {
  static constexpr bool kIndexed = Policy::kIndexed;
  static FM_INLINE constexpr index_t target_size(index_t outputs) {
    return Policy::action_size(outputs) + 2;
  }

  template <class S>
  static FM_INLINE double value(const S* z, const S* target, index_t outputs, S scale, S* dz) {
    const double c = weight(z, target, outputs, scale);
    if (dz) Policy::score(z, target, outputs, S(c), dz);
    return c;
  }
  template <class S>
  static FM_INLINE void hessian(const S* z, const S* target, const S* tz, index_t outputs, S scale,
                                S* tdz) {
    const S c = S(weight(z, target, outputs, scale));
    const S k = Policy::slope(z, target, tz, outputs);
    Policy::score_tangent(z, target, tz, outputs, c, k, tdz);
  }

 private:
  template <class S>
  static FM_INLINE double weight(const S* z, const S* target, index_t outputs, S scale) {
    const index_t n = Policy::action_size(outputs);
    const double log_ratio = Policy::log_probability(z, target, outputs) - double(target[n + 1]);
    return -double(scale) * double(target[n]) * std::exp(log_ratio);
  }
};

template <class Policy>
struct KlDivergence {
  static constexpr bool kIndexed = false;
  static FM_INLINE constexpr index_t target_size(index_t outputs) { return outputs + 1; }

  template <class S>
  static FM_INLINE double value(const S* z, const S* target, index_t outputs, S scale, S* dz) {
    const S c = scale * target[outputs];
    return double(c) * Policy::kl(z, target, outputs, c, dz);
  }
  template <class S>
  static FM_INLINE void hessian(const S* z, const S* target, const S* tz, index_t outputs, S scale,
                                S* tdz) {
    Policy::kl_hessian(z, target, tz, outputs, scale * target[outputs], tdz);
  }
};

}  // namespace fm::math
