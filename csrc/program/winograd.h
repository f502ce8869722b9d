// Which convolutions the CPU computes by Winograd's minimal filtering F(2x2, 3x3), and the scratch
// memory that takes; the arithmetic is in cpu/winograd.inl.h.
//
// A tile is 2 x 2 outputs. For one of them a channel pair costs 16 multiply-adds and a channel on
// either side a transform; direct, a pair costs one multiply-add for each output and kernel pixel
// that sees the image. Borders are dear in small images: tiles there are computed whole.
//
// Choice, blocks and parts depend on shapes alone, so results don't depend on threads.
#pragma once

#include "program/layer.h"

namespace fm {

struct WinogradSizes {
  static constexpr index_t kPositions = 16;  // of a transformed tile, 4 x 4
  static constexpr index_t kPad = 16;        // elements behind each position's: other cache sets
  bool outputs = false, inputs = false;      // how y and dw, and dx, are computed

  // Tiles that are transformed, multiplied and transformed back together: their arrays stay in the
  // second-level cache. Two arrays for the operands and one for the products, or two that are half
  // as long again for the weight gradient.
  index_t block = 0, gradient_block = 0, work = 0;
  // Of a task's tiles. A thread takes some of them, in the memory of the first; weight gradients
  // have a sum for each of `sums` others.
  index_t parts = 0, sums = 0;
  index_t panel = 0;   // transformed weights, or such a sum
  index_t direct = 0;  // elements before all that: the transposed weights

  WinogradSizes(const LayerDesc& desc, index_t samples);
  index_t total() const { return direct + max_of<index_t>(2, sums) * panel + parts * work; }
};

}  // namespace fm
