// Batch norm over the samples and pixels of a channel (always batch statistics), with an optional
// ReLU behind it: row sweeps of norm.cuh, whose opening says how they run and what is saved.
//
//   forward            sums of x and x^2, centred;           y
//   backward           sums of dz and dz xhat: db, dg;       dx
//   tangent_forward    sums of tx and tx xhat;               ty
//   tangent_backward   sums of tdz and (dz xhat)': tdb, tdg; tdx
//
// dz is dy where the ReLU lets it pass. Each pass reads its inputs twice and writes its output
// once; normalised values are computed anew from x instead of kept.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/norm_launch.cuh"

namespace FM_CUDA {
namespace {

// Both sweeps of the last pass are over rows here, which takes some 87 registers.
template <class S, int W, NormPass P>
FM_KERNEL void __launch_bounds__(kNormBlock<S, W>,
                                 P == NormPass::tangent_backward ? 1 : kNormBlocks<S, W, P>)
    batch_norm_kernel(const NormParams<S> p) {
  await_previous_kernels();
  norm_pass<S, W, P, RowSweep<S, W, P>, RowSweep<S, W, P>>(p);
}

template <NormPass P, class S>
void run(const char* name, const LayerArgs<S>& a, const NormRows<S>& rows, S* dw,
         const Exec& exec) {
  NormParams<S> p = norm_params(a, dw, exec);
  const index_t count = a.samples * a.desc->in.pixels();
  p.rows = rows;
  p.rows.x = a.x;
  p.rows.x_stride = p.rows.out_stride = a.samples * a.desc->in.size();
  p.sum_items = P == NormPass::tangent_forward && !a.tx ? 0 : int(count);
  p.map_items = int(count);
  const bool packs = on_packs({rows.tx, rows.dy, rows.tdy, rows.out, a.x});
  run_norm(name, batch_norm_kernel<S, kPack<S>, P>, batch_norm_kernel<S, 1, P>, p, a.tasks, count,
           count, packs, exec);
}

}  // namespace

template <class S>
void batch_norm_forward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.out = a.y;
  run<NormPass::forward, S>("batch_norm forward", a, rows, nullptr, exec);
}

template <class S>
void batch_norm_backward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.dy = a.dy;
  rows.out = a.dx;
  run<NormPass::backward>("batch_norm backward", a, rows, a.dw, exec);
}

template <class S>
void batch_norm_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.tx = a.tx;
  rows.out = a.ty;
  run<NormPass::tangent_forward, S>("batch_norm tangent_forward", a, rows, nullptr, exec);
}

template <class S>
void batch_norm_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  NormRows<S> rows;
  rows.tx = a.tx;
  rows.dy = a.dy;
  rows.tdy = a.tdy;
  rows.out = a.tdx;
  run<NormPass::tangent_backward>("batch_norm tangent_backward", a, rows, a.tdw, exec);
}

FM_INSTANTIATE_PASSES(batch_norm, float);
FM_INSTANTIATE_PASSES(batch_norm, double);

}  // namespace FM_CUDA
