#include "program/winograd.h"

namespace fm {
namespace {

// Kernel pixels that the outputs along an axis see.
index_t axis_taps(index_t in, index_t out, index_t padding) {
  index_t taps = 0;
  for (index_t o = 0; o < out; ++o) {
    taps += max_of<index_t>(0, min_of(in, o - padding + 3) - max_of<index_t>(0, o - padding));
  }
  return taps;
}

index_t tiles_of(const Shape& image) { return (image.height + 1) / 2 * ((image.width + 1) / 2); }

}  // namespace

WinogradSizes::WinogradSizes(const LayerDesc& d, index_t samples) {
  constexpr index_t kTransform = 64;  // what a channel of a tile costs, in multiply-adds
  constexpr index_t kBlock = 24 * 1024, kLeastBlock = 24, kMostParts = 16;
  constexpr index_t kTilesOfSum = 256, kSums = index_t(1) << 18;
  const Window& w = d.window;
  if (d.kind != LayerKind::bilinear || w.kernel[0] != 3 || w.kernel[1] != 3) return;
  if (w.stride[0] != 1 || w.stride[1] != 1) return;
  const index_t in = d.in.channels, out = d.out.channels, most = max_of(in, out);
  const index_t taps = axis_taps(d.in.height, d.out.height, w.padding[0]) *
                       axis_taps(d.in.width, d.out.width, w.padding[1]);
  const index_t tile = kPositions * in * out + kTransform * (in + out);
  outputs = tiles_of(d.out) * tile < taps * in * out;
  inputs = tiles_of(d.in) * tile < taps * in * out;
  if (!outputs && !inputs) return;
  const index_t tiles = samples * max_of(tiles_of(d.in), tiles_of(d.out));
  block = max_of(kLeastBlock, kBlock / (2 * kPositions * most) / 12 * 12);
  gradient_block = block * 3 / 2;
  work = 3 * kPositions * (block * most + kPad);
  parts = min_of(kMostParts, (tiles + block - 1) / block);
  panel = kPositions * in * out;
  const index_t room = min_of(kMostParts, kSums / panel);
  sums = max_of<index_t>(1, min_of(room, samples * tiles_of(d.out) / kTilesOfSum));
  direct = align_up(2 * d.param_count, kPad);
}

}  // namespace fm
