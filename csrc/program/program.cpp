#include "program/program.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "common/error.h"
#include "program/loss.h"

namespace fm {
namespace {

// Parameter tensors start at multiples of this many elements: a cache line in single precision.
constexpr index_t kParameterAlignment = 16;

const std::map<std::string, LayerKind>& simple_kinds() {
  static const std::map<std::string, LayerKind> kinds = {
      {"relu", LayerKind::relu},           {"leaky_relu", LayerKind::leaky_relu},
      {"tanh", LayerKind::tanh},           {"sigmoid", LayerKind::sigmoid},
      {"silu", LayerKind::silu},           {"gelu", LayerKind::gelu},
      {"gelu_tanh", LayerKind::gelu_tanh}, {"elu", LayerKind::elu},
      {"softplus", LayerKind::softplus},
  };
  return kinds;
}

std::string text(const Shape& s) {
  if (s.pixels() == 1) return "[" + std::to_string(s.channels) + "]";
  return "[" + std::to_string(s.channels) + ", " + std::to_string(s.height) + ", " +
         std::to_string(s.width) + "]";
}

std::string list(const std::vector<index_t>& sizes) {
  std::string text;
  for (index_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

// channels-last position -> channels-first position of the same element
std::vector<std::int32_t> channels_first_index(const Shape& s) {
  std::vector<std::int32_t> index(s.size());
  for (index_t p = 0; p < s.pixels(); ++p) {
    for (index_t c = 0; c < s.channels; ++c) {
      index[p * s.channels + c] = std::int32_t(c * s.pixels() + p);
    }
  }
  return index;
}

index_t window_out(index_t in, const Window& w, int axis) {
  const index_t span = in + 2 * w.padding[axis] - w.kernel[axis];
  return span < 0 ? 0 : span / w.stride[axis] + 1;
}

// [out, in, kernel pixels] of the model -> [kernel pixels, in, out] of the engine, the inputs in
// the order `inputs` (empty: as they are).
std::vector<std::int32_t> weight_index(index_t out, index_t in, index_t pixels,
                                       const std::vector<std::int32_t>& inputs) {
  std::vector<std::int32_t> index(out * in * pixels);
  index_t e = 0;
  for (index_t p = 0; p < pixels; ++p) {
    for (index_t i = 0; i < in; ++i) {
      const index_t source = inputs.empty() ? i : inputs[i];
      for (index_t o = 0; o < out; ++o) {
        index[e++] = std::int32_t((o * in + source) * pixels + p);
      }
    }
  }
  return index;
}

// Builds layer after layer; keeps what is known of the value that flows.
class Builder {
 public:
  Shape shape;
  bool vector = false;              // flattened: Linear and BatchNorm1d may follow
  std::vector<std::int32_t> order;  // channels-last feature -> the model's, empty if the same
  std::vector<Parameter> parameters;
  index_t param_count = 0;

  void begin(const LayerSpec& spec, index_t position) {
    where_ = "layer " + std::to_string(position) + " (" + spec.kind + " '" + spec.name + "')";
  }

  template <class... Parts>
  void check(bool condition, const Parts&... parts) const {
    require(condition, where_, ": ", parts...);
  }

  LayerDesc start(LayerKind kind) const {
    LayerDesc d;
    d.kind = kind;
    d.in = d.out = shape;
    return d;
  }

  // Gives the layer room for a weight and a bias, in this order.
  void parametrize(LayerDesc& d, const LayerSpec& spec, index_t weight, index_t bias,
                   std::vector<std::int32_t> weight_order, std::vector<std::int32_t> bias_order) {
    d.has_weight = weight > 0;
    d.has_bias = bias > 0;
    d.param_offset = param_count;
    d.segment = index_t(parameters.size());
    if (weight > 0) add(spec.name + ".weight", weight, std::move(weight_order));
    d.bias_offset = param_count - d.param_offset;
    if (bias > 0) add(spec.name + ".bias", bias, std::move(bias_order));
    d.param_count = param_count - d.param_offset;
  }

 private:
  void add(std::string name, index_t count, std::vector<std::int32_t> index) {
    parameters.push_back({std::move(name), param_count, count, std::move(index)});
    param_count = align_up(param_count + count, kParameterAlignment);
  }

  std::string where_;
};

LayerDesc linear(Builder& b, const LayerSpec& s) {
  LayerDesc d = b.start(LayerKind::bilinear);
  b.check(b.vector, "expected a vector of features, got ", text(b.shape),
          "; put a Flatten before it");
  b.check(s.in == b.shape.size(), "expected ", s.in, " input features, got ", b.shape.size());
  b.check(s.out > 0, "expected at least one output feature, got ", s.out);
  d.out = {1, 1, s.out};
  b.parametrize(d, s, s.in * s.out, s.has_bias ? s.out : 0, weight_index(s.out, s.in, 1, b.order),
                {});
  b.order.clear();
  return d;
}

LayerDesc windowed(Builder& b, const LayerSpec& s, LayerKind kind) {
  LayerDesc d = b.start(kind);
  b.check(!b.vector, "expected an image [channels, height, width], got a vector ", text(b.shape));
  d.window = s.window;
  for (int axis = 0; axis < 2; ++axis) {
    b.check(s.window.kernel[axis] > 0 && s.window.stride[axis] > 0 && s.window.padding[axis] >= 0,
            "kernel and stride must be positive and padding not negative");
  }
  d.out.height = window_out(b.shape.height, s.window, 0);
  d.out.width = window_out(b.shape.width, s.window, 1);
  b.check(d.out.height > 0 && d.out.width > 0, "the kernel ", s.window.kernel[0], "x",
          s.window.kernel[1], " does not fit the input ", text(b.shape));
  return d;
}

LayerDesc conv2d(Builder& b, const LayerSpec& s) {
  LayerDesc d = windowed(b, s, LayerKind::bilinear);
  b.check(s.in == b.shape.channels, "expected ", s.in, " input channels, got ", b.shape.channels);
  b.check(s.out > 0, "expected at least one output channel, got ", s.out);
  d.out.channels = s.out;
  const index_t pixels = s.window.kernel[0] * s.window.kernel[1];
  b.parametrize(d, s, s.in * s.out * pixels, s.has_bias ? s.out : 0,
                weight_index(s.out, s.in, pixels, {}), {});
  return d;
}

LayerDesc pool(Builder& b, const LayerSpec& s, LayerKind kind) {
  LayerSpec spec = s;
  if (s.kind == "global_avg_pool") {
    spec.window.kernel[0] = spec.window.stride[0] = b.shape.height;
    spec.window.kernel[1] = spec.window.stride[1] = b.shape.width;
  }
  LayerDesc d = windowed(b, spec, kind);
  for (int axis = 0; axis < 2; ++axis) {
    b.check(2 * d.window.padding[axis] <= d.window.kernel[axis],
            "padding must be at most half the kernel");
  }
  return d;
}

LayerDesc batch_norm(Builder& b, const LayerSpec& s) {
  LayerDesc d = b.start(LayerKind::batch_norm);
  b.check(s.in == b.shape.channels, "expected ", s.in, " features, got ", b.shape.channels);
  d.eps = s.eps;
  b.parametrize(d, s, s.has_weight ? s.in : 0, s.has_bias ? s.in : 0, b.order, b.order);
  return d;
}

LayerDesc layer_norm(Builder& b, const LayerSpec& s) {
  LayerDesc d = b.start(LayerKind::layer_norm);
  const Shape& in = b.shape;
  const std::vector<index_t> all = b.vector
                                       ? std::vector<index_t>{in.channels}
                                       : std::vector<index_t>{in.channels, in.height, in.width};
  b.check(s.shape == all, "expected samples of the normalised shape ", list(s.shape),
          " (all features of a sample), got ", text(in));
  d.eps = s.eps;
  const auto order = b.vector ? b.order : channels_first_index(in);
  b.parametrize(d, s, s.has_weight ? in.size() : 0, s.has_bias ? in.size() : 0, order, order);
  return d;
}

LayerDesc append_parameter(Builder& b, const LayerSpec& s) {
  LayerDesc d = b.start(LayerKind::append_parameter);
  b.check(b.vector && b.order.empty(), "expected a vector of outputs, got ", text(b.shape));
  b.check(s.out > 0, "expected a parameter of at least one element, got ", s.out);
  d.out.channels = b.shape.channels + s.out;
  b.parametrize(d, s, s.out, 0, {}, {});
  return d;
}

void flatten(Builder& b) {
  if (!b.vector && b.shape.pixels() > 1) b.order = channels_first_index(b.shape);
  b.shape = {1, 1, b.shape.size()};
  b.vector = true;
}

LayerDesc make_layer(Builder& b, const LayerSpec& s) {
  if (s.kind == "linear") return linear(b, s);
  if (s.kind == "conv2d") return conv2d(b, s);
  if (s.kind == "batch_norm") return batch_norm(b, s);
  if (s.kind == "layer_norm") return layer_norm(b, s);
  if (s.kind == "max_pool2d") return pool(b, s, LayerKind::max_pool);
  if (s.kind == "avg_pool2d" || s.kind == "global_avg_pool") {
    return pool(b, s, LayerKind::average_pool);
  }
  if (s.kind == "append_parameter") return append_parameter(b, s);
  const auto found = simple_kinds().find(s.kind);
  b.check(found != simple_kinds().end(), "no layer of this kind");
  LayerDesc d = b.start(found->second);
  d.alpha = s.alpha;
  return d;
}

Shape input_shape(const std::vector<index_t>& input) {
  require(input.size() == 1 || input.size() == 3,
          "input shape: expected [features] or [channels, height, width], got ", input.size(),
          " dimensions");
  for (index_t n : input) require(n > 0, "input shape: expected positive sizes, got ", n);
  return input.size() == 1 ? Shape{1, 1, input[0]} : Shape{input[1], input[2], input[0]};
}

}  // namespace

Program::Program(const std::vector<index_t>& input, const std::vector<LayerSpec>& layers,
                 LossSpec loss)
    : input_(input_shape(input)), loss_(loss_kind(loss)) {
  sum_over_ways_ = loss.reduction == "sum_over_ways";
  Builder b;
  b.shape = input_;
  b.vector = input.size() == 1;
  for (const LayerSpec& spec : layers) {
    if (spec.kind == "flatten") {
      flatten(b);
      continue;
    }
    b.begin(spec, index_t(names_.size()));
    LayerDesc d = make_layer(b, spec);
    if (d.kind == LayerKind::bilinear) {
      geometries_.push_back(
          std::make_unique<ConvGeometry>(make_conv_geometry(d.in, d.out, d.window)));
      d.geometry = geometries_.back().get();
    }
    b.shape = d.out;
    layers_.push_back(d);
    names_.push_back(spec.name);
  }
  require(b.param_count > 0, "the model has no parameters, so there is nothing to adapt");
  require(b.order.empty() && b.shape.pixels() == 1, "the model's output must be a vector, got ",
          text(b.shape), "; end it with a Linear layer");
  const bool gaussian = loss_ >= LossKind::gaussian_policy && loss_ <= LossKind::gaussian_kl;
  require(!gaussian || b.shape.channels % 2 == 0, loss.kind,
          " expects outputs (mean, log_std) of even size, got ", b.shape.channels);
  output_ = b.shape;
  parameters_ = std::move(b.parameters);
  param_count_ = b.param_count;
  for (const Parameter& p : parameters_) segments_.push_back({p.offset, p.count});
  fuse();
  choose_chunk();
  place_tables();
  while (layers_[first_trainable_].param_count == 0) ++first_trainable_;
  choose_strips();
  choose_folds();
}

namespace {

// What joins the layer before it, so that the data are swept less often. A batch norm takes a ReLU,
// and a max pooling whose windows neither overlap nor leave gaps nor reach over the border; both
// commute. A dense layer takes a ReLU and leaves its backward passes to the dense layer behind,
// which masks what it hands down.
bool joins(const LayerDesc& before, const LayerDesc& next, const LayerDesc* behind) {
  if (before.dense()) {
    return next.kind == LayerKind::relu && !before.relu && before.out.channels > 1 && behind &&
           behind->dense();
  }
  const bool plain = before.kind == LayerKind::batch_norm;
  if (!plain && before.kind != LayerKind::batch_norm_pool) return false;
  if (next.kind == LayerKind::relu) return !before.relu;
  const Window& w = next.window;
  return plain && next.kind == LayerKind::max_pool && w.kernel[0] == w.stride[0] &&
         w.kernel[1] == w.stride[1] && w.padding[0] == 0 && w.padding[1] == 0;
}

void join(LayerDesc& before, const LayerDesc& next, LayerDesc* behind) {
  if (next.kind == LayerKind::relu) {
    before.relu = true;
    if (before.dense()) behind->relu_input = true;
  } else {
    before.kind = LayerKind::batch_norm_pool;
    before.window = next.window;
    before.out = next.out;
  }
}

}  // namespace

void Program::fuse() {
  std::vector<LayerDesc> fused;
  std::vector<std::string> names;
  for (size_t i = 0; i < layers_.size(); ++i) {
    LayerDesc* behind = i + 1 < layers_.size() ? &layers_[i + 1] : nullptr;
    if (!fused.empty() && joins(fused.back(), layers_[i], behind)) {
      join(fused.back(), layers_[i], behind);
      names.back() += "+" + names_[i];
    } else {
      fused.push_back(layers_[i]);
      names.push_back(names_[i]);
    }
  }
  layers_ = std::move(fused);
  names_ = std::move(names);
}

// Few inputs: else the convolution takes so long that sweeps of its output don't matter.
void Program::choose_strips() {
  constexpr index_t kMostInputs = 64;
  if (first_trainable_ + 1 == index_t(layers_.size())) return;
  LayerDesc& conv = layers_[first_trainable_];
  const LayerDesc& norm = layers_[first_trainable_ + 1];
  const Window& w = conv.window;
  if (conv.kind != LayerKind::bilinear || norm.kind != LayerKind::batch_norm_pool) return;
  if (conv.dense() || w.stride[0] * w.stride[1] != 1) return;
  if (w.kernel[0] * w.kernel[1] * conv.in.channels > kMostInputs) return;
  conv.strip_rows = norm.in.height - (norm.out.height - 1) * norm.window.kernel[0];
}

void Program::choose_folds() {
  constexpr index_t kMostInputs = 32;  // the rows of a tile: outputs are mapped once
  if (first_trainable_ + 1 == index_t(layers_.size())) return;
  LayerDesc& conv = layers_[first_trainable_];
  const LayerDesc& norm = layers_[first_trainable_ + 1];
  if (conv.kind != LayerKind::bilinear || norm.kind != LayerKind::batch_norm_pool) return;
  if (conv.window.kernel[0] * conv.window.kernel[1] * conv.in.channels > kMostInputs) return;
  conv.folds_norm = norm.window.kernel[0] == 2 && norm.window.kernel[1] == 2 &&
                    norm.in.height % 2 == 0 && norm.in.width % 2 == 0;
}

void Program::choose_chunk() {
  constexpr index_t kCacheBytes = 640 << 10, kLeast = 64;
  index_t elements = input_.size();  // of a sample: outputs, adjoints and the tangents of both
  for (const LayerDesc& d : layers_) {
    const bool across = d.kind == LayerKind::batch_norm || d.kind == LayerKind::batch_norm_pool ||
                        d.in.pixels() > 1 || (d.kind == LayerKind::bilinear && !d.dense());
    if (across) return;
    elements += 4 * d.out.size();
  }
  chunk_ = max_of(kLeast, kCacheBytes / (index_t(sizeof(float)) * elements) / 16 * 16);
}

double Program::loss_scale(index_t samples) const {
  const double n = double(samples), outputs = double(output_.size());
  if (loss_ == LossKind::squared_error) return 1.0 / (n * outputs);
  return (sum_over_ways_ ? outputs : 1.0) / n;
}

void Program::place_tables() {
  table_bytes_ = align_up(index_t(segments_.size() * sizeof(Segment)), kAlignment);
  for (Parameter& p : parameters_) {
    p.table = table_bytes_;
    table_bytes_ += align_up(index_t(p.index.size() * sizeof(std::int32_t)), kAlignment);
  }
}

std::vector<char> Program::tables() const {
  std::vector<char> bytes(table_bytes_);
  std::memcpy(bytes.data(), segments_.data(), segments_.size() * sizeof(Segment));
  for (const Parameter& p : parameters_) {
    if (p.index.empty()) continue;
    std::memcpy(bytes.data() + p.table, p.index.data(), p.index.size() * sizeof(std::int32_t));
  }
  return bytes;
}

index_t Program::target_size() const { return loss_target_size(loss_, output_.size()); }

}  // namespace fm
