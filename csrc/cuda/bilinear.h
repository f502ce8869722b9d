// Products of Linear and Conv2d for all tasks at once: what the host tells the kernels.
//
//   outputs   y[p, :]   = bias + sum over taps, c of x[p + tap, c] w[tap, c, :]     (y, ty)
//   inputs    dx[p, c]  = sum over taps, o of dy[p - tap, o] w[tap, c, o]           (dx, tdx)
//   weights   dw[tap, c, :] = sum over samples, p of x[p + tap, c] dy[p, :]         (dw, tdw)
//
// Each is a matrix product  out[m, n] = sum over operand pairs and k of a[m, k] b[k, n]  per task,
// where `a` is gathered from an image while it is copied to shared memory: nothing is unfolded in
// global memory. Bounds of the image are predicates of the copies, which fill with zeros. Strides
// are different: an input pixel meets only every stride-th tap, so `inputs` splits the pixels into
// stride x stride classes, inside which the sum is one of stride 1 over the class's own taps; that
// leaves no zero to multiply but at borders.
//
// A long sum of `weights` is cut into parts, which `bilinear_reduce_kernel` adds in ascending
// order. Where a sum is cut depends on the layer and the samples alone, so a task gets the same
// bits alone and among others.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "program/layer.h"

namespace FM_CUDA {

enum class Form { outputs, inputs, weights };

// n / divisor by a multiplication, for 0 <= n < 2^31
struct Divisor {
  unsigned value = 1, multiplier = 1u << 31, shift = 31;

  Divisor() = default;
  explicit Divisor(index_t d) : value(unsigned(d)) {
    unsigned log = 0;
    while ((index_t(1) << log) < d) ++log;
    shift = 31 + log;
    multiplier = unsigned(((std::uint64_t(1) << shift) + value - 1) / value);
  }
  FM_INLINE int quotient(int n) const {
    return int((std::uint64_t(unsigned(n)) * multiplier) >> shift);
  }
};

template <class S>
struct OperandPair {
  const S* a = nullptr;                // the image that is gathered from
  const S* b = nullptr;                // weights, or dy
  index_t a_stride = 0, b_stride = 0;  // elements from task to task
};

// Shapes of a product. Pixels are those of the image whose pixels are rows: y, dx or, along the
// sum of `weights`, y.
struct ProductShape {
  int samples, rows, columns, depth;  // of one task; rows and depth of the largest class
  int height, width, channels;        // of the image that is gathered from
  int pixel_height, pixel_width;
  int kernel[2], stride[2], padding[2];
  int in, out;  // channels of the layer
  int groups;   // classes of pixels, or parts of the sum
  int part;     // steps of the sum in one part
  Divisor by_channels, by_pixels, by_pixel_width;
};

template <class S>
struct Product {
  ProductShape shape;
  OperandPair<S> pair[2];
  int pairs = 0;
  bool wide_a = false, wide_b = false, wide_out = false;  // copies and stores of 16 bytes
  int tiles_m = 0, tiles_n = 0;                           // of a class
  S* result = nullptr;
  index_t result_stride = 0, part_stride = 0;  // elements from task to task, from part to part
  // Adjoint of the bias, behind that of the weight: the sum of the first pair's b, if not 0.
  index_t bias_offset = 0;
  // What becomes of a sum: outputs and inputs...
  const S* bias = nullptr;  // [columns]
  index_t bias_stride = 0;
  bool relu = false;               // negative values become zero
  unsigned* signs = nullptr;       // where it is told which are positive (sign_bits.cuh)
  const unsigned* mask = nullptr;  // such signs of the result's size: zero where they are not set
  int sign_words = 0;              // of a row, and from task to task
  index_t sign_stride = 0;
  // ... and weights: result = base + scale * rate * sum
  const S* base = nullptr;
  index_t base_stride = 0;
  S weight_scale = 1, bias_scale = 1;
  const S *weight_rate = nullptr, *bias_rate = nullptr;
};

// How products are multiplied: scalar fused multiply-adds, or tensor cores with the factors split
// into two TF32 numbers each (as accurate as float32), rounded to TF32, or to bfloat16.
enum class Arithmetic { scalar, split_tf32, tf32, bfloat16 };

// Tiles of the result that a block computes, rows x columns.
enum class TileShape { t128x32, t64x64, t32x32, t16x64, t128x8, count };
constexpr int kTileRows[] = {128, 64, 32, 16, 128}, kTileColumns[] = {32, 64, 32, 64, 8};

// Steps of the sum between two parts are a multiple of this, whatever the tile.
constexpr index_t kDepthAlign = 32;

struct Choice {
  Arithmetic arithmetic;
  TileShape tile;
};

template <class S>
void launch_outputs(Product<S> p, index_t tasks, Choice choice, const Exec& exec);
template <class S>
void launch_inputs(Product<S> p, index_t tasks, Choice choice, const Exec& exec);
template <class S>
void launch_weights(Product<S> p, index_t tasks, Choice choice, const Exec& exec);

// Both in one launch, by one choice.
template <class S>
void launch_adjoints(Product<S> weights, Product<S> inputs, index_t tasks, Choice choice,
                     const Exec& exec);
// `weights` of a layer whose LayerDesc::folds_norm, with the adjoint of its outputs mapped from the
// backward pass of the norm above; the pair is (x, y). bilinear_pooled.cu.
template <class S>
void launch_pooled_weights(Product<S> p, const LayerArgs<S>& norm, index_t tasks,
                           Arithmetic arithmetic, const Exec& exec);

// The choice of the passes in kernels.h; `scalar_size` in bytes.
using Chooser = Choice (*)(const ProductShape&, index_t tasks, Precision, std::size_t scalar_size);
Choice choose(const ProductShape& shape, index_t tasks, Precision precision,
              std::size_t scalar_size);

// A product and its choice; and whether two of a layer had better be one launch, by `both`.
struct Chosen {
  const ProductShape& shape;
  int pairs;
  Choice choice;
};
bool choose_together(const Chosen& weights, const Chosen& inputs, index_t tasks, Choice& both);

// A pass with another chooser, for tests.
enum class Pass { forward, backward, tangent_forward, tangent_backward };
template <class S>
void bilinear_pass(Pass pass, const LayerArgs<S>& args, const Exec& exec, Chooser chooser);

}  // namespace FM_CUDA
