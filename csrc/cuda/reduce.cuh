// Sums and maxima over a warp or a block, in an order that is always the same.
//
//   warp    lanes in pairs: distance 16, 8, 4, 2, 1; every lane gets the same bits, since a
//           floating-point sum of two does not depend on which is first
//   block   first each warp, then the warps' results like a warp
//
// The block forms need `partial`, shared memory of kWarp elements per value, and give every thread
// the result; they begin and end with a barrier, so `partial` is free before and after.
#pragma once

#include "cuda/launch.h"

namespace FM_CUDA {

struct Sum {
  template <class S>
  static FM_DEVICE S join(S a, S b) {
    return a + b;
  }
};

struct Max {
  template <class S>
  static FM_DEVICE S join(S a, S b) {
    return a < b ? b : a;
  }
};

template <class Op, class S>
FM_DEVICE S warp_reduce(S v) {
  FM_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    v = Op::join(v, warp_shuffle_xor(v, distance));
  }
  return v;
}

template <class S>
FM_DEVICE S warp_sum(S v) {
  return warp_reduce<Sum>(v);
}

template <class S>
FM_DEVICE S warp_max(S v) {
  return warp_reduce<Max>(v);
}

// N values at once; partial [N, kWarp].
template <class Op, class S, int N>
FM_DEVICE void block_reduce(S (&v)[N], S* partial) {
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const int warps = int(blockDim.x / kWarp);
  FM_UNROLL
  for (int i = 0; i < N; ++i) v[i] = warp_reduce<Op>(v[i]);
  __syncthreads();
  if (lane == 0) {
    FM_UNROLL
    for (int i = 0; i < N; ++i) partial[i * int(kWarp) + warp] = v[i];
  }
  __syncthreads();
  // Lanes beyond the warps repeat them, a maximum stays; a sum takes zeros.
  FM_UNROLL
  for (int i = 0; i < N; ++i) {
    const S* of_warps = partial + i * int(kWarp);
    S mine = of_warps[lane < warps ? lane : 0];
    if constexpr (std::is_same_v<Op, Sum>) mine = lane < warps ? mine : S(0);
    v[i] = warp_reduce<Op>(mine);
  }
  __syncthreads();
}

template <class S, int N>
FM_DEVICE void block_sum(S (&v)[N], S* partial) {
  block_reduce<Sum>(v, partial);
}

template <class S>
FM_DEVICE S block_sum(S v, S* partial) {
  S values[1] = {v};
  block_reduce<Sum>(values, partial);
  return values[0];
}

template <class S>
FM_DEVICE S block_max(S v, S* partial) {
  S values[1] = {v};
  block_reduce<Max>(values, partial);
  return values[0];
}

}  // namespace FM_CUDA
