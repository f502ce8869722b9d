// The layer contract.
//
// A layer is four passes (forward, backward, tangent_forward, tangent_backward) of one signature.
// `LayerArgs` points at everything any pass of any layer may need; names are those of the naming
// card in csrc/README.md. Activations are channels last. Outputs of a pass are overwritten, a null
// output is not computed, a null tangent means zero, inputs are never modified.
#pragma once

#include <string>
#include <vector>

#include "common/types.h"
#include "program/geometry.h"

namespace fm {

enum class LayerKind : int {
  bilinear,  // Linear and Conv2d: y = w * x (+ b); Linear is a 1x1 convolution of a 1x1 image
  batch_norm,
  batch_norm_pool,  // batch norm with a max pooling fused behind it
  layer_norm,
  relu,
  leaky_relu,
  tanh,
  sigmoid,
  silu,
  gelu,
  gelu_tanh,
  elu,
  softplus,
  max_pool,
  average_pool,
  append_parameter,  // y = (x, w): a parameter of its own beside the outputs
  count
};

// Height, width and channels of one sample; a vector of F features is 1 x 1 x F.
struct Shape {
  index_t height = 1, width = 1, channels = 1;
  FM_INLINE index_t pixels() const { return height * width; }
  FM_INLINE index_t size() const { return height * width * channels; }
};

struct Window {
  index_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0};
};

struct LayerDesc {
  LayerKind kind = LayerKind::relu;
  Shape in, out;
  Window window;            // convolution and pooling, fused ones too
  bool has_weight = false;  // weight or scale
  bool has_bias = false;    // bias or shift
  // A ReLU fused behind a batch norm (with a pooling, before or behind that: it is the same) or a
  // dense bilinear layer.
  bool relu = false;
  bool relu_input = false;    // dense bilinear: x is such a ReLU's output, so dx is masked by x > 0
  double eps = 0, alpha = 0;  // normalisation; slope or alpha of an activation
  index_t param_offset = 0;   // of the weight, in elements of the engine's layout
  index_t bias_offset = 0;    // of the bias, relative to param_offset
  index_t param_count = 0;    // weight, padding to a cache line and bias
  index_t segment = 0;        // of the weight, among the program's
  const ConvGeometry* geometry = nullptr;  // bilinear only, owned by the program
  // A first convolution below a batch norm with pooling: a backend may leave that norm's sweeps
  // over unpooled pixels to it, in strips of at most so many rows (Backend::strips).
  index_t strip_rows = 0;
  // A first bilinear layer of few inputs below a batch norm with 2 x 2 pooling that leaves no
  // border: a backend may leave the map of that norm's backward pass to it (Backend::folds).
  bool folds_norm = false;

  index_t segments() const { return (has_weight ? 1 : 0) + (has_bias ? 1 : 0); }
  // A mean over all pixels of an image.
  bool image_mean() const {
    return kind == LayerKind::average_pool && window.kernel[0] == in.height &&
           window.kernel[1] == in.width && window.padding[0] + window.padding[1] == 0;
  }
  // A matrix product per sample or pixel: Linear, and convolutions of single pixels.
  bool dense() const {
    return kind == LayerKind::bilinear && window.kernel[0] * window.kernel[1] == 1 &&
           window.stride[0] * window.stride[1] == 1 && window.padding[0] + window.padding[1] == 0;
  }
};

// Weights of a dense layer that are never formed: weights + rate * sum over rows r of a[r]' b[r].
template <class S>
struct Factors {
  const S *weights = nullptr, *transposed = nullptr;  // [in, out], [out, in] of all tasks; or zero
  const S *a = nullptr, *b = nullptr;                 // [T, rows, in], [T, rows, out]
  index_t a_stride = 0, b_stride = 0, rows = 0;       // elements from task to task
  const S* rate = nullptr;                            // a number in backend memory; null: one
};

template <class S>
struct LayerArgs {
  const LayerDesc* desc;
  index_t tasks = 1, samples = 0;
  index_t w_stride = 0, tw_stride = 0, dw_stride = 0;  // elements from task to task
  const S* x = nullptr;                                // [T, N, in]
  const S* w = nullptr;                                // [T, P_l]
  const S* dy = nullptr;                               // [T, N, out]
  const S* tx = nullptr;                               // [T, N, in]
  const S* tw = nullptr;                               // [T, P_l]
  const S* tdy = nullptr;                              // [T, N, out]
  S* y = nullptr;                                      // [T, N, out]
  S* dx = nullptr;                                     // [T, N, in]; tangent_backward may read it
  S* dw = nullptr;                                     // [T, P_l]
  S* ty = nullptr;                                     // [T, N, out]
  S* tdx = nullptr;                                    // [T, N, in]
  S* tdw = nullptr;                                    // [T, P_l]
  S* saved = nullptr;              // [T, saved_count] what a pass keeps for the later ones
  const S* saved_below = nullptr;  // what the layer below has saved, of a dense layer's relu_input
  // Dense bilinear layers, and all layers of a backend that `updates`: dw and tdw are dw_base +
  // scale * rate * the adjoint, with a scale and a rate for the weight and for the bias. The base
  // may be dw itself, and so may tw be tdw; a null base is zero. Rates are numbers in backend
  // memory, the same for all tasks; null is one.
  const S* dw_base = nullptr;  // [T, P_l]
  index_t dw_base_stride = 0;  // elements from task to task (0: shared)
  S weight_scale = 1, bias_scale = 1;
  const S *weight_rate = nullptr, *bias_rate = nullptr;
  // Of a factored layer (Backend::factored) the weights and their tangent, which may be null; w,
  // tw, dw and tdw are its bias alone.
  const Factors<S>*w_factors = nullptr, *tw_factors = nullptr;
  // Of a convolution that works in strips, and in backward passes of one that folds, the arguments
  // of the norm above it; of a batch norm that does a mean over images, those of that; and of the
  // norm above strips, that the convolution has swept, or will sweep, its unpooled pixels.
  const LayerArgs* above = nullptr;
  bool swept_below = false;
};

// Batch norm sums the data of a task in at most this many parts, each with sums of its own.
constexpr index_t kStatisticParts = 16;
// In lockstep in this many: a few tasks should fill a GPU.
constexpr index_t kLockstepParts = 32;

// Words of 32 outputs of a ReLU that is part of a dense layer: whether they are positive. A GPU
// saves them; a CPU, whose outputs are in its caches, looks at those.
FM_INLINE index_t sign_words(index_t channels) { return (channels + 31) / 32; }

// Elements a layer saves per task, and elements of scratch a pass may use.
index_t saved_count(const LayerDesc& desc, index_t samples);
index_t scratch_count(const LayerDesc& desc, index_t samples);

// Scratch of a convolution in strips, in this order: the norm's sums; weights and bias in whole
// vectors of outputs, and two of their products with the moments of patches of x; and for each part
// of the strips the rows of x that one sees, its y or dy, sums for dw and the bias, and sums of
// products of pixels of x: of nine pairs of rows, in vectors of up to 16 elements.
struct StripSizes {
  index_t norm, panel, band, adjoint, patch;
  index_t width, row, inputs;  // of a panel; of a band; kernel pixels * channels
  explicit StripSizes(const LayerDesc& desc);
  index_t total() const {
    return norm + 3 * panel + kStatisticParts * (band + adjoint + panel + patch);
  }
};

// Parts that a backend in lockstep cuts the sum of a bilinear layer's weight gradient into, which
// are added in order: as many as let few tasks fill a GPU, each in a place of param_count elements
// in scratch. They don't depend on the number of tasks.
index_t gradient_parts(const LayerDesc& desc, index_t samples);

// A GPU sums the loss of many samples block by block, and then the sums of a task in order. Each is
// a value and a number of hits, in double, and may take two elements of scratch for either.
constexpr index_t kLossBlock = 256;
index_t loss_parts(index_t samples);
index_t loss_scratch_count(index_t samples);

// The last six belong to policies, math/policy.h.
enum class LossKind : int {
  squared_error,
  cross_entropy,
  gaussian_policy,
  gaussian_ratio,
  gaussian_kl,
  categorical_policy,
  categorical_ratio,
  categorical_kl,
  count
};

template <class S>
struct LossArgs {
  index_t tasks = 1, samples = 0, outputs = 0;
  S scale = 1;
  const S* z = nullptr;          // [T, N, outputs]
  const void* target = nullptr;  // [T, N, .] of S, or [T, N] int64 labels
  const S* tz = nullptr;         // [T, N, outputs]
  S* dz = nullptr;               // [T, N, outputs], or null
  S* tdz = nullptr;              // [T, N, outputs] the loss Hessian times tz
  // Sums over a task's samples, `value_stride` elements from task to task, both null or neither. A
  // label out of range makes the value, and dz of its sample, NaN.
  double* value = nullptr;
  double* accuracy = nullptr;  // share of the samples; cross-entropy only, else NaN
  index_t value_stride = 1;
};

}  // namespace fm
