// How a pass of norm.cuh is launched: its parameters, the lanes and rows of a block, the parts of
// the sums, and whether one launch does all.
//
// A block of one launch takes all rows of its channels; that is done where they are few. Else there
// are as many parts as keep some hundred rows each. Channels are split further where a block's rows
// are more than one an item, down to two sectors of memory, in one launch to one: those data are in
// a cache; such a block has more threads, if its kernel may, for more items. Nothing of this hangs
// on the number of tasks or on alignment: single elements instead of packs only take more threads
// for the same rows, and fewer channels where those would be too many. What maps items, where no
// order matters, has whole rows, but spreads them where there are few over more blocks.
#pragma once

#include "cuda/norm.cuh"

namespace FM_CUDA {

// Parameters of a pass but for its rows, items and statistics' count.
template <class S>
NormParams<S> norm_params(const LayerArgs<S>& a, S* dw, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  const auto shift = [&](auto* w) { return d.has_bias && w ? w + d.bias_offset : nullptr; };
  const auto scale = [&](auto* w) { return d.has_weight && w ? w : nullptr; };
  NormParams<S> p{};
  p.channels = int(d.in.channels);
  p.relu = d.relu;
  p.eps = d.eps;
  p.count = double(a.samples * d.in.pixels());
  p.first = a.x;
  p.first_stride = a.samples * d.in.size();
  p.scale = scale(a.w);
  p.shift = shift(a.w);
  p.tscale = scale(a.tw);
  p.tshift = shift(a.tw);
  p.w_stride = a.w_stride;
  p.tw_stride = a.tw_stride;
  p.saved = a.saved;
  p.saved_stride = saved_count(d, a.samples);
  p.partial = static_cast<double*>(exec.scratch);
  p.partial_stride = scratch_count(d, a.samples) * index_t(sizeof(S)) / index_t(sizeof(double));
  p.dscale = weight_update(a, dw);
  p.dshift = bias_update(a, dw);
  return p;
}

// Runs a pass: `wide` takes packs, `narrow` single elements. `sum_rows` and `map_rows` are the rows
// of data that are read for the summed and mapped items; a block of `wide` may have `most_threads`.
template <class S, template <class> class Params>
void run_norm(const char* name, void (*wide)(Params<S>), void (*narrow)(Params<S>), Params<S> p,
              index_t tasks, index_t sum_rows, index_t map_rows, bool packs, unsigned most_threads,
              const Exec& exec) {
  constexpr index_t kAlone = 1024, kPart = 128, kSectorPacks = 2;
  constexpr int kMost = 32, kItems = 8;  // packs of channels a block, items a thread maps
  constexpr index_t kEnough = 512;       // blocks that fill a large GPU
  require(tasks < 65536, name, ": expected fewer than 65536 tasks, got ", tasks);
  const index_t all = max_of(sum_rows, map_rows);
  require(all < (index_t(1) << 31), name, ": expected fewer than 2^31 samples times pixels, got ",
          all);
  const bool alone = all <= kAlone;
  p.parts = int(alone ? 1 : max_of<index_t>(1, min_of(kLockstepParts, sum_rows / kPart)));
  int most = 1;
  while (most < kMost && most * kPack<S> < p.channels) most *= 2;
  int lanes = most;
  const index_t least = alone ? kSectorPacks : 2 * kSectorPacks;
  const index_t each = alone ? all : sum_rows / p.parts;  // rows of a block
  while (lanes > least && each * lanes > index_t(kNormThreads)) lanes /= 2;
  packs = packs && p.channels % kPack<S> == 0;
  const auto groups = [&](int n) { return divide_up(p.channels, n * kPack<S>); };
  const auto go = [&](bool sum, bool map, index_t blocks, int n, unsigned threads) {
    const int rows = int(threads) / n;
    int width = n * int(kPack<S>);
    while (!packs && unsigned(rows * width) > kNormBlock<S, 1>) width /= 2;
    const index_t sums = sum ? rows : divide_up(p.parts, kChunk);
    p.sums = sum;
    p.maps = map;
    p.lanes = packs ? n : width;
    launch_named(name, packs ? wide : narrow,
                 dim3(unsigned(blocks), unsigned(divide_up(p.channels, width)), unsigned(tasks)),
                 unsigned(rows * p.lanes),
                 sums * 2 * width * sizeof(double) + ChannelTable<S>::offset(width) * sizeof(S),
                 exec, p);
  };
  if (alone) {
    const index_t items = max_of(p.sum_items, p.map_items) * index_t(lanes);
    return go(true, true, 1, lanes, items > kNormThreads ? most_threads : kNormThreads);
  }
  if (p.tscale && p.tscale == p.dscale.to) {
    // behind the parts' sums, where the CPU has coefficients
    p.kept_tscale = reinterpret_cast<S*>(p.partial + 2 * kLockstepParts * p.channels);
    p.kept_stride = p.partial_stride * index_t(sizeof(double) / sizeof(S));
  }
  go(true, false, p.parts, lanes, kNormThreads);
  if (p.kept_tscale) {
    p.tscale = p.kept_tscale;
    p.tw_stride = p.kept_stride;
  }
  if (!p.rows.out) return go(false, true, 1, most, kNormThreads);
  const auto blocks = [&](int n, index_t items) {
    return divide_up(p.map_items, int(kNormThreads) / n * items);
  };
  while (most > 2 * kSectorPacks && blocks(most, 1) * groups(most) * tasks < kEnough) most /= 2;
  const index_t spread = blocks(most, 1) * groups(most) * tasks / kEnough;
  go(false, true, blocks(most, min_of<index_t>(kItems, max_of<index_t>(1, spread))), most,
     kNormThreads);
}

}  // namespace FM_CUDA
