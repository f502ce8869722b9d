// Linear and Conv2d for all tasks at once: y = w * x + b, linear in w and in x.
//
//   backward           dx = w' dy            dw = dy x'             db = sum dy
//   tangent_forward    ty = tw * x + w * tx + tb
//   tangent_backward   tdx = w' tdy + tw' dy tdw = tdy x' + dy tx'  tdb = sum tdy
//
// x [T, N, in], y [T, N, out] channels last; w [T, kernel pixels * in channels, out channels] and
// the bias behind it. A tangent is the same product with two operand pairs. This file turns a pass
// into at most two products (bilinear.h), and chooses their arithmetic and tiles.
//
// Which arithmetic, and where a long sum is cut into parts, depends on the layer and the samples of
// a task alone; tiles depend on the number of tasks too, but change no bit of a result. The parts
// of `dw` are in scratch: [T, scratch_count], of which a task's parts come first.
#include "cuda/bilinear.h"

#include <limits>

#include "cuda/kernels.h"

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

// A block's time grows with its tile and with what it copies for each multiplication; two blocks
// for each of an H100's 132 multiprocessors take no longer than fewer do.
TileShape choose_tile(const ProductShape& s, index_t tasks) {
  TileShape best = TileShape::t64x64;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < int(TileShape::count); ++i) {
    const double rows = kTileRows[i], columns = kTileColumns[i];
    const double blocks = double(tasks) * s.groups * blocks_for(s.rows, kTileRows[i]) *
                          blocks_for(s.columns, kTileColumns[i]);
    const double cost = max_of(blocks, 264.0) * rows * columns * (1 + 16 / rows + 16 / columns);
    if (cost < least) {
      least = cost;
      best = TileShape(i);
    }
  }
  return best;
}

// Products of vectors are not for tensor cores, which would multiply mostly zeros.
template <class S>
Arithmetic choose_arithmetic(const ProductShape& s, Precision precision) {
  if (sizeof(S) != 4 || s.columns < 4 || s.depth < 4) return Arithmetic::scalar;
  if (precision == Precision::tf32) return Arithmetic::tf32;
  if (precision == Precision::bfloat16) return Arithmetic::bfloat16;
  return Arithmetic::split_tf32;
}

template <class S>
bool aligned(const S* p, index_t stride) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride * index_t(sizeof(S)) % 16 == 0;
}

// One product of a pass, with at most two operand pairs; those with a null operand are zero.
template <class S>
class PassProduct {
 public:
  PassProduct(const LayerArgs<S>& a, Form form) : args_(a) {
    p_.shape = shape_of(*a.desc, a.samples, form);
  }

  void add(const S* x, index_t x_stride, const S* w, index_t w_stride) {
    if (x && w) p_.pair[p_.pairs++] = {x, w, x_stride, w_stride};
  }
  Product<S>& product() { return p_; }

  using Launcher = void (*)(Product<S>, index_t, Arithmetic, TileShape, const Exec&);
  void run(Launcher launcher, S* result, index_t stride, const Exec& exec) {
    constexpr index_t kUnit = 16 / sizeof(S);
    const ProductShape& s = p_.shape;
    p_.result = result;
    p_.result_stride = stride;
    // b is weights or dy with rows of `out`
    p_.wide_a = s.channels % kUnit == 0;
    p_.wide_b = s.out % kUnit == 0;
    for (int i = 0; i < p_.pairs; ++i) {
      p_.wide_a = p_.wide_a && aligned(p_.pair[i].a, p_.pair[i].a_stride);
      p_.wide_b = p_.wide_b && aligned(p_.pair[i].b, p_.pair[i].b_stride);
    }
    p_.wide_out = s.columns % 4 == 0 && aligned(result, stride) && aligned(p_.mask, stride) &&
                  aligned(p_.base, p_.base_stride) && aligned(result, p_.part_stride);
    if (args_.tasks > 0) {
      launcher(p_, args_.tasks, choose_arithmetic<S>(s, exec.precision),
               choose_tile(s, args_.tasks), exec);
    }
  }

 private:
  const LayerArgs<S>& args_;
  Product<S> p_;
};

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

// result = base + scale * rate * the sum of a task's parts, in ascending order
template <class S>
FM_KERNEL void bilinear_reduce_kernel(const Reduce<S> p) {
  index_t e = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= p.weights + p.outputs) return;
  const bool is_bias = e >= p.weights;
  if (is_bias) e += p.bias_offset - p.weights;
  const S* rate = is_bias ? p.bias_rate : p.weight_rate;
  const S scale = (is_bias ? p.bias_scale : p.weight_scale) * (rate ? *rate : S(1));
  for (index_t task = blockIdx.y; task < p.tasks; task += gridDim.y) {
    const S* part = p.parts + task * p.parts_stride + e;
    S sum = 0;
    for (int i = 0; i < p.count; ++i) sum += part[i * p.part_stride];
    p.result[task * p.result_stride + e] =
        (p.base ? p.base[task * p.base_stride + e] : S(0)) + scale * sum;
  }
}

template <class S>
index_t in_stride(const LayerArgs<S>& a) {
  return a.samples * a.desc->in.size();
}
template <class S>
index_t out_stride(const LayerArgs<S>& a) {
  return a.samples * a.desc->out.size();
}

template <class S>
void run_outputs(const LayerArgs<S>& a, PassProduct<S>& pass, const S* w, index_t w_stride, S* y,
                 const Exec& exec) {
  if (a.desc->has_bias && w) {
    pass.product().bias = w + a.desc->bias_offset;
    pass.product().bias_stride = w_stride;
  }
  pass.run(launch_outputs<S>, y, out_stride(a), exec);
}

template <class S>
void run_inputs(const LayerArgs<S>& a, PassProduct<S>& pass, S* dx, const Exec& exec) {
  if (a.desc->relu_input) pass.product().mask = a.x;
  pass.run(launch_inputs<S>, dx, in_stride(a), exec);
}

template <class S>
void run_weights(const LayerArgs<S>& a, PassProduct<S>& pass, S* dw, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  Product<S>& p = pass.product();
  p.bias_offset = d.has_bias ? d.bias_offset : 0;
  if (p.shape.groups == 1) {
    p.base = a.dw_base;
    p.base_stride = a.dw_base_stride;
    p.weight_scale = a.weight_scale;
    p.bias_scale = a.bias_scale;
    p.weight_rate = a.weight_rate;
    p.bias_rate = a.bias_rate;
    return pass.run(launch_weights<S>, dw, a.dw_stride, exec);
  }
  Reduce<S> r;
  r.parts_stride = scratch_count(d, a.samples);
  r.part_stride = d.param_count;
  p.part_stride = r.part_stride;
  S* parts = static_cast<S*>(exec.scratch);
  pass.run(launch_weights<S>, parts, r.parts_stride, exec);
  r.parts = parts;
  r.count = p.shape.groups;
  r.result = dw;
  r.result_stride = a.dw_stride;
  r.base = a.dw_base;
  r.base_stride = a.dw_base_stride;
  r.tasks = a.tasks;
  r.weights = index_t(p.shape.rows) * p.shape.columns;
  r.bias_offset = d.bias_offset;
  r.outputs = d.has_bias ? p.shape.columns : 0;
  r.weight_scale = a.weight_scale;
  r.bias_scale = a.bias_scale;
  r.weight_rate = a.weight_rate;
  r.bias_rate = a.bias_rate;
  constexpr unsigned kBlock = 128;
  if (a.tasks > 0) {
    launch(
        bilinear_reduce_kernel<S>,
        dim3(blocks_for(r.weights + r.outputs, kBlock), unsigned(min_of<index_t>(a.tasks, 65535))),
        kBlock, 0, exec, r);
  }
}

}  // namespace

template <class S>
void bilinear_forward(const LayerArgs<S>& a, const Exec& exec) {
  PassProduct<S> pass(a, Form::outputs);
  pass.add(a.x, in_stride(a), a.w, a.w_stride);
  pass.product().relu = a.desc->relu;
  run_outputs(a, pass, a.w, a.w_stride, a.y, exec);
}

template <class S>
void bilinear_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  PassProduct<S> pass(a, Form::outputs);
  pass.add(a.x, in_stride(a), a.tw, a.tw_stride);
  pass.add(a.tx, in_stride(a), a.w, a.w_stride);
  if (a.desc->relu) pass.product().mask = a.y;
  run_outputs(a, pass, a.tw, a.tw_stride, a.ty, exec);
}

template <class S>
void bilinear_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.dx) {
    PassProduct<S> pass(a, Form::inputs);
    pass.add(a.dy, out_stride(a), a.w, a.w_stride);
    run_inputs(a, pass, a.dx, exec);
  }
  if (a.dw) {
    PassProduct<S> pass(a, Form::weights);
    pass.add(a.x, in_stride(a), a.dy, out_stride(a));
    run_weights(a, pass, a.dw, exec);
  }
}

template <class S>
void bilinear_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.tdx) {
    PassProduct<S> pass(a, Form::inputs);
    pass.add(a.tdy, out_stride(a), a.w, a.w_stride);
    pass.add(a.dy, out_stride(a), a.tw, a.tw_stride);
    run_inputs(a, pass, a.tdx, exec);
  }
  if (a.tdw) {
    PassProduct<S> pass(a, Form::weights);
    pass.add(a.x, in_stride(a), a.tdy, out_stride(a));
    pass.add(a.tx, in_stride(a), a.dy, out_stride(a));
    run_weights(a, pass, a.tdw, exec);
  }
}

#define FM_INSTANTIATE(S)                                                   \
  template void bilinear_forward(const LayerArgs<S>&, const Exec&);         \
  template void bilinear_backward(const LayerArgs<S>&, const Exec&);        \
  template void bilinear_tangent_forward(const LayerArgs<S>&, const Exec&); \
  template void bilinear_tangent_backward(const LayerArgs<S>&, const Exec&)
FM_INSTANTIATE(float);
FM_INSTANTIATE(double);

}  // namespace FM_CUDA
