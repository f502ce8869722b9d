// What becomes of finished sums of bilinear products: stores, and the weights' epilogue.
#pragma once

#include "cuda/bilinear_tile.cuh"

namespace FM_CUDA {

template <class S>
FM_DEVICE S scaled(S scale, const S* rate) {
  return rate ? scale * *rate : scale;
}

// Stores a run of finished sums at `index` of the result; `width` of them exist.
template <int N, class S, class Finish>
FM_DEVICE void store_run(S* result, index_t index, const Run<N, S>& run, int width, bool wide,
                         const Finish& finish) {
  if (wide) {
    if (width > 0) *reinterpret_cast<Run<N, S>*>(result + index) = finish(run, index, N);
  } else {
    const Run<N, S> done = finish(run, index, width);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < width) result[index + i] = done.v[i];
    }
  }
}

// The adjoint of the bias: columns of b, summed by two threads each, whatever the tile.
template <class S, int Columns>
struct ColumnSum {
  static constexpr int kParts = 2;
  S total = 0;

  template <int Depth, int Stride>
  FM_DEVICE void add(const S* b) {
    if (int(threadIdx.x) >= kParts * Columns) return;
    S sum = 0;
#pragma unroll
    for (int k = 0; k < Depth; k += kParts) {
      sum += b[(k + int(threadIdx.x) / Columns) * Stride + int(threadIdx.x) % Columns];
    }
    total += sum;
  }
  // For threads below Columns, which call it with all others of the block.
  FM_DEVICE S finish(S* shared) const {
    __syncthreads();
    if (int(threadIdx.x) < kParts * Columns) shared[threadIdx.x] = total;
    __syncthreads();
    if (int(threadIdx.x) >= Columns) return 0;
    return shared[threadIdx.x] + shared[threadIdx.x + Columns];
  }
};

// `weights`: base + scale * sum of a block's tile, from the tile's first row and column (m0, n0 of
// the feed) on. With `sums_bias`, all threads call it, and the adjoint of the bias is stored as
// well.
template <class L, class S, class Feed, class Loop>
FM_DEVICE void store_weights(const Product<S>& p, const Feed& feed, int group, int task,
                             const Loop& loop, bool sums_bias,
                             const ColumnSum<S, Loop::kTileN>& bias, S* shared) {
  const ProductShape& s = p.shape;
  S* result = p.result + task * p.result_stride + group * p.part_stride;
  const S* base = p.base ? p.base + task * p.base_stride : nullptr;
  const S scale = scaled(p.weight_scale, p.weight_rate);
  loop.template for_each<L>([&](int row, int column, const auto& run) {
    if (feed.m0 + row >= s.rows) return;
    store_run(result, index_t(feed.m0 + row) * s.columns + feed.n0 + column, run,
              s.columns - feed.n0 - column, p.wide_out, [&](auto v, index_t index, int width) {
                using R = decltype(v);
                constexpr int N = int(sizeof(v.v) / sizeof(S));
                R from{};
                if (base && p.wide_out) {
                  from = *reinterpret_cast<const R*>(base + index);
                } else if (base) {
#pragma unroll
                  for (int i = 0; i < N; ++i) {
                    if (i < width) from.v[i] = base[index + i];
                  }
                }
#pragma unroll
                for (int i = 0; i < N; ++i) v.v[i] = from.v[i] + scale * v.v[i];
                return v;
              });
  });
  if (sums_bias) {
    const S total = bias.finish(shared);
    const int column = feed.n0 + int(threadIdx.x);
    if (int(threadIdx.x) < Loop::kTileN && column < s.columns) {
      const index_t index = p.bias_offset + column;
      result[index] = (base ? base[index] : S(0)) + scaled(p.bias_scale, p.bias_rate) * total;
    }
  }
}

}  // namespace FM_CUDA
