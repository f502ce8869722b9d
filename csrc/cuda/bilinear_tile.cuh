// Tiles of bilinear products in shared memory, and the scalar main loop over them.
//
// An operand's tile keeps the order of global memory, so that it is copied 16 bytes at a time:
// [m][k] or [k][m], [k][n] or [n][k]. Rows are padded. With k innermost they are a quarter-warp's
// 16 bytes longer than a multiple of 128 bytes: 8 rows x 4 steps of an mma fragment, and 8 rows x
// 16 bytes of the scalar loop, then fall into different banks. With m or n innermost they are 8 or
// 24 words beyond a multiple of 32: 4 steps x 8 rows of a fragment fall into different banks.
//
// Every element of a result is one chain over k, in an order that no tile shape changes.
#pragma once

#include "cuda/bilinear.h"

namespace FM_CUDA {

constexpr int kProductThreads = 128;  // of a block

// Adjacent values that are moved together.
template <int N, class S>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Run {
  S v[N];
};

template <class S, Form form, int TileM, int TileN, int TileK>
struct TileLayout {
  static constexpr bool kDepthInnerA = form != Form::weights, kDepthInnerB = form == Form::inputs;
  static constexpr int kLong = TileK + 16 / int(sizeof(S));
  FM_HD static constexpr int spread(int n) { return n % 16 == 8 ? n : n + 8; }
  static constexpr int kStrideA = kDepthInnerA ? kLong : spread(TileM);
  static constexpr int kStrideB = kDepthInnerB ? kLong : spread(TileN);
  static constexpr int kSizeA = kStrideA * (kDepthInnerA ? TileM : TileK);
  static constexpr int kSizeB = kStrideB * (kDepthInnerB ? TileN : TileK);
  static constexpr int kStage = kSizeA + kSizeB;
  // elements between neighbours along m, n and k
  static constexpr int kA = kDepthInnerA ? kStrideA : 1, kDepthA = kDepthInnerA ? 1 : kStrideA;
  static constexpr int kB = kDepthInnerB ? kStrideB : 1, kDepthB = kDepthInnerB ? 1 : kStrideB;
};

// A thread holds ThreadM x ThreadN sums. Its rows (columns) are adjacent where they are in shared
// memory, else a warp's neighbours take neighbouring ones.
template <class S, int TileM, int TileN, int ThreadM, int ThreadN, int Stages>
struct ScalarLoop {
  static constexpr int kTileM = TileM, kTileN = TileN, kTileK = 128 / int(sizeof(S));
  static constexpr int kStages = Stages, kMinBlocks = sizeof(S) == 4 ? 3 : 1;
  static constexpr int kAcross = TileN / ThreadN, kDown = TileM / ThreadM;
  static_assert(kAcross * kDown == kProductThreads, "every thread has sums");

  S sum[ThreadM][ThreadN] = {};

  static FM_DEVICE int across() { return int(threadIdx.x) % kAcross; }
  static FM_DEVICE int down() { return int(threadIdx.x) / kAcross; }

  // N values along one dimension for each of V steps: at[v][i]
  template <bool DepthInner, int V, int N, int Threads, int Stride>
  static FM_DEVICE void load(const S* tile, int thread, int k, S (&at)[V][N]) {
    if constexpr (DepthInner) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int row = i * Threads + thread;
        const auto run = *reinterpret_cast<const Run<V, S>*>(tile + row * Stride + k);
#pragma unroll
        for (int v = 0; v < V; ++v) at[v][i] = run.v[v];
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const auto run = *reinterpret_cast<const Run<N, S>*>(tile + (k + v) * Stride + thread * N);
#pragma unroll
        for (int i = 0; i < N; ++i) at[v][i] = run.v[i];
      }
    }
  }

  // Adds the products of the first `depth` steps of a tile; the rest of it is zero.
  template <class L>
  FM_DEVICE void multiply(const S* a, const S* b, int depth) {
    constexpr int V = 16 / int(sizeof(S));
#pragma unroll
    for (int k = 0; k < kTileK; k += V) {
      if (k >= depth) break;
      S x[V][ThreadM], w[V][ThreadN];
      load<L::kDepthInnerA, V, ThreadM, kDown, L::kStrideA>(a, down(), k, x);
      load<L::kDepthInnerB, V, ThreadN, kAcross, L::kStrideB>(b, across(), k, w);
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < ThreadM; ++i) {
#pragma unroll
          for (int j = 0; j < ThreadN; ++j) sum[i][j] += x[v][i] * w[v][j];
        }
      }
    }
  }

  // Calls store(row, column, run) for all sums, those of adjacent columns together.
  template <class L, class Store>
  FM_DEVICE void for_each(const Store& store) const {
#pragma unroll
    for (int i = 0; i < ThreadM; ++i) {
      const int row = L::kDepthInnerA ? i * kDown + down() : down() * ThreadM + i;
      if constexpr (L::kDepthInnerB) {
#pragma unroll
        for (int j = 0; j < ThreadN; ++j) {
          store(row, j * kAcross + across(), Run<1, S>{{sum[i][j]}});
        }
      } else {
        Run<ThreadN, S> run;
#pragma unroll
        for (int j = 0; j < ThreadN; ++j) run.v[j] = sum[i][j];
        store(row, across() * ThreadN, run);
      }
    }
  }
};

}  // namespace FM_CUDA
