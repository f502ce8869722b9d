// What a layer keeps from pass to pass, and the scratch memory of a pass: both per task.
#include "program/layer.h"

#include "program/winograd.h"

namespace fm {

// Saved by a layer: a dense one with a ReLU keeps a word for 32 outputs, a convolution in strips
// the moments of its patches, batch and layer norm (mean, r, m1, m2, tmean, q) per statistic, max
// pooling the winning tap of every output (as an integer of the scalar's width), both fused three
// more per channel and the winner's x and tx.
index_t saved_count(const LayerDesc& d, index_t samples) {
  if (d.strip_rows > 0) {
    const index_t inputs = StripSizes(d).inputs;
    return inputs * (inputs + 1);
  }
  if (d.kind == LayerKind::bilinear) {
    return d.relu ? samples * d.out.pixels() * sign_words(d.out.channels) : 0;
  }
  if (d.kind == LayerKind::batch_norm) return 6 * d.in.channels;
  if (d.kind == LayerKind::batch_norm_pool) {
    return align_up(9 * d.in.channels, 16) + 2 * samples * d.out.size();
  }
  if (d.kind == LayerKind::layer_norm) return 6 * samples;
  if (d.kind == LayerKind::max_pool) return samples * d.out.size();
  return 0;
}

// 52 tiles of 64 x 64 weights, so that four tasks have some 200 for the 132 multiprocessors of a
// large GPU, and with the blocks of dx, in one launch, what three a multiprocessor are; but no part
// of less than 512 pixels, or 1024 samples of vectors, since each part is written and read once
// more; and at most 2^18 elements in all.
index_t gradient_parts(const LayerDesc& d, index_t samples) {
  const index_t inputs = d.window.kernel[0] * d.window.kernel[1] * d.in.channels;
  const index_t tiles = ((inputs + 63) / 64) * ((d.out.channels + 63) / 64);
  const index_t pixels = d.out.pixels(), useful = samples * pixels / (pixels > 1 ? 512 : 1024);
  const index_t room = (index_t(1) << 18) / max_of<index_t>(1, d.param_count);
  return max_of<index_t>(1, min_of(52 / tiles, min_of(useful, room)));
}

namespace {
index_t norm_scratch(index_t channels, index_t parts) {
  return (2 + 4 * parts) * align_up(channels, 16);
}
}  // namespace

StripSizes::StripSizes(const LayerDesc& d) {
  norm = norm_scratch(d.out.channels, kStatisticParts);
  width = align_up(d.out.channels, 16);
  row = (d.in.width + 2 * d.window.padding[1]) * d.in.channels;
  inputs = d.window.kernel[0] * d.window.kernel[1] * d.in.channels;
  panel = (inputs + 1) * width;
  band = align_up((d.strip_rows + d.window.kernel[0] - 1) * row, 16);
  adjoint = align_up(d.strip_rows * d.out.width * d.out.channels + 16, 16);  // a vector to spare
  // 9 in double and 6 in the scalar type, each a kernel row's products with another and its sums
  patch = (2 * 9 + 6) * (d.window.kernel[1] * d.in.channels + 1) * 16;
}

// Scratch: the transposed weights and their tangents, or the parts of a weight gradient, or what
// strips or Winograd's filtering take; two rows of batch norm's coefficients, and two rows of sums
// a part, in double, which may take two elements each.
index_t scratch_count(const LayerDesc& d, index_t samples) {
  if (d.kind == LayerKind::bilinear) {
    const index_t strips = d.strip_rows > 0 ? StripSizes(d).total() : 0;
    const index_t direct = max_of<index_t>(2, gradient_parts(d, samples)) * d.param_count;
    return max_of(max_of(strips, WinogradSizes(d, samples).total()), direct);
  }
  if (d.kind == LayerKind::batch_norm || d.kind == LayerKind::batch_norm_pool) {
    return norm_scratch(d.in.channels, kLockstepParts);
  }
  return 0;
}

// A block takes four rounds to go over as much as a second launch costs.
index_t loss_parts(index_t samples) {
  return samples <= 4 * kLossBlock ? 1 : (samples + kLossBlock - 1) / kLossBlock;
}

index_t loss_scratch_count(index_t samples) {
  const index_t parts = loss_parts(samples);
  return parts > 1 ? 2 * 2 * parts : 0;
}

}  // namespace fm
