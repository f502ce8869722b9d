// Losses of one sample with O outputs z: value, gradient dz, and the loss Hessian's product with
// tz. `scale` carries the reduction (1/N for a mean over samples, O/N for the sum over ways, ...).
//
//   squared error   L = scale sum_o (z - y)^2          dz = 2 scale (z - y)      tdz = 2 scale tz
//   cross-entropy   L = scale (log sum_o e^z - z_y)    dz = scale (p - e_y)      tdz = scale p (tz
//   - <p, tz>)
//
// tz and dz may be the same array as tdz's: each element is read before it is written.
#pragma once

#include <cmath>

#include "common/types.h"
#include "math/elementary.h"

namespace fm::math {

template <class S>
FM_INLINE double squared_error(const S* z, const S* y, index_t outputs, S scale, S* dz) {
  double value = 0;
  for (index_t o = 0; o < outputs; ++o) {
    const S error = z[o] - y[o];
    value += double(error) * double(error);
    if (dz) dz[o] = S(2) * scale * error;
  }
  return value * double(scale);
}

template <class S>
struct Softmax {
  S top;      // max_o z
  S inverse;  // 1 / sum_o exp(z - top)
  index_t best;
};

template <class S>
FM_INLINE Softmax<S> softmax(const S* z, index_t outputs) {
  Softmax<S> s{z[0], S(0), 0};
  for (index_t o = 1; o < outputs; ++o) {
    if (z[o] > s.top) {
      s.top = z[o];
      s.best = o;
    }
  }
  S sum = S(0);
  for (index_t o = 0; o < outputs; ++o) sum += exp(z[o] - s.top);
  s.inverse = S(1) / sum;
  return s;
}

// Also says whether the largest output is the label's (the first of equals wins, as in argmax).
template <class S>
FM_INLINE double cross_entropy(const S* z, index_t label, index_t outputs, S scale, S* dz,
                               bool* correct) {
  const Softmax<S> s = softmax(z, outputs);
  if (dz) {
    for (index_t o = 0; o < outputs; ++o) {
      dz[o] = scale * (exp(z[o] - s.top) * s.inverse - (o == label ? S(1) : S(0)));
    }
  }
  *correct = s.best == label;
  return double(scale) * (double(s.top) - double(z[label]) - std::log(double(s.inverse)));
}

template <class S>
FM_INLINE void cross_entropy_hessian(const S* z, const S* tz, index_t outputs, S scale, S* tdz) {
  const Softmax<S> s = softmax(z, outputs);
  S mean = S(0);
  for (index_t o = 0; o < outputs; ++o) mean += exp(z[o] - s.top) * s.inverse * tz[o];
  for (index_t o = 0; o < outputs; ++o) {
    tdz[o] = scale * exp(z[o] - s.top) * s.inverse * (tz[o] - mean);
  }
}

}  // namespace fm::math
