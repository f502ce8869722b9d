// Losses of one sample, as kernels call them: formulas in math/loss.h and math/policy.h.
//
//   Loss::value(p, n, z, dz)       value of sample n, whether its label was hit, and dz unless null
//   Loss::hessian(p, n, z, tz, tdz)
//
// z, dz, tz and tdz are the sample's own [outputs]; `p` is anything with `target` (of all samples),
// `outputs` and `scale`. A label or action that is no output's number reads nothing: its sample is
// a miss, value and dz are NaN, and so is tdz, but for cross-entropy's, which takes no label.
//
// Where kByLanes, neighbouring lanes may do a sample's Hessian product together:
//
//   Loss::hessian(p, at, z, tz, tdz)      at: a SampleLanes, which all lanes of a warp call at once
#pragma once

#include <cmath>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "math/loss.h"
#include "math/policy.h"

namespace FM_CUDA {

template <class S>
FM_DEVICE S not_a_number() {
  return S(NAN);
}

struct SampleLoss {
  double value;
  bool hit;
};

// The lanes of a sample, a power of two up to kWarp, and which of them this one is.
struct SampleLanes {
  int lane, lanes;
  int outputs;  // of the sample; 0: there is none

  // Over the lanes, the same bits in each.
  template <class Op, class S>
  FM_DEVICE S reduce(S v) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      v = Op::join(v, warp_shuffle_xor(v, distance));
    }
    return v;
  }
};

struct SquaredError {
  static constexpr bool kAccuracy = false, kByLanes = true;
  template <class P, class S>
  static FM_DEVICE SampleLoss value(const P& p, index_t n, const S* z, S* dz) {
    const S* y = static_cast<const S*>(p.target) + n * p.outputs;
    return {math::squared_error(z, y, p.outputs, p.scale, dz), false};
  }
  template <class P, class S>
  static FM_DEVICE void hessian(const P& p, index_t, const S*, const S* tz, S* tdz) {
    for (int o = 0; o < p.outputs; ++o) tdz[o] = S(2) * p.scale * tz[o];
  }
  template <class P, class S>
  static FM_DEVICE void hessian(const P& p, const SampleLanes& at, const S*, const S* tz, S* tdz) {
    for (int o = at.lane; o < at.outputs; o += at.lanes) tdz[o] = S(2) * p.scale * tz[o];
  }
};

struct CrossEntropy {
  static constexpr bool kAccuracy = true, kByLanes = true;
  template <class P, class S>
  static FM_DEVICE SampleLoss value(const P& p, index_t n, const S* z, S* dz) {
    const index_t label = index_t(static_cast<const std::int64_t*>(p.target)[n]);
    if (label < 0 || label >= p.outputs) {
      for (int o = 0; dz && o < p.outputs; ++o) dz[o] = not_a_number<S>();
      return {not_a_number<double>(), false};
    }
    bool correct = false;
    const double value = math::cross_entropy(z, label, p.outputs, p.scale, dz, &correct);
    return {value, correct};
  }
  template <class P, class S>
  static FM_DEVICE void hessian(const P& p, index_t, const S* z, const S* tz, S* tdz) {
    math::cross_entropy_hessian(z, tz, p.outputs, p.scale, tdz);
  }
  template <class P, class S>
  static FM_DEVICE void hessian(const P& p, const SampleLanes& at, const S* z, const S* tz,
                                S* tdz) {
    S top = S(-INFINITY), sum = S(0), mean = S(0);
    for (int o = at.lane; o < at.outputs; o += at.lanes) top = Max::join(top, z[o]);
    top = at.reduce<Max>(top);
    for (int o = at.lane; o < at.outputs; o += at.lanes) {
      const S e = math::exp(z[o] - top);
      sum += e;
      mean += e * tz[o];
    }
    const S inverse = S(1) / at.reduce<Sum>(sum);
    mean = at.reduce<Sum>(mean) * inverse;
    for (int o = at.lane; o < at.outputs; o += at.lanes) {
      tdz[o] = p.scale * math::exp(z[o] - top) * inverse * (tz[o] - mean);
    }
  }
};

// Of math/policy.h; an action that is no output's number makes its sample NaN.
template <class Loss>
struct Policy {
  static constexpr bool kAccuracy = false, kByLanes = false;
  template <class S, class P>
  static FM_DEVICE const S* target_of(const P& p, index_t n) {
    return static_cast<const S*>(p.target) + n * Loss::target_size(p.outputs);
  }
  template <class P, class S>
  static FM_DEVICE bool lost(const P& p, const S* target) {
    return Loss::kIndexed && !(*target >= S(0) && *target < S(p.outputs));
  }
  template <class P, class S>
  static FM_DEVICE SampleLoss value(const P& p, index_t n, const S* z, S* dz) {
    const S* target = target_of<S>(p, n);
    if (lost(p, target)) {
      for (int o = 0; dz && o < p.outputs; ++o) dz[o] = not_a_number<S>();
      return {not_a_number<double>(), false};
    }
    return {Loss::value(z, target, p.outputs, p.scale, dz), false};
  }
  template <class P, class S>
  static FM_DEVICE void hessian(const P& p, index_t n, const S* z, const S* tz, S* tdz) {
    const S* target = target_of<S>(p, n);
    if (lost(p, target)) {
      for (int o = 0; o < p.outputs; ++o) tdz[o] = not_a_number<S>();
      return;
    }
    Loss::hessian(z, target, tz, p.outputs, p.scale, tdz);
  }
};

}  // namespace FM_CUDA
