// Which input pixels meet which weights, worked out once when a program is built.
//
// A convolution (and its transpose, for dx) is a gather product: an output pixel p is the sum over
// taps of a row of channels times a block of weights. Pixels that see the same taps, borders and
// stride classes apart, form a group, so that a kernel never tests a bound and never multiplies
// padding. Taps that follow each other in memory on both sides are merged into one run.
//
//   out[dst] = sum over runs of src[row.src + run.src .. + run.length] * W[run.weight ..]
//
// Offsets are in elements of one channels-last image; `weight` counts rows of the [kernel pixels *
// channels, outputs] weight matrix.
#pragma once

#include <vector>

#include "common/types.h"

namespace fm {

struct TapRun {
  index_t src, weight, length;
};

struct PixelRow {
  index_t src, dst;
};

struct PixelGroup {
  std::vector<TapRun> runs;  // none: the pixel sees nothing and is zero (plus bias)
  std::vector<PixelRow> rows;
};

struct GatherTable {
  std::vector<PixelGroup> groups;
  index_t src_size = 0, dst_size = 0;  // elements of one image
};

struct ConvGeometry {
  GatherTable forward;   // x -> y, and the rows of the weight gradient
  GatherTable backward;  // dy -> dx, weights transposed within each tap
};

struct Shape;
struct Window;
ConvGeometry make_conv_geometry(const Shape& in, const Shape& out, const Window& window);

}  // namespace fm
