// Coefficients of batch norm's channels, and where a block keeps them: in shared memory.
//
//   y  = scale xhat + shift, xhat = (x - mean) r        and its tangents, math/normalize.h
//   table [channels, kCount], a pack skipped behind every fourth channel
//
// Sweeps read them for every item: in registers, eleven of four channels would leave room for half
// the threads of a multiprocessor, and memory waits for threads. Before the forward pass has found
// a mean, the channel's first value stands in its place and centres the sums.
#pragma once

#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "math/normalize.h"

namespace FM_CUDA {

// Coefficients of a channel; what a pass doesn't use is never loaded. Before the forward pass has
// found a mean, it is the channel's first value.
template <class S>
struct Channel {
  static constexpr int kCount = 12;
  S mean, r, scale, shift, tscale, tshift, tmean, q, m1, m2, tm1, tm2;
  bool relu;

  FM_DEVICE S normalized(S x) const { return math::normalized(x, mean, r); }
  FM_DEVICE S output(S xhat) const { return scale * xhat + shift; }
  // v where the ReLU lets it pass, which as in PyTorch includes NaN
  FM_DEVICE S masked(S xhat, S v) const { return relu && output(xhat) <= S(0) ? S(0) : v; }
  FM_DEVICE S tangent(S tx, S xhat) const { return math::normalize_tangent(tx, xhat, r, tmean, q); }
};

// Coefficients of a block's channels in shared memory: [channels, kCount], a pack skipped behind
// every fourth channel, so that eight threads of four channels each meet different banks.
template <class S>
struct ChannelTable {
  static constexpr int kCount = Channel<S>::kCount;
  S* at;
  bool relu;

  FM_HD static constexpr int offset(int i) { return i * kCount + i / 4 * 4; }
  FM_DEVICE void put(int i, const Channel<S>& k) const {
    const S values[] = {k.mean,  k.r, k.scale, k.shift, k.tscale, k.tshift,
                        k.tmean, k.q, k.m1,    k.m2,    k.tm1,    k.tm2};
    FM_UNROLL
    for (int v = 0; v < kCount; ++v) at[offset(i) + v] = values[v];
  }
  // use(w, channel i + w) for W channels, of which one at a time is in registers: the fence keeps
  // the compiler from loading it earlier.
  template <int W, class Use>
  FM_DEVICE void for_each(int i, const Use& use) const {
    constexpr int N = kPack<S>;
    FM_UNROLL
    for (int w = 0; w < W; ++w) {
      FM_KEEP_ORDER();
      S v[kCount];
      FM_UNROLL
      for (int n = 0; n < kCount; n += N) {
        const Pack<S, N> pack = load<N>(at + offset(i + w) + n);
        FM_UNROLL
        for (int m = 0; m < N; ++m) v[n + m] = pack.at[m];
      }
      use(w, Channel<S>{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11],
                        relu});
    }
  }
};

}  // namespace FM_CUDA
