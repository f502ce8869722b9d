// Appended parameter: y = (x, w) for every sample, so dx is the first part of dy and dw the sum of
// the rest over the samples of a task. Tangents are the same with tangents. Nothing is saved.
//
// The adjoint is one launch: blocks that copy, and a block for every task and appended element that
// sums in double, in fixed order.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/parameter_update.cuh"
#include "cuda/reduce.cuh"

namespace FM_CUDA {
namespace {

template <class S>
struct AppendParams {
  const S *x, *w;  // null: zero
  S* y;            // [T, N, out]
  index_t w_stride;
  unsigned items;  // T N out
  int samples, in, out;
};

template <class S>
FM_KERNEL void append_kernel(const AppendParams<S> p) {
  await_previous_kernels();
  const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= p.items) return;
  const unsigned row = item / unsigned(p.out), i = item % unsigned(p.out);
  if (i < unsigned(p.in)) {
    p.y[item] = p.x ? p.x[index_t(row) * p.in + i] : S(0);
  } else {
    p.y[item] = p.w ? p.w[row / unsigned(p.samples) * p.w_stride + i - p.in] : S(0);
  }
}

template <class S>
struct AppendAdjointParams {
  const S* dy;  // [T, N, out]
  S* dx;        // may be null
  ParameterUpdate<S> dw;
  unsigned items, copies;  // T N in, and the blocks that copy them
  int samples, in, out;
};

template <class S>
FM_KERNEL void append_adjoint_kernel(const AppendAdjointParams<S> p) {
  await_previous_kernels();
  if (blockIdx.x < p.copies) {
    const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= p.items) return;
    const unsigned row = item / unsigned(p.in), i = item % unsigned(p.in);
    p.dx[item] = p.dy[index_t(row) * p.out + i];
    return;
  }
  const int appended = p.out - p.in, block = int(blockIdx.x - p.copies);
  const int task = block / appended, i = block % appended;
  const S* dy = p.dy + index_t(task) * p.samples * p.out + p.in + i;
  double sum = 0;
  for (int n = int(threadIdx.x); n < p.samples; n += int(blockDim.x)) {
    sum += double(dy[index_t(n) * p.out]);
  }
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) p.dw.store(task, i, S(sum));
}

template <class S>
void run(const LayerArgs<S>& a, const S* x, const S* w, index_t w_stride, S* y, const Exec& exec) {
  const index_t items = a.tasks * a.samples * a.desc->out.size();
  const AppendParams<S> p{x,
                          w,
                          y,
                          w_stride,
                          unsigned(items),
                          int(a.samples),
                          int(a.desc->in.channels),
                          int(a.desc->out.channels)};
  launch(append_kernel<S>, flat_blocks(items, "append_parameter"), kThreads, 0, exec, p);
}

template <class S>
void run_adjoint(const LayerArgs<S>& a, const S* dy, S* dx, S* dw, const Exec& exec) {
  const index_t in = a.desc->in.channels, out = a.desc->out.channels;
  const index_t items = a.tasks * a.samples * in;
  const unsigned copies = dx ? flat_blocks(items, "append_parameter") : 0;
  const unsigned sums = dw ? unsigned(a.tasks * (out - in)) : 0;
  if (copies + sums == 0) return;
  const AppendAdjointParams<S> p{
      dy, dx, weight_update(a, dw), unsigned(items), copies, int(a.samples), int(in), int(out)};
  launch(append_adjoint_kernel<S>, copies + sums, kThreads, kWarp * sizeof(double), exec, p);
}

}  // namespace

template <class S>
void append_forward(const LayerArgs<S>& a, const Exec& exec) {
  run(a, a.x, a.w, a.w_stride, a.y, exec);
}

template <class S>
void append_backward(const LayerArgs<S>& a, const Exec& exec) {
  run_adjoint(a, a.dy, a.dx, a.dw, exec);
}

template <class S>
void append_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  run(a, a.tx, a.tw, a.tw_stride, a.ty, exec);
}

template <class S>
void append_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  run_adjoint(a, a.tdy, a.tdx, a.tdw, exec);
}

FM_INSTANTIATE_PASSES(append, float);
FM_INSTANTIATE_PASSES(append, double);

}  // namespace FM_CUDA
