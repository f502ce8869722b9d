// Linear and Conv2d for all tasks at once: y = w * x + b, linear in w and in x.
//
//   backward           dx = w' dy            dw = dy x'             db = sum dy
//   tangent_forward    ty = tw * x + w * tx + tb
//   tangent_backward   tdx = w' tdy + tw' dy tdw = tdy x' + dy tx'  tdb = sum tdy
//
// x [T, N, in], y [T, N, out] channels last; w [T, kernel pixels * in channels, out channels] and
// the bias behind it. A tangent is the same product with two operand pairs. This file turns a pass
// into at most two products (bilinear.h), which may be one launch; bilinear_choice.cu chooses their
// arithmetic and tiles.
//
// Which arithmetic, and where a long sum is cut into parts, depends on the layer and the samples of
// a task alone; tiles and launches depend on the number of tasks too, but change no bit. The parts
// of `dw` are in scratch: [T, scratch_count], of which a task's parts come first.
#include "cuda/bilinear.h"

#include <limits>

#include "cuda/kernels.h"
#include "cuda/pack.cuh"

namespace FM_CUDA {
namespace {

int small_int(index_t value, const char* what) {
  require(value <= std::numeric_limits<int>::max(), "bilinear: ", what, " of one task are ", value,
          ", at most 2^31 - 1 expected; pass fewer samples at a time");
  return int(value);
}

ProductShape shape_of(const LayerDesc& d, index_t samples, Form form) {
  const index_t kernel = d.window.kernel[0] * d.window.kernel[1];
  const bool inputs = form == Form::inputs;
  const Shape &source = inputs ? d.out : d.in, &pixels = inputs ? d.in : d.out;
  small_int(samples * max_of(d.in.size(), d.out.size()), "activations");
  require(max_of(source.height, source.width) < 1 << 14, "bilinear: images of up to ", 1 << 14,
          " pixels in height and width expected, got ", source.height, " x ", source.width);
  ProductShape s{};
  s.samples = int(samples);
  s.height = int(source.height);
  s.width = int(source.width);
  s.channels = int(source.channels);
  s.pixel_height = int(pixels.height);
  s.pixel_width = int(pixels.width);
  for (int axis = 0; axis < 2; ++axis) {
    s.kernel[axis] = int(d.window.kernel[axis]);
    s.stride[axis] = int(d.window.stride[axis]);
    s.padding[axis] = int(d.window.padding[axis]);
  }
  s.in = int(d.in.channels);
  s.out = int(d.out.channels);
  s.groups = 1;
  s.by_channels = Divisor(s.channels);
  s.by_pixels = Divisor(pixels.pixels());
  s.by_pixel_width = Divisor(pixels.width);
  const int inputs_of_output = small_int(kernel * d.in.channels, "weights");
  const int all_pixels = int(samples * pixels.pixels());
  switch (form) {
    case Form::outputs:
      s.rows = all_pixels;
      s.columns = s.out;
      s.depth = inputs_of_output;
      break;
    case Form::inputs: {
      const auto each = [&](int axis, index_t n) {
        return (n + s.stride[axis] - 1) / s.stride[axis];
      };
      s.groups = s.stride[0] * s.stride[1];
      s.rows = int(samples * each(0, pixels.height) * each(1, pixels.width));
      s.columns = s.in;
      s.depth = int(each(0, s.kernel[0]) * each(1, s.kernel[1])) * s.out;
      break;
    }
    case Form::weights: {
      s.rows = inputs_of_output;
      s.columns = s.out;
      s.depth = all_pixels;
      const index_t parts = gradient_parts(d, samples);
      s.part = int(align_up((s.depth + parts - 1) / parts, kDepthAlign));
      s.groups = max_of(1, (s.depth + s.part - 1) / max_of(1, s.part));
      break;
    }
  }
  return s;
}

template <class S>
bool aligned(const S* p, index_t stride) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride * index_t(sizeof(S)) % 16 == 0;
}

// A block's warps are chunks of the parts, their lanes elements.
constexpr unsigned kReduceElements = 32, kReduceChunks = 4;

template <class S>
struct Reduce {
  const S* parts;
  S* result;
  const S* base;
  index_t parts_stride, part_stride, result_stride, base_stride;  // elements
  index_t tasks, weights, bias_offset, outputs;
  int count;
  S weight_scale, bias_scale;
  const S *weight_rate, *bias_rate;
};

// result = base + scale * rate * the sum of a task's parts: of each chunk of them in ascending
// order, then of the chunks. Few elements of many parts would be too few threads to read them.
template <class S>
FM_KERNEL void bilinear_reduce_kernel(const Reduce<S> p) {
  await_previous_kernels();
  S* chunks = shared_memory<S>();  // [kReduceChunks, kReduceElements]
  const int lane = int(threadIdx.x % kReduceElements), chunk = int(threadIdx.x / kReduceElements);
  const int each = (p.count + int(kReduceChunks) - 1) / int(kReduceChunks);
  const int first = min_of(p.count, chunk * each), end = min_of(p.count, first + each);
  index_t e = index_t(blockIdx.x) * kReduceElements + lane;
  const bool inside = e < p.weights + p.outputs, is_bias = e >= p.weights;
  if (is_bias) e += p.bias_offset - p.weights;
  const S* rate = is_bias ? p.bias_rate : p.weight_rate;
  const S scale = (is_bias ? p.bias_scale : p.weight_scale) * (rate ? *rate : S(1));
  for (index_t task = blockIdx.y; task < p.tasks; task += gridDim.y) {
    const S* part = p.parts + task * p.parts_stride + e;
    S sum = 0;
    if (inside) {
      FM_UNROLL_BY_EIGHT
      for (int i = first; i < end; ++i) sum += part[i * p.part_stride];
    }
    chunks[threadIdx.x] = sum;
    __syncthreads();
    if (inside && chunk == 0) {
      for (int i = 1; i < int(kReduceChunks); ++i) sum += chunks[i * int(kReduceElements) + lane];
      p.result[task * p.result_stride + e] =
          (p.base ? p.base[task * p.base_stride + e] : S(0)) + scale * sum;
    }
    __syncthreads();
  }
}

// The passes of one layer.
template <class S>
class Passes {
 public:
  Passes(const LayerArgs<S>& args, const Exec& exec, Chooser chooser)
      : a_(args),
        d_(*args.desc),
        exec_(exec),
        chooser_(chooser),
        in_(args.samples * d_.in.size()),
        out_(args.samples * d_.out.size()) {}

  void run(Pass pass) const {
    if (a_.tasks == 0) return;
    switch (pass) {
      case Pass::forward: {
        Product<S> p = product(Form::outputs, {a_.x, a_.w, in_, a_.w_stride}, {});
        p.relu = d_.relu;
        if (d_.relu) write_signs(p, a_.saved);
        return outputs(p, a_.w, a_.w_stride, a_.y);
      }
      case Pass::tangent_forward: {
        Product<S> p = product(Form::outputs, {a_.x, a_.tw, in_, a_.tw_stride},
                               {a_.tx, a_.w, in_, a_.w_stride});
        if (d_.relu) read_signs(p, a_.saved);
        return outputs(p, a_.tw, a_.tw_stride, a_.ty);
      }
      case Pass::backward: {
        // a norm above that leaves its map to this layer has written no dy
        const S* dy = a_.above ? a_.y : a_.dy;
        return adjoints(product(Form::inputs, {a_.dy, a_.w, out_, a_.w_stride}, {}), a_.dx,
                        product(Form::weights, {a_.x, dy, in_, out_}, {}), a_.dw);
      }
      case Pass::tangent_backward: {
        return adjoints(
            product(Form::inputs, {a_.tdy, a_.w, out_, a_.w_stride},
                    {a_.dy, a_.tw, out_, a_.tw_stride}),
            a_.tdx, product(Form::weights, {a_.x, a_.tdy, in_, out_}, {a_.tx, a_.dy, in_, out_}),
            a_.tdw);
      }
    }
  }

 private:
  using Pair = OperandPair<S>;

  // Pairs with a null operand are zero.
  Product<S> product(Form form, Pair first, Pair second) const {
    Product<S> p;
    p.shape = shape_of(d_, a_.samples, form);
    for (const Pair& pair : {first, second}) {
      if (pair.a && pair.b) p.pair[p.pairs++] = pair;
    }
    return p;
  }

  // The signs of a ReLU's outputs that a layer saves, as many as the product has results.
  static void size_signs(Product<S>& p) {
    p.sign_words = int(sign_words(p.shape.columns));
    p.sign_stride = index_t(p.shape.rows) * p.sign_words * index_t(sizeof(S) / sizeof(unsigned));
  }
  static void write_signs(Product<S>& p, S* saved) {
    size_signs(p);
    p.signs = reinterpret_cast<unsigned*>(saved);
  }
  static void read_signs(Product<S>& p, const S* saved) {
    size_signs(p);
    p.mask = reinterpret_cast<const unsigned*>(saved);
  }

  // Where a product's results go, and how wide its accesses may be.
  void place(Product<S>& p, S* result, index_t stride) const {
    constexpr index_t kUnit = 16 / sizeof(S);
    p.result = result;
    p.result_stride = stride;
    p.wide_a = p.shape.channels % kUnit == 0;
    p.wide_b = p.shape.out % kUnit == 0;  // rows of the weights, and of dy
    for (int i = 0; i < p.pairs; ++i) {
      p.wide_a = p.wide_a && aligned(p.pair[i].a, p.pair[i].a_stride);
      p.wide_b = p.wide_b && aligned(p.pair[i].b, p.pair[i].b_stride);
    }
    p.wide_out = p.shape.columns % 4 == 0 && aligned(result, stride) &&
                 aligned(result, p.part_stride) && aligned(p.base, p.base_stride);
  }
  Choice choice(const Product<S>& p) const {
    return chooser_(p.shape, a_.tasks, exec_.precision, sizeof(S));
  }

  void outputs(Product<S>& p, const S* w, index_t w_stride, S* y) const {
    if (d_.has_bias && w) {
      p.bias = w + d_.bias_offset;
      p.bias_stride = w_stride;
    }
    place(p, y, out_);
    launch_outputs(p, a_.tasks, choice(p), exec_);
  }

  // dx by one product, dw by the other, or what there is to be of them.
  void adjoints(Product<S> inputs, S* dx, Product<S> weights, S* dw) const {
    if (d_.relu_input) read_signs(inputs, a_.saved_below);
    place(inputs, dx, in_);
    weights.bias_offset = d_.has_bias ? d_.bias_offset : 0;
    const bool in_parts = weights.shape.groups > 1;
    if (in_parts) {
      weights.part_stride = d_.param_count;
      place(weights, static_cast<S*>(exec_.scratch), scratch_count(d_, a_.samples));
    } else {
      weights.base = a_.dw_base;
      weights.base_stride = a_.dw_base_stride;
      weights.weight_scale = a_.weight_scale;
      weights.bias_scale = a_.bias_scale;
      weights.weight_rate = a_.weight_rate;
      weights.bias_rate = a_.bias_rate;
      place(weights, dw, a_.dw_stride);
    }
    // one of the weights that dx hangs on may be where dw goes
    const bool apart = !in_parts && (dw == inputs.pair[0].b || dw == inputs.pair[1].b);
    Choice both;
    if (dx && dw && !apart && choose_together(of(weights), of(inputs), a_.tasks, both)) {
      launch_adjoints(weights, inputs, a_.tasks, both, exec_);
    } else {
      if (dx) launch_inputs(inputs, a_.tasks, choice(inputs), exec_);
      if (dw && a_.above) {
        const Arithmetic arithmetic = choice(weights).arithmetic;
        launch_pooled_weights(weights, *a_.above, a_.tasks, arithmetic, exec_);
      } else if (dw) {
        launch_weights(weights, a_.tasks, choice(weights), exec_);
      }
    }
    if (dw && in_parts) reduce(weights, dw);
  }
  Chosen of(const Product<S>& p) const { return {p.shape, p.pairs, choice(p)}; }

  void reduce(const Product<S>& p, S* dw) const {
    const Reduce<S> r{p.result,
                      dw,
                      a_.dw_base,
                      p.result_stride,
                      p.part_stride,
                      a_.dw_stride,
                      a_.dw_base_stride,
                      a_.tasks,
                      index_t(p.shape.rows) * p.shape.columns,
                      d_.bias_offset,
                      d_.has_bias ? p.shape.columns : 0,
                      p.shape.groups,
                      a_.weight_scale,
                      a_.bias_scale,
                      a_.weight_rate,
                      a_.bias_rate};
    const dim3 grid(blocks_for(r.weights + r.outputs, kReduceElements),
                    unsigned(min_of<index_t>(a_.tasks, 65535)));
    constexpr unsigned kBlock = kReduceElements * kReduceChunks;
    launch(bilinear_reduce_kernel<S>, grid, kBlock, kBlock * sizeof(S), exec_, r);
  }

  const LayerArgs<S>& a_;
  const LayerDesc& d_;
  const Exec& exec_;
  Chooser chooser_;
  index_t in_, out_;  // elements of a task's activations
};

}  // namespace

template <class S>
void bilinear_pass(Pass pass, const LayerArgs<S>& a, const Exec& exec, Chooser chooser) {
  Passes<S>(a, exec, chooser).run(pass);
}

template <class S>
void bilinear_forward(const LayerArgs<S>& a, const Exec& exec) {
  bilinear_pass(Pass::forward, a, exec, choose);
}
template <class S>
void bilinear_backward(const LayerArgs<S>& a, const Exec& exec) {
  bilinear_pass(Pass::backward, a, exec, choose);
}
template <class S>
void bilinear_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  bilinear_pass(Pass::tangent_forward, a, exec, choose);
}
template <class S>
void bilinear_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  bilinear_pass(Pass::tangent_backward, a, exec, choose);
}

#define FM_INSTANTIATE(S)                                                       \
  template void bilinear_pass(Pass, const LayerArgs<S>&, const Exec&, Chooser); \
  template void bilinear_forward(const LayerArgs<S>&, const Exec&);             \
  template void bilinear_backward(const LayerArgs<S>&, const Exec&);            \
  template void bilinear_tangent_forward(const LayerArgs<S>&, const Exec&);     \
  template void bilinear_tangent_backward(const LayerArgs<S>&, const Exec&)
FM_INSTANTIATE(float);
FM_INSTANTIATE(double);

}  // namespace FM_CUDA
