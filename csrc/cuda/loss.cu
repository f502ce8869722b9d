// Losses: formulas of one sample in math/loss.h and math/policy.h.
//
// The value of a task is a sum in double over its samples: a block takes a task, a thread every
// 256th sample, then the block adds up in fixed order. Hessian products need no sum, so a thread
// takes a sample of any task.
// Labels are in device memory, where nobody has checked them. One out of range reads nothing: the
// sample's dz and tdz are NaN, the task's value is NaN and its accuracy -1, which no labels in
// range give.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "math/loss.h"
#include "math/policy.h"

namespace FM_CUDA {
namespace {

template <class S>
struct LossParams {
  const S *z, *tz;
  const void* target;
  S *dz, *tdz;
  double *value, *accuracy;  // both null or neither
  index_t value_stride;
  S scale;
  int tasks, samples, outputs;
};

template <class S>
FM_DEVICE S not_a_number() {
  return S(NAN);
}

struct SampleLoss {
  double value;
  bool hit;
};

struct SquaredError {
  static constexpr bool kAccuracy = false;
  template <class S>
  static FM_DEVICE SampleLoss value(const LossParams<S>& p, index_t n, const S* z, S* dz) {
    const S* y = static_cast<const S*>(p.target) + n * p.outputs;
    return {math::squared_error(z, y, p.outputs, p.scale, dz), false};
  }
  template <class S>
  static FM_DEVICE void hessian(const LossParams<S>& p, index_t, const S*, const S* tz, S* tdz) {
    for (int o = 0; o < p.outputs; ++o) tdz[o] = S(2) * p.scale * tz[o];
  }
};

struct CrossEntropy {
  static constexpr bool kAccuracy = true;
  template <class S>
  static FM_DEVICE SampleLoss value(const LossParams<S>& p, index_t n, const S* z, S* dz) {
    const index_t label = index_t(static_cast<const std::int64_t*>(p.target)[n]);
    if (label < 0 || label >= p.outputs) {
      for (int o = 0; dz && o < p.outputs; ++o) dz[o] = not_a_number<S>();
      return {not_a_number<double>(), false};
    }
    bool correct = false;
    const double value = math::cross_entropy(z, label, p.outputs, p.scale, dz, &correct);
    return {value, correct};
  }
  template <class S>
  static FM_DEVICE void hessian(const LossParams<S>& p, index_t n, const S* z, const S* tz,
                                S* tdz) {
    math::cross_entropy_hessian(z, tz, p.outputs, p.scale, tdz);
  }
};

// Of math/policy.h; an action that is no output's number makes its sample NaN.
template <class Loss>
struct Policy {
  static constexpr bool kAccuracy = false;
  template <class S>
  static FM_DEVICE const S* target_of(const LossParams<S>& p, index_t n) {
    return static_cast<const S*>(p.target) + n * Loss::target_size(p.outputs);
  }
  template <class S>
  static FM_DEVICE bool lost(const LossParams<S>& p, const S* target) {
    return Loss::kIndexed && !(*target >= S(0) && *target < S(p.outputs));
  }
  template <class S>
  static FM_DEVICE SampleLoss value(const LossParams<S>& p, index_t n, const S* z, S* dz) {
    const S* target = target_of(p, n);
    if (lost(p, target)) {
      for (int o = 0; dz && o < p.outputs; ++o) dz[o] = not_a_number<S>();
      return {not_a_number<double>(), false};
    }
    return {Loss::value(z, target, p.outputs, p.scale, dz), false};
  }
  template <class S>
  static FM_DEVICE void hessian(const LossParams<S>& p, index_t n, const S* z, const S* tz,
                                S* tdz) {
    const S* target = target_of(p, n);
    if (lost(p, target)) {
      for (int o = 0; o < p.outputs; ++o) tdz[o] = not_a_number<S>();
      return;
    }
    Loss::hessian(z, target, tz, p.outputs, p.scale, tdz);
  }
};

template <class S, class Loss>
FM_KERNEL void __launch_bounds__(kThreads, 1) loss_value_kernel(const LossParams<S> p) {
  const int task = int(blockIdx.x);
  double value = 0;
  int hits = 0;
  for (int i = int(threadIdx.x); i < p.samples; i += int(blockDim.x)) {
    const index_t n = index_t(task) * p.samples + i, row = n * p.outputs;
    const SampleLoss loss = Loss::value(p, n, p.z + row, shifted(p.dz, row));
    value += loss.value;
    hits += loss.hit;
  }
  double sums[2] = {value, double(hits)};
  block_sum(sums, shared_memory<double>());
  if (threadIdx.x != 0 || !p.value) return;
  p.value[task * p.value_stride] = sums[0];
  p.accuracy[task * p.value_stride] =
      Loss::kAccuracy ? sums[1] / double(p.samples) : not_a_number<double>();
}

template <class S, class Loss>
FM_KERNEL void __launch_bounds__(kThreads, 1) loss_hessian_kernel(const LossParams<S> p) {
  const index_t n = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= index_t(p.tasks) * p.samples) return;
  const index_t row = n * p.outputs;
  Loss::hessian(p, n, p.z + row, p.tz + row, p.tdz + row);
}

template <class S>
LossParams<S> params_of(const LossArgs<S>& a) {
  return {a.z,        a.tz,           a.target, a.dz,         a.tdz,          a.value,
          a.accuracy, a.value_stride, a.scale,  int(a.tasks), int(a.samples), int(a.outputs)};
}

template <class Loss, class S>
void run_value(const LossArgs<S>& a, const Exec& exec) {
  launch((loss_value_kernel<S, Loss>), unsigned(a.tasks), kThreads, 2 * kWarp * sizeof(double),
         exec, params_of(a));
}

template <class Loss, class S>
void run_hessian(const LossArgs<S>& a, const Exec& exec) {
  launch((loss_hessian_kernel<S, Loss>), flat_blocks(a.tasks * a.samples, "loss"), kThreads, 0,
         exec, params_of(a));
}

}  // namespace

#define FM_LOSS(name, Loss)                                          \
  template <class S>                                                 \
  void name##_value(const LossArgs<S>& a, const Exec& exec) {        \
    run_value<Loss>(a, exec);                                        \
  }                                                                  \
  template <class S>                                                 \
  void name##_hessian(const LossArgs<S>& a, const Exec& exec) {      \
    run_hessian<Loss>(a, exec);                                      \
  }                                                                  \
  template void name##_value(const LossArgs<float>&, const Exec&);   \
  template void name##_value(const LossArgs<double>&, const Exec&);  \
  template void name##_hessian(const LossArgs<float>&, const Exec&); \
  template void name##_hessian(const LossArgs<double>&, const Exec&);

FM_LOSS(squared_error, SquaredError)
FM_LOSS(cross_entropy, CrossEntropy)
FM_LOSS(gaussian_policy, Policy<math::PolicyGradient<math::Gaussian>>)
FM_LOSS(gaussian_ratio, Policy<math::LikelihoodRatio<math::Gaussian>>)
FM_LOSS(gaussian_kl, Policy<math::KlDivergence<math::Gaussian>>)
FM_LOSS(categorical_policy, Policy<math::PolicyGradient<math::Categorical>>)
FM_LOSS(categorical_ratio, Policy<math::LikelihoodRatio<math::Categorical>>)
FM_LOSS(categorical_kl, Policy<math::KlDivergence<math::Categorical>>)

}  // namespace FM_CUDA
