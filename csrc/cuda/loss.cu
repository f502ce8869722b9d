// Losses: one sample in sample_loss.cuh.
//
// The value of a task is a sum in double over its samples: a block takes a part of a task's, all of
// them if they are few (loss_parts), a thread every 256th of the part, then the block adds up in
// fixed order. A second kernel adds up the parts. Where parts begin depends on the number of
// samples alone. Hessian products need no sum over samples: a sample of any task takes a thread or,
// by SampleLanes, about one for each output.
//
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
  double* sums;  // [T, parts, 2] values and hits, where there are several
  S scale;
  int tasks, samples, outputs, parts, part;  // part: samples of one
  int lanes = 1;                             // of a sample's Hessian product
};

// `sums` are of all samples of a task
template <bool Accuracy, class S>
FM_DEVICE void put_value(const LossParams<S>& p, int task, const double (&sums)[2]) {
  p.value[task * p.value_stride] = sums[0];
  p.accuracy[task * p.value_stride] =
      Accuracy ? sums[1] / double(p.samples) : not_a_number<double>();
}

template <class S, class Loss>
FM_KERNEL void __launch_bounds__(kThreads, 1) loss_value_kernel(const LossParams<S> p) {
  await_previous_kernels();
  const int task = int(blockIdx.x) / p.parts, part = int(blockIdx.x) % p.parts;
  const int first = part * p.part, end = min_of(first + p.part, p.samples);
  double value = 0;
  int hits = 0;
  for (int i = first + int(threadIdx.x); i < end; i += int(blockDim.x)) {
    const index_t n = index_t(task) * p.samples + i, row = n * p.outputs;
    const SampleLoss loss = Loss::value(p, n, p.z + row, shifted(p.dz, row));
    value += loss.value;
    hits += loss.hit;
  }
  if (!p.value) return;
  double sums[2] = {value, double(hits)};
  block_sum(sums, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (p.parts == 1) return put_value<Loss::kAccuracy>(p, task, sums);
  for (int i = 0; i < 2; ++i) p.sums[2 * index_t(blockIdx.x) + i] = sums[i];
}

// A block takes a task, a thread every 256th part.
template <class S, bool Accuracy>
FM_KERNEL void __launch_bounds__(kThreads, 1) loss_parts_kernel(const LossParams<S> p) {
  await_previous_kernels();
  const int task = int(blockIdx.x);
  double sums[2] = {};
  for (int part = int(threadIdx.x); part < p.parts; part += int(blockDim.x)) {
    const double* of_part = p.sums + 2 * (index_t(task) * p.parts + part);
    for (int i = 0; i < 2; ++i) sums[i] += of_part[i];
  }
  block_sum(sums, shared_memory<double>());
  if (threadIdx.x == 0) put_value<Accuracy>(p, task, sums);
}

template <class S, class Loss>
FM_KERNEL void __launch_bounds__(kThreads, 1) loss_hessian_kernel(const LossParams<S> p) {
  await_previous_kernels();
  const index_t thread = index_t(blockIdx.x) * blockDim.x + threadIdx.x, n = thread / p.lanes;
  const bool inside = n < index_t(p.tasks) * p.samples;
  const index_t row = n * p.outputs;
  if constexpr (Loss::kByLanes) {
    const SampleLanes at{int(thread % p.lanes), p.lanes, inside ? p.outputs : 0};
    Loss::hessian(p, at, p.z + row, p.tz + row, p.tdz + row);
  } else if (inside) {
    Loss::hessian(p, n, p.z + row, p.tz + row, p.tdz + row);
  }
}

template <class S>
LossParams<S> params_of(const LossArgs<S>& a, const Exec& exec) {
  const index_t parts = loss_parts(a.samples);
  return {a.z,
          a.tz,
          a.target,
          a.dz,
          a.tdz,
          a.value,
          a.accuracy,
          a.value_stride,
          static_cast<double*>(exec.scratch),
          a.scale,
          int(a.tasks),
          int(a.samples),
          int(a.outputs),
          int(parts),
          int(parts > 1 ? kLossBlock : a.samples)};
}

template <class Loss, class S>
void run_value(const LossArgs<S>& a, const Exec& exec) {
  constexpr std::size_t kShared = 2 * kWarp * sizeof(double);
  const LossParams<S> p = params_of(a, exec);
  launch((loss_value_kernel<S, Loss>), unsigned(a.tasks * p.parts), kThreads, kShared, exec, p);
  if (!p.value || p.parts == 1) return;
  launch((loss_parts_kernel<S, Loss::kAccuracy>), unsigned(a.tasks), kThreads, kShared, exec, p);
}

template <class Loss, class S>
void run_hessian(const LossArgs<S>& a, const Exec& exec) {
  LossParams<S> p = params_of(a, exec);
  while (Loss::kByLanes && p.lanes < p.outputs && p.lanes < int(kWarp)) p.lanes *= 2;
  launch((loss_hessian_kernel<S, Loss>), flat_blocks(a.tasks * a.samples * p.lanes, "loss"),
         kThreads, 0, exec, p);
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
