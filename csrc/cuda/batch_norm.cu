// Batch norm over the samples and pixels of a channel (always batch statistics), with an optional
// ReLU behind it: row sweeps of norm.cuh, whose opening says how they run and what is saved.
//
//   forward            sums of x and x^2, centred;           y
//   backward           sums of dz and dz xhat: db, dg;       dx
//   tangent_forward    sums of tx and tx xhat;               ty
//   tangent_backward   sums of tdz and (dz xhat)': tdb, tdg; tdx
//
// dz is dy where the ReLU lets it pass. Each pass reads its inputs twice and writes its output
// once; normalised values are computed anew from x instead of kept. Where a mean over images
// follows (`above`), forward passes write that alone, and adjoints are read as it hands them down.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/norm_launch.cuh"

namespace FM_CUDA {
namespace {

constexpr unsigned kMostThreads = 2 * kNormThreads;  // of a block, with packs
template <class S, int W>
constexpr unsigned kRowBlock = W == 1 ? kNormBlock<S, 1> : kMostThreads;
// Of a multiprocessor. Both sweeps of the last pass are over rows, which takes some 90 registers.
template <class S, int W, NormPass P>
constexpr unsigned kRowBlocks = sizeof(S) == 4 && W > 1 && P != NormPass::tangent_backward ? 2 : 1;

template <class S, int W, NormPass P>
FM_KERNEL void __launch_bounds__(kRowBlock<S, W>, kRowBlocks<S, W, P>)
    batch_norm_kernel(const NormParams<S> p) {
  await_previous_kernels();
  norm_pass<S, W, P, RowSweep<S, W, P>, RowSweep<S, W, P>>(p);
}

template <class S, int W, NormPass P>
FM_KERNEL void __launch_bounds__(kRowBlock<S, W>, 1) batch_norm_mean_kernel(const NormParams<S> p) {
  await_previous_kernels();
  norm_pass<S, W, P, RowSweep<S, W, P, true>, RowSweep<S, W, P, true>>(p);
}

constexpr const char* kNames[][4] = {
    {"batch_norm forward", "batch_norm backward", "batch_norm tangent_forward",
     "batch_norm tangent_backward"},
    {"batch_norm_mean forward", "batch_norm_mean backward", "batch_norm_mean tangent_forward",
     "batch_norm_mean tangent_backward"}};

// The layer whose outputs are written, and whose outputs' adjoints are read.
template <class S>
const LayerArgs<S>& outer(const LayerArgs<S>& a) {
  return a.above ? *a.above : a;
}

template <NormPass P, class S>
void run(const LayerArgs<S>& a, const NormRows<S>& rows, S* dw, const Exec& exec) {
  constexpr bool kMapsOutputs = P == NormPass::forward || P == NormPass::tangent_forward;
  NormParams<S> p = norm_params(a, dw, exec);
  const index_t count = a.samples * a.desc->in.pixels();
  const index_t in = a.samples * a.desc->in.size();
  const index_t out = a.samples * outer(a).desc->out.size();
  p.rows = rows;
  p.rows.x = a.x;
  p.rows.x_stride = in;
  p.rows.dy_stride = out;
  p.rows.out_stride = kMapsOutputs ? out : in;
  p.rows.pixels = int(a.desc->in.pixels());
  p.sum_items = P == NormPass::tangent_forward && !a.tx ? 0 : int(count);
  p.map_items = int(a.above && kMapsOutputs ? a.samples : count);
  const bool packs = on_packs({rows.tx, rows.dy, rows.tdy, rows.out, a.x});
  const auto go = [&](auto wide, auto narrow) {
    run_norm(kNames[a.above != nullptr][int(P)], wide, narrow, p, a.tasks, count, count, packs,
             kMostThreads, exec);
  };
  if (a.above) {
    go(batch_norm_mean_kernel<S, kPack<S>, P>, batch_norm_mean_kernel<S, 1, P>);
  } else {
    go(batch_norm_kernel<S, kPack<S>, P>, batch_norm_kernel<S, 1, P>);
  }
}

}  // namespace

template <class S>
void batch_norm_forward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.out = outer(a).y;
  run<NormPass::forward, S>(a, rows, nullptr, exec);
}

template <class S>
void batch_norm_backward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.dy = outer(a).dy;
  rows.out = a.dx;
  run<NormPass::backward>(a, rows, a.dw, exec);
}

template <class S>
void batch_norm_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.tx = a.tx;
  rows.out = outer(a).ty;
  run<NormPass::tangent_forward, S>(a, rows, nullptr, exec);
}

template <class S>
void batch_norm_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.tx = a.tx;
  rows.dy = outer(a).dy;
  rows.tdy = outer(a).tdy;
  rows.out = a.tdx;
  run<NormPass::tangent_backward>(a, rows, a.tdw, exec);
}

FM_INSTANTIATE_PASSES(batch_norm, float);
FM_INSTANTIATE_PASSES(batch_norm, double);

}  // namespace FM_CUDA
