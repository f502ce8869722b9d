// The three products of a resident task, each for one operand pair or two, the second of a tangent.
//
//   columns  c[n, j] = sum_k a[n, k] b[k, j]   a: rows of samples; b: w along rows or along columns
//   dots     the same for few columns, by kDotLanes lanes a sample, which then hold the sum
//   update   w[i, o] = base[i, o] + factor sum_n x[n, i] d[n, o], and the bias as if x were 1
//
// A thread's tile of `columns` is kTileSamples samples of a column: it reads b by single elements,
// neighbouring lanes in neighbouring banks, and packs of a, the same for (nearly) all lanes of a
// warp. A tile of `update` is a pack of rows i of one column o. A sum is one chain of multiply-adds
// in ascending order (dots: one per lane, then lanes at distance 4, 2, 1), whatever runs beside.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/resident_layout.h"

namespace FM_CUDA {

constexpr int kDotLanes = 8, kDotsOfWarp = int(kWarp) / kDotLanes;

// b[k, j] = data[k * step + j * column]
template <class S>
struct Factor {
  const S* data;  // null: zero
  int step, column;
};

// sum[m] += sum_k a[m, k] b[k]
template <class S>
FM_DEVICE void accumulate(S (&sum)[kTileSamples], const S* a, int a_row, const S* b, int b_step,
                          int depth) {
  constexpr int W = kPack<S>;
  int k = 0;
  FM_UNROLL_BY_TWO
  for (; k + W <= depth; k += W) {
    Pack<S, W> left[kTileSamples];
    S right[W];
    FM_UNROLL
    for (int i = 0; i < W; ++i) right[i] = b[(k + i) * b_step];
    FM_UNROLL
    for (int m = 0; m < kTileSamples; ++m) left[m] = load<W>(a + m * a_row + k);
    FM_UNROLL
    for (int i = 0; i < W; ++i) {
      FM_UNROLL
      for (int m = 0; m < kTileSamples; ++m) sum[m] += left[m].at[i] * right[i];
    }
  }
  FM_NO_UNROLL
  for (; k < depth; ++k) {
    const S right = b[k * b_step];
    FM_UNROLL
    for (int m = 0; m < kTileSamples; ++m) sum[m] += a[m * a_row + k] * right;
  }
}

// Calls put(first, j, sums) for tiles that cover all samples and columns, where
//
//   sums = scale a0 b0 + start(j) + a1 b1        the second pair may be missing (a null a1)
template <class S, class Start, class Put>
FM_DEVICE void columns(int samples, const Divisor& width, int depth, int a_row, const S* a0,
                       const Factor<S>& b0, S scale, const S* a1, const Factor<S>& b1,
                       Start&& start, Put&& put) {
  const int count = (samples + kTileSamples - 1) / kTileSamples * int(width.by);
  FM_NO_UNROLL
  for (int item = int(threadIdx.x); item < count; item += int(kResidentThreads)) {
    const int tile = width.quotient(item), j = item - tile * int(width.by);
    const int first = tile * kTileSamples;
    S sum[kTileSamples] = {};
    accumulate(sum, a0 + first * a_row, a_row, b0.data + j * b0.column, b0.step, depth);
    const S begin = start(j);
    FM_UNROLL
    for (int m = 0; m < kTileSamples; ++m) sum[m] = sum[m] * scale + begin;
    if (a1) accumulate(sum, a1 + first * a_row, a_row, b1.data + j * b1.column, b1.step, depth);
    put(first, j, sum);
  }
}

// The lanes of a sample get scale a0 b0 + a1 b1 of column j. All lanes of a warp call it.
template <class S>
FM_DEVICE S dot(int depth, const S* a0, const Factor<S>& b0, S scale, const S* a1,
                const Factor<S>& b1, int j) {
  const int lane = int(threadIdx.x) % kDotLanes;
  S sum = S(0), second = S(0);
  for (int k = lane; k < depth; k += kDotLanes) {
    sum += a0[k] * b0.data[k * b0.step + j * b0.column];
    if (a1) second += a1[k] * b1.data[k * b1.step + j * b1.column];
  }
  sum = sum * scale + second;
  FM_UNROLL
  for (int distance = kDotLanes / 2; distance > 0; distance /= 2) {
    sum += warp_shuffle_xor(sum, distance);
  }
  return sum;
}

// scale a0 b0 + a1 b1 over few columns, by one lane; the second pair may be missing (a null a1).
template <class S>
FM_DEVICE S short_dot(int depth, const S* a0, const S* b0, S scale, const S* a1, const S* b1) {
  S sum = S(0);
  FM_NO_UNROLL
  for (int k = 0; k < depth; ++k) sum += a0[k] * b0[k];
  sum *= scale;
  FM_NO_UNROLL
  for (int k = 0; a1 && k < depth; ++k) sum += a1[k] * b1[k];
  return sum;
}

// What is done with a gradient or product: out = base + factor * rate * it.
template <class S>
struct Target {
  S* out;         // a set of parameters
  const S* base;  // a set, `out` itself, or null: zero
  S factor;
  const S* rates;  // [tensors], null: 1
  FM_DEVICE S scale(int segment) const { return rates ? factor * rates[segment] : factor; }
  FM_DEVICE void put(int at, S scale, S sum) const {
    out[at] = base ? base[at] + scale * sum : scale * sum;
  }
};

// From pairs (x0, d0) and (x1, d1), the second may be missing (a null x1); the bias from d0 alone.
// `turn`: which thread begins, so that a small update and another product meet different threads.
template <class S>
FM_DEVICE void update(const ResidentStage<S>& s, int samples, int turn, const S* x0, const S* d0,
                      const S* x1, const S* d1, const Target<S>& target) {
  constexpr int W = kPack<S>;
  const int packs = (s.inputs() + W - 1) / W * s.outputs();
  const int count = packs + (s.has_bias() ? s.outputs() : 0);
  FM_NO_UNROLL
  for (int item = turn; item < count; item += int(kResidentThreads)) {
    if (item >= packs) {
      const int o = item - packs;
      S sum = S(0);
      FM_UNROLL_BY_FOUR
      for (int n = 0; n < samples; ++n) sum += d0[n * s.row + o];
      target.put(s.b + o, target.scale(s.segment + 1), sum);
      continue;
    }
    const int pack = s.out.quotient(item), o = item - pack * s.outputs(), i = pack * W;
    S sum[W] = {};
    const auto add = [&](const S* x, const S* d) {
      FM_UNROLL_BY_FOUR
      for (int n = 0; n < samples; ++n) {
        const Pack<S, W> left = load<W>(x + n * s.x_row + i);
        const S right = d[n * s.row + o];
        FM_UNROLL
        for (int w = 0; w < W; ++w) sum[w] += left.at[w] * right;
      }
    };
    add(x0, d0);
    if (x1) add(x1, d1);
    const S scale = target.scale(s.segment);
    FM_UNROLL
    for (int w = 0; w < W; ++w) {
      if (i + w < s.inputs()) target.put(s.w + (i + w) * s.w_row + o, scale, sum[w]);
    }
  }
}

}  // namespace FM_CUDA
