// Copies from global to shared memory of bilinear products.
//
// A tile is rows x columns of one operand, columns contiguous in both memories. The gathered
// operand's rows are pixels, looked up in a small table in shared memory, and its columns are taps
// and channels, decoded once per thread and tile: a thread copies one column unit of 16 bytes (or
// one element) in every so many rows. `outputs` and `inputs` have pixels along m and decode
// columns for every step of the sum; `weights` has pixels along k and refills the table instead.
#pragma once

#include "cuda/bilinear_tile.cuh"
#include "cuda/tile.cuh"

namespace FM_CUDA {

// Pixels along one axis that meet the same taps, and where tap t of the p-th of them lies:
// pixel = first + step p, source = source_first + source_step p + sign t, kernel = kernel_first +
// kernel_step t.
struct AxisClass {
  int count, first, step, source_first, source_step, taps, kernel_first, kernel_step;
};

template <Form form>
FM_DEVICE AxisClass axis_class(const ProductShape& s, int axis, int residue) {
  const int kernel = s.kernel[axis], stride = s.stride[axis], padding = s.padding[axis];
  const int pixels = axis == 0 ? s.pixel_height : s.pixel_width;
  if (form != Form::inputs) return {pixels, 0, 1, -padding, stride, kernel, 0, 1};
  // pixels i with (i + padding) % stride == residue meet taps residue, residue + stride, ...
  const int first = (residue + stride - padding % stride) % stride;
  return {first < pixels ? (pixels - first + stride - 1) / stride : 0,
          first,
          stride,
          (first + padding - residue) / stride,
          1,
          residue < kernel ? (kernel - residue + stride - 1) / stride : 0,
          residue,
          stride};
}

template <Form form>
struct PixelClass {
  AxisClass y, x;

  FM_DEVICE PixelClass(const ProductShape& s, int group)
      : y(axis_class<form>(s, 0, form == Form::inputs ? group / s.stride[1] : 0)),
        x(axis_class<form>(s, 1, form == Form::inputs ? group % s.stride[1] : 0)) {}
  FM_DEVICE int pixels() const { return y.count * x.count; }
  FM_DEVICE int taps() const { return y.taps * x.taps; }
};

// Where a pixel's tap 0 lies in the image; no tap of a row beyond the last is inside.
struct alignas(8) PixelRow {
  int offset;
  short y, x;
};
constexpr short kNowhere = -32768;

template <Form form>
FM_DEVICE PixelRow pixel_row(const ProductShape& s, const PixelClass<form>& c, int sample, int py,
                             int px) {
  const int y = c.y.source_first + c.y.source_step * py;
  const int x = c.x.source_first + c.x.source_step * px;
  return {((sample * s.height + y) * s.width + x) * s.channels, short(y), short(x)};
}

// A column of the gathered operand: a tap, relative to a row's tap 0, and a channel.
struct TapColumn {
  int offset, y, x;
  int kernel_offset;  // of the tap and channel in weights [kernel pixels, in, out], for `inputs`
};

template <Form form>
FM_DEVICE TapColumn tap_column(const ProductShape& s, const PixelClass<form>& c, int column) {
  constexpr int kSign = form == Form::inputs ? -1 : 1;
  const int tap = s.by_channels.quotient(column);
  const int channel = column - tap * s.channels;
  const int ty = int(unsigned(tap) / unsigned(c.x.taps)), tx = tap - ty * c.x.taps;
  TapColumn t;
  t.y = kSign * ty;
  t.x = kSign * tx;
  t.offset = (t.y * s.width + t.x) * s.channels + channel;
  if (form == Form::inputs) {
    const int ky = c.y.kernel_first + c.y.kernel_step * ty;
    const int kx = c.x.kernel_first + c.x.kernel_step * tx;
    t.kernel_offset = (ky * s.kernel[1] + kx) * s.in * s.out + channel;
  }
  return t;
}

// The part of a tile that a thread copies: one unit of columns in every kStep-th row.
template <int Columns, int Unit>
struct CopyShare {
  static constexpr int kUnits = Columns / Unit, kStep = kProductThreads / kUnits;
  static_assert(Columns % Unit == 0 && kProductThreads % kUnits == 0, "a thread keeps its columns");
  static FM_DEVICE int column() { return int(threadIdx.x) % kUnits * Unit; }
  static FM_DEVICE int row() { return int(threadIdx.x) / kUnits; }
};

// A tile of gathered pixels; `valid`: the thread's columns exist. Copies of single elements are
// many, and unrolled all the way would fill the instruction cache.
template <int Rows, int Columns, int Stride, int Unit, class S>
FM_DEVICE void copy_pixels(S* tile, const S* image, const PixelRow* rows, const TapColumn& tap,
                           bool valid, const ProductShape& s) {
  using Share = CopyShare<Columns, Unit>;
  tile += Share::column();
#pragma unroll 8
  for (int first = 0; first < Rows; first += Share::kStep) {
    const int row = first + Share::row();
    if (Rows % Share::kStep != 0 && row >= Rows) break;
    const PixelRow at = rows[row];
    const bool inside = valid && unsigned(at.y + tap.y) < unsigned(s.height) &&
                        unsigned(at.x + tap.x) < unsigned(s.width);
    copy_async<Unit* int(sizeof(S))>(tile + row * Stride,
                                     inside ? image + (at.offset + tap.offset) : image, inside);
  }
}

// A tile of a matrix, from a pointer to the thread's first column, with rows `pitch` apart of which
// `left` exist.
template <int Rows, int Columns, int Stride, int Unit, class S>
FM_DEVICE void copy_matrix(S* tile, const S* matrix, int pitch, int left, bool valid) {
  using Share = CopyShare<Columns, Unit>;
  tile += Share::column();
#pragma unroll 8
  for (int first = 0; first < Rows; first += Share::kStep) {
    const int row = first + Share::row();
    if (Rows % Share::kStep != 0 && row >= Rows) break;
    const bool inside = valid && row < left;
    copy_async<Unit* int(sizeof(S))>(tile + row * Stride, inside ? matrix + row * pitch : matrix,
                                     inside);
  }
}

}  // namespace FM_CUDA
