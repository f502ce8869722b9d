// The main loop of bilinear products on tensor cores.
//
// A warp multiplies WarpM x WarpN of the tile by mma instructions, m16n8k8 of TF32 or m16n8k16 of
// bfloat16. Lane 4 g + t holds
//
//   a (g | g + 8, t | t + 4)    b (t | t + 4, g)    sums (g | g + 8, 2 t | 2 t + 1)
//
// and, since the steps of a sum may be renumbered if both operands are, a step of 16 in bfloat16 is
// read like two of 8. With split TF32 a factor is x = big + small, both TF32, and a product is
// small b + big small + big big: some 21 bits of fraction. Tensor cores cut sums off instead of
// rounding them, so that long ones would drift: they add up one tile (32 steps), and the tiles
// are added in registers.
#pragma once

#include "cuda/bilinear_tile.cuh"
#include "cuda/tile.cuh"

namespace FM_CUDA {

// Whether 8 rows x 4 steps, words these distances apart, lie in 32 different banks.
FM_HD constexpr bool in_different_banks(int row, int step) {
  std::uint32_t banks = 0;
  for (int i = 0; i < 32; ++i) banks |= std::uint32_t(1) << (i / 4 * row + i % 4 * step) % 32;
  return banks == 0xffffffffu;
}

template <int TileM, int TileN, int WarpM, int WarpN, int Stages, Arithmetic arithmetic>
struct TensorLoop {
  static constexpr int kTileM = TileM, kTileN = TileN, kTileK = 32;
  static constexpr int kStages = Stages, kMinBlocks = 3;
  static constexpr int kWarpsM = TileM / WarpM, kM = WarpM / 16, kN = WarpN / 8;
  static_assert(kWarpsM * (TileN / WarpN) * int(kWarp) == kProductThreads, "every warp has a part");
  static constexpr int kDepth = arithmetic == Arithmetic::bfloat16 ? 16 : 8;  // of an mma

  float sum[kM][kN][4] = {};

  static FM_DEVICE int group() { return int(threadIdx.x) % 32 / 4; }
  static FM_DEVICE int member() { return int(threadIdx.x) % 4; }
  static FM_DEVICE int warp_row() { return int(threadIdx.x) / 32 % kWarpsM * WarpM; }
  static FM_DEVICE int warp_column() { return int(threadIdx.x) / 32 / kWarpsM * WarpN; }

  // Fragments of eight steps as they are, from a pointer to the lane's first element.
  template <class L>
  static FM_DEVICE void load(const float* a, const float* b, float (&x)[kM][4], float (&w)[kN][2]) {
    static_assert(in_different_banks(L::kA, L::kDepthA), "a fragment of a is one access");
    static_assert(in_different_banks(L::kB, L::kDepthB), "a fragment of b is one access");
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[m][i] = a[(16 * m + i % 2 * 8) * L::kA + i / 2 * 4 * L::kDepthA];
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) w[n][i] = b[8 * n * L::kB + i * 4 * L::kDepthB];
    }
  }

  static FM_DEVICE void multiply_all(float (&d)[kM][kN][4], const unsigned (&a)[kM][4],
                                     const unsigned (&b)[kN][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if constexpr (arithmetic == Arithmetic::bfloat16) {
          mma_bf16(d[m][n], a[m], b[n]);
        } else {
          mma_tf32(d[m][n], a[m], b[n]);
        }
      }
    }
  }

  template <class L>
  static FM_DEVICE void step(const float* a, const float* b, float (&d)[kM][kN][4]) {
    float x[kM][4], w[kN][2];
    unsigned xs[kM][4], ws[kN][2];
    load<L>(a, b, x, w);
    if constexpr (arithmetic == Arithmetic::bfloat16) {
      float x8[kM][4], w8[kN][2];
      load<L>(a + 8 * L::kDepthA, b + 8 * L::kDepthB, x8, w8);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          xs[m][i] = pack_bf16(x[m][i], x[m][i + 2]);
          xs[m][i + 2] = pack_bf16(x8[m][i], x8[m][i + 2]);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        ws[n][0] = pack_bf16(w[n][0], w[n][1]);
        ws[n][1] = pack_bf16(w8[n][0], w8[n][1]);
      }
      multiply_all(d, xs, ws);
    } else if constexpr (arithmetic == Arithmetic::tf32) {
#pragma unroll
      for (int i = 0; i < kM * 4; ++i) xs[i / 4][i % 4] = to_tf32(x[i / 4][i % 4]);
#pragma unroll
      for (int i = 0; i < kN * 2; ++i) ws[i / 2][i % 2] = to_tf32(w[i / 2][i % 2]);
      multiply_all(d, xs, ws);
    } else {
      unsigned x_small[kM][4], w_small[kN][2];
#pragma unroll
      for (int i = 0; i < kM * 4; ++i) {
        split_tf32(x[i / 4][i % 4], xs[i / 4][i % 4], x_small[i / 4][i % 4]);
      }
#pragma unroll
      for (int i = 0; i < kN * 2; ++i) {
        split_tf32(w[i / 2][i % 2], ws[i / 2][i % 2], w_small[i / 2][i % 2]);
      }
      multiply_all(d, x_small, ws);
      multiply_all(d, xs, w_small);
      multiply_all(d, xs, ws);
    }
  }

  // Adds the products of the first `depth` steps of a tile; the rest of it is zero.
  template <class L>
  FM_DEVICE void multiply(const float* a, const float* b, int depth) {
    a += (warp_row() + group()) * L::kA + member() * L::kDepthA;
    b += (warp_column() + group()) * L::kB + member() * L::kDepthB;
    float tile[kM][kN][4] = {};
#pragma unroll
    for (int k = 0; k < kTileK; k += kDepth) {
      if (k >= depth) break;
      step<L>(a + k * L::kDepthA, b + k * L::kDepthB, tile);
    }
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) {
      sum[i / 4 / kN][i / 4 % kN][i % 4] += tile[i / 4 / kN][i / 4 % kN][i % 4];
    }
  }

  // Calls store(row, column, run) for all sums, those of adjacent columns together.
  template <class L, class Store>
  FM_DEVICE void for_each(const Store& store) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row() + 16 * m + 8 * half + group();
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float* s = sum[m][n] + 2 * half;
          store(row, warp_column() + 8 * n + 2 * member(), Run<2, float>{{s[0], s[1]}});
        }
      }
    }
  }
};

}  // namespace FM_CUDA
