// Gaussian policy gradient (REINFORCE) of one sample with A actions.
//
// z = (mean m [A], log-std s [A]); the target holds the action a [A] and the advantage.
//   log pi = sum -u^2/2 - s - log(2 pi)/2        u = (a - m) e^-s
//   L      = c log pi                            c = -scale * advantage
//   dm     = c u e^-s                            ds  = c (u^2 - 1)
//   tdm    = c e^-s (tu - u ts)                  tds = 2 c u tu          tu = -tm e^-s - u ts
#pragma once

#include "common/types.h"
#include "math/elementary.h"

namespace fm::math {

template <class S>
FM_INLINE double gaussian_policy(const S* z, const S* target, index_t actions, S scale, S* dz) {
  const S c = -scale * target[actions];
  double log_probability = 0;
  for (index_t i = 0; i < actions; ++i) {
    const S s = z[actions + i], inverse_std = exp(-s), u = (target[i] - z[i]) * inverse_std;
    log_probability += -0.5 * double(u) * double(u) - double(s) - 0.91893853320467274178;
    if (dz) {
      dz[i] = c * u * inverse_std;
      dz[actions + i] = c * (u * u - S(1));
    }
  }
  return double(c) * log_probability;
}

template <class S>
FM_INLINE void gaussian_policy_hessian(const S* z, const S* target, const S* tz, index_t actions,
                                       S scale, S* tdz) {
  const S c = -scale * target[actions];
  for (index_t i = 0; i < actions; ++i) {
    const S inverse_std = exp(-z[actions + i]), u = (target[i] - z[i]) * inverse_std;
    const S ts = tz[actions + i], tu = -tz[i] * inverse_std - u * ts;
    tdz[i] = c * inverse_std * (tu - u * ts);
    tdz[actions + i] = S(2) * c * u * tu;
  }
}

}  // namespace fm::math
