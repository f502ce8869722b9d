// Losses: one sample in sample_loss.cuh.
//
// The value of a task is a sum in double over its samples: a block takes a task, a thread every
// 256th sample, then the block adds up in fixed order. Hessian products need no sum, so a thread
// takes a sample of any task.
// Labels are in device memory, where nobody has checked them. One out of range reads nothing: the
// sample's dz and the task's value are NaN, and the accuracy counts a miss. The Hessian of
// cross-entropy takes no label, so tdz is the same whatever it is.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sample_loss.cuh"

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
