// The sweeps that batch norm and its pooled form share. Formulas in math/normalize.h.
//
// A task's data are R rows of C channels. A block takes `lanes` packs of channels, one a thread,
// and a part of the rows, blockDim / lanes at a time, so that accesses are whole lines. A pass is
//
//   sums   two sums per channel. A thread adds up to kRun terms in S before they join a sum in
//          double; a tree over the block's threads follows, then the parts in ascending order
//   map    every block adds up the parts' sums anew, gets the channels' statistics from them, and
//          maps its share of the items; block 0 stores statistics as well and, in the end,
//          parameter adjoints or what they are to update
//
// in two launches, or in one where a block can take all rows of its channels. What is summed hangs
// on the shapes of one task alone, so a task has the same bits in any batch. Sums of x are taken
// less the channel's first value, which keeps the one-sweep variance accurate.
// saved [6, C] per task: mean, r, s1 = mean(dz), s2 = mean(dz xhat), tmean, q, with dz the adjoint
// behind the ReLU's mask, so that m1 = g s1 and m2 = g s2.
#pragma once

#include "cuda/channel_table.cuh"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/parameter_update.cuh"
#include "program/layer.h"

namespace FM_CUDA {

enum class NormPass { forward, backward, tangent_forward, tangent_backward };

// Data of row sweeps, per task: rows of C channels, and the distance from task to task.
template <class S>
struct NormRows {
  const S *x = nullptr, *tx = nullptr, *dy = nullptr, *tdy = nullptr;
  S* out = nullptr;
  index_t x_stride = 0, dy_stride = 0, out_stride = 0;  // of x and tx; of dy and tdy
  int pixels = 1;  // of an image, where the outputs are means over images
};

template <class S>
struct NormParams {
  NormRows<S> rows;
  int sum_items, map_items;  // of a task
  int channels, lanes;
  int parts;        // of the summed items
  bool sums, maps;  // what this launch does: the parts' sums, the rest, or all with one part
  bool relu;
  double count, eps;  // elements that share their statistics
  const S* first;     // x, whose first row centres the sums
  index_t first_stride;
  const S *scale, *tscale, *shift, *tshift;  // [C], null where absent or not perturbed
  index_t w_stride, tw_stride;
  S* saved;
  index_t saved_stride;
  double* partial;  // [T, parts, 2, C] in scratch memory, tasks `partial_stride` apart
  index_t partial_stride;
  ParameterUpdate<S> dscale, dshift;  // parameter adjoints or their tangents
  S* kept_tscale;                     // [C] in scratch memory; null: none to be kept
  index_t kept_stride;
};

constexpr int kRun = 64;
constexpr int kChunk = 16;              // parts that a thread adds up
constexpr unsigned kNormThreads = 256;  // that take packs; single elements take as many more

template <class S, int W>
constexpr unsigned kNormBlock = kNormThreads * (kPack<S> / W);
// Of a multiprocessor in single precision, whose 65536 registers they share: tangents of packs take
// up to 80 a thread, all else up to 64.
template <class S, int W, NormPass P>
constexpr unsigned kNormBlocks = sizeof(S) > 4 || W == 1                             ? 1
                                 : P == NormPass::forward || P == NormPass::backward ? 4
                                                                                     : 3;

// From what earlier passes saved and, if not null, the two statistics that this one has found.
template <NormPass P, class S>
FM_DEVICE Channel<S> channel_of(const NormParams<S>& p, index_t task, int c, const S* found) {
  const S* saved = p.saved + task * p.saved_stride + c;
  const auto of = [=](const S* v, index_t stride, S otherwise) {
    return v ? v[task * stride + c] : otherwise;
  };
  Channel<S> k{};
  k.relu = p.relu;
  k.scale = of(p.scale, p.w_stride, S(1));
  k.shift = of(p.shift, p.w_stride, S(0));
  if constexpr (P == NormPass::forward) {
    k.mean = found ? found[0] : p.first[task * p.first_stride + c];
    if (found) k.r = found[1];
    return k;
  }
  k.mean = saved[0];
  k.r = saved[p.channels];
  if constexpr (P == NormPass::backward) {
    if (found) k.m1 = k.scale * found[0], k.m2 = k.scale * found[1];
    return k;
  }
  k.tscale = of(p.tscale, p.tw_stride, S(0));
  k.tshift = of(p.tshift, p.tw_stride, S(0));
  if constexpr (P == NormPass::tangent_forward) {
    if (found) k.tmean = found[0], k.q = found[1];
    return k;
  }
  k.tmean = saved[4 * p.channels];
  k.q = saved[5 * p.channels];
  if (found) {
    const S s1 = saved[2 * p.channels], s2 = saved[3 * p.channels];
    k.m1 = k.scale * s1;
    k.m2 = k.scale * s2;
    k.tm1 = k.scale * found[0] + k.tscale * s1;
    k.tm2 = k.scale * found[1] + k.tscale * s2;
  }
  return k;
}

// The statistics of channel c from its two sums; `owner` stores them.
template <NormPass P, class S>
FM_DEVICE void find_statistics(const NormParams<S>& p, index_t task, int c, double sum1,
                               double sum2, bool owner, S* found) {
  S* saved = p.saved + task * p.saved_stride + c;
  const double mean1 = sum1 / p.count, mean2 = sum2 / p.count;
  S first = S(mean1), second = S(mean2);
  if constexpr (P == NormPass::forward) {
    // no maximum with zero: a NaN in the data must reach the output
    const double variance = mean2 - mean1 * mean1;
    first = S(double(p.first[task * p.first_stride + c]) + mean1);
    second = S(1.0 / std::sqrt((variance < 0 ? 0.0 : variance) + p.eps));
  } else if constexpr (P == NormPass::tangent_forward) {
    second = S(double(saved[p.channels]) * mean2);
  }
  found[0] = first;
  found[1] = second;
  if (!owner) return;
  if constexpr (P != NormPass::tangent_backward) {
    constexpr int row = 2 * int(P);
    saved[row * p.channels] = first;
    saved[(row + 1) * p.channels] = second;
  }
}

// What one element adds to the sums of a pass.
template <NormPass P, class S>
FM_DEVICE void add_terms(const Channel<S>& k, S x, S tx, S dy, S tdy, S& sum1, S& sum2) {
  if constexpr (P == NormPass::forward) {
    const S v = x - k.mean;
    sum1 += v;
    sum2 += v * v;
    return;
  }
  const S xhat = k.normalized(x);
  if constexpr (P == NormPass::backward) {
    const S dz = k.masked(xhat, dy);
    sum1 += dz;
    sum2 += dz * xhat;
  } else if constexpr (P == NormPass::tangent_forward) {
    sum1 += tx;
    sum2 += tx * xhat;
  } else {
    const S dz = k.masked(xhat, dy), tdz = k.masked(xhat, tdy);
    sum1 += tdz;
    sum2 += tdz * xhat + dz * k.tangent(tx, xhat);
  }
}

// Adjoint of x, or its tangent, where h reaches the normalised value and th is h's tangent.
template <NormPass P, class S>
FM_DEVICE S input_adjoint(const Channel<S>& k, S x, S tx, S h, S th) {
  const S xhat = k.normalized(x);
  const S dx = math::normalize_backward(h, xhat, k.r, k.m1, k.m2);
  if constexpr (P == NormPass::backward) return dx;
  return math::normalize_tangent_backward(dx, th, xhat, k.tangent(tx, xhat), k.r, k.q, k.m2, k.tm1,
                                          k.tm2);
}

// h and th from the adjoint of the output and its tangent, at the x that the output came from.
template <NormPass P, class S>
FM_DEVICE void scaled_adjoint(const Channel<S>& k, S x, S dy, S tdy, S& h, S& th) {
  const S xhat = k.normalized(x), dz = k.masked(xhat, dy);
  h = k.scale * dz;
  if constexpr (P == NormPass::tangent_backward) {
    th = k.scale * k.masked(xhat, tdy) + k.tscale * dz;
  }
}

// Sweeps over rows. `item` is a row of the task. With `Mean`, outputs and their adjoints are of
// means over images, and where outputs are mapped an item is a sample.
template <class S, int W, NormPass P, bool Mean = false>
struct RowSweep {
  static constexpr bool kAdjoint = P == NormPass::backward || P == NormPass::tangent_backward;
  static constexpr bool kTangent =
      P == NormPass::tangent_forward || P == NormPass::tangent_backward;
  const NormParams<S>& p;
  index_t in, dy, out;  // offsets of the channel: of x and tx, of dy and tdy, of the result
  const ChannelTable<S>& table;
  int channel;  // of the table

  FM_DEVICE RowSweep(const NormParams<S>& params, index_t task, int c, const ChannelTable<S>& t,
                     int i)
      : p(params), table(t), channel(i) {
    in = task * p.rows.x_stride + c;
    dy = task * p.rows.dy_stride + c;
    out = task * p.rows.out_stride + c;
  }
  FM_DEVICE S share() const { return S(1) / S(p.rows.pixels); }

  struct Point {
    Pack<S, W> x, tx{}, dy{}, tdy{};
  };
  FM_DEVICE Point at(int item) const {
    const index_t i = in + index_t(item) * p.channels;
    Point v;
    v.x = load<W>(p.rows.x + i);
    if constexpr (kTangent) v.tx = load_or_zero<W>(p.rows.tx, i);
    if constexpr (kAdjoint) v.dy = adjoint(p.rows.dy, item);
    if constexpr (P == NormPass::tangent_backward) v.tdy = adjoint(p.rows.tdy, item);
    return v;
  }
  FM_DEVICE Pack<S, W> adjoint(const S* of, int item) const {
    const int row = Mean ? int(unsigned(item) / unsigned(p.rows.pixels)) : item;
    Pack<S, W> v = load<W>(of + dy + index_t(row) * p.channels);
    if constexpr (Mean) {
      FM_UNROLL
      for (int w = 0; w < W; ++w) v.at[w] *= share();
    }
    return v;
  }

  FM_DEVICE void sum(int item, S (&sum1)[W], S (&sum2)[W]) const {
    const Point v = at(item);
    table.template for_each<W>(channel, [&](int w, const Channel<S>& k) {
      add_terms<P>(k, v.x.at[w], v.tx.at[w], v.dy.at[w], v.tdy.at[w], sum1[w], sum2[w]);
    });
  }

  FM_DEVICE void map(int item) const {
    constexpr bool kSums = Mean && !kAdjoint;
    const int each = kSums ? p.rows.pixels : 1;
    Pack<S, W> result{};
    FM_NO_UNROLL
    for (int i = item * each; i < (item + 1) * each; ++i) {
      const Point v = at(i);
      table.template for_each<W>(channel, [&](int w, const Channel<S>& k) {
        const S one = element(k, v.x.at[w], v.tx.at[w], v.dy.at[w], v.tdy.at[w]);
        result.at[w] = kSums ? result.at[w] + one : one;
      });
    }
    if constexpr (kSums) {
      FM_UNROLL
      for (int w = 0; w < W; ++w) result.at[w] *= share();
    }
    store(p.rows.out + out + index_t(item) * p.channels, result);
  }

  FM_DEVICE static S element(const Channel<S>& k, S x, S tx, S dy, S tdy) {
    if constexpr (kAdjoint) {
      S h = 0, th = 0;
      scaled_adjoint<P>(k, x, dy, tdy, h, th);
      return input_adjoint<P>(k, x, tx, h, th);
    }
    const S xhat = k.normalized(x);
    if constexpr (P == NormPass::forward) {
      const S y = k.output(xhat);
      return k.relu && y < S(0) ? S(0) : y;
    }
    return k.masked(xhat, k.scale * k.tangent(tx, xhat) + k.tscale * xhat + k.tshift);
  }
};

// One pass. `Sum` and `Map` are sweeps: made for a pack of channels, then called item by item.
template <class S, int W, NormPass P, class Sum, class Map, class Params>
FM_DEVICE void norm_pass(const Params& p) {
  const int lane = int(threadIdx.x) % p.lanes, row = int(threadIdx.x) / p.lanes;
  const int rows = int(blockDim.x) / p.lanes, width = p.lanes * W;
  const index_t task = blockIdx.z;
  const int from = int(blockIdx.y) * width, c = from + lane * W;
  const bool inside = c < p.channels;
  double* sums = shared_memory<double>();  // [rows, 2, width]; in the end the sums are row 0
  const int chunks = p.sums ? rows : (p.parts + kChunk - 1) / kChunk;
  const ChannelTable<S> table{reinterpret_cast<S*>(sums + chunks * 2 * width), p.relu};
  const int own = min_of(width, p.channels - from);
  const auto cell = [=](int r, int which, int w) {
    return ((r * 2 + which) * W + w) * p.lanes + lane;
  };

  if (p.sums) {
    for (int i = int(threadIdx.x); i < own; i += int(blockDim.x)) {
      table.put(i, channel_of<P>(p, task, from + i, static_cast<const S*>(nullptr)));
    }
    __syncthreads();
    FM_UNROLL
    for (int w = 0; w < W; ++w) sums[cell(row, 0, w)] = sums[cell(row, 1, w)] = 0;
    if (inside) {
      const Sum sweep(p, task, c, table, lane * W);
      const int end = int(index_t(p.sum_items) * (blockIdx.x + 1) / p.parts);
      int i = int(index_t(p.sum_items) * blockIdx.x / p.parts) + row;
      while (i < end) {
        const int stop = min_of(end, i + kRun * rows);
        S sum1[W] = {}, sum2[W] = {};
        FM_NO_UNROLL
        for (; i < stop; i += rows) sweep.sum(i, sum1, sum2);
        FM_UNROLL
        for (int w = 0; w < W; ++w) {
          sums[cell(row, 0, w)] += double(sum1[w]);
          sums[cell(row, 1, w)] += double(sum2[w]);
        }
      }
    }
    for (int half = rows / 2; half > 0; half /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < half * 2 * width; i += int(blockDim.x)) {
        sums[i] += sums[i + half * 2 * width];
      }
    }
    __syncthreads();
  }
  // place of a channel's sum in row 0 and in the scratch memory
  double* parts = p.partial + task * p.partial_stride;
  const auto place = [=](int which, int i) { return (which * W + i % W) * p.lanes + i / W; };
  const auto kept = [=](int part, int which, int i) {
    return (index_t(part) * 2 + which) * p.channels + from + i;
  };
  if (!p.maps) {
    for (int i = int(threadIdx.x); i < 2 * own; i += int(blockDim.x)) {
      parts[kept(int(blockIdx.x), i / own, i % own)] = sums[place(i / own, i % own)];
    }
    if (p.kept_tscale && blockIdx.x == 0) {
      for (int i = int(threadIdx.x); i < own; i += int(blockDim.x)) {
        p.kept_tscale[task * p.kept_stride + from + i] = p.tscale[task * p.tw_stride + from + i];
      }
    }
    return;
  }
  if (!p.sums) {  // chunks of parts, [chunks, 2, width]: their loads wait for memory together
    for (int i = int(threadIdx.x); i < chunks * 2 * own; i += int(blockDim.x)) {
      const int which = i / own % 2, first = i / own / 2 * kChunk;
      const int end = min_of(p.parts, first + kChunk);
      double sum = 0;
      FM_UNROLL_BY_EIGHT
      for (int part = first; part < end; ++part) sum += parts[kept(part, which, i % own)];
      sums[(i / own) * width + i % own] = sum;
    }
    __syncthreads();
  }
  const auto total = [&](int which, int i) {
    if (p.sums) return sums[place(which, i)];
    double sum = sums[which * width + i];
    for (int chunk = 1; chunk < chunks; ++chunk) sum += sums[(2 * chunk + which) * width + i];
    return sum;
  };
  for (int i = int(threadIdx.x); i < own; i += int(blockDim.x)) {
    S found[2];
    find_statistics<P>(p, task, from + i, total(0, i), total(1, i), blockIdx.x == 0, found);
    table.put(i, channel_of<P>(p, task, from + i, static_cast<const S*>(found)));
  }
  __syncthreads();
  if (inside && p.rows.out) {
    const Map sweep(p, task, c, table, lane * W);
    const int end = int(index_t(p.map_items) * (blockIdx.x + 1) / gridDim.x);
    FM_NO_UNROLL
    for (int i = int(index_t(p.map_items) * blockIdx.x / gridDim.x) + row; i < end; i += rows) {
      sweep.map(i);
    }
  }
  if constexpr (P == NormPass::backward || P == NormPass::tangent_backward) {
    // the adjoint of the scale may go where its tangent is, which the map reads: in one launch all
    // have read it now, in two the map reads the copy that the first launch has kept
    if (blockIdx.x > 0) return;
    __syncthreads();
    for (int i = int(threadIdx.x); i < own; i += int(blockDim.x)) {
      if (p.dshift.to) p.dshift.store(task, from + i, S(total(0, i)));
      if (p.dscale.to) p.dscale.store(task, from + i, S(total(1, i)));
    }
  }
}

}  // namespace FM_CUDA
