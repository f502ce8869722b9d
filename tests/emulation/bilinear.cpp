// Passes of one bilinear layer on the emulated CUDA backend, for tests/test_cuda_products.py.
//
// Unlike a pass of the engine's, a call may prescribe the arithmetic and the tile.
#include <cstring>
#include <string>

#include "cuda/bilinear.h"
#include "program/geometry.h"

using namespace fm;

namespace {

struct Call {
  index_t pass, double_precision, precision, arithmetic, tile,
      seed;  // arithmetic, tile: -1 = chosen
  index_t tasks, samples;
  index_t in[3], out[3];  // height, width, channels
  index_t kernel[2], stride[2], padding[2];
  index_t has_bias, relu, relu_input, bias_offset, param_count;
  index_t w_stride, tw_stride, dw_stride, dw_base_stride;
  const void *x, *w, *dy, *tx, *tw, *tdy;
  void *y, *dx, *dw, *ty, *tdx, *tdw;
  const void* dw_base;
  double weight_scale, bias_scale;
  const void *weight_rate, *bias_rate;
  void *scratch, *saved;
  const void* saved_below;
};

LayerDesc desc_of(const Call& c) {
  LayerDesc d;
  d.kind = LayerKind::bilinear;
  d.in = {c.in[0], c.in[1], c.in[2]};
  d.out = {c.out[0], c.out[1], c.out[2]};
  for (int i = 0; i < 2; ++i) {
    d.window.kernel[i] = c.kernel[i];
    d.window.stride[i] = c.stride[i];
    d.window.padding[i] = c.padding[i];
  }
  d.has_weight = true;
  d.has_bias = c.has_bias;
  d.relu = c.relu;
  d.relu_input = c.relu_input;
  d.bias_offset = c.bias_offset;
  d.param_count = c.param_count;
  return d;
}

thread_local const Call* current;

cuda_emulated::Choice choose_as_told(const cuda_emulated::ProductShape& shape, index_t tasks,
                                     Precision precision, std::size_t scalar_size) {
  cuda_emulated::Choice c = cuda_emulated::choose(shape, tasks, precision, scalar_size);
  if (current->arithmetic >= 0) c.arithmetic = cuda_emulated::Arithmetic(current->arithmetic);
  if (current->tile >= 0) c.tile = cuda_emulated::TileShape(current->tile);
  return c;
}

template <class S>
void run(const Call& c) {
  const LayerDesc d = desc_of(c);
  LayerArgs<S> a;
  a.desc = &d;
  a.tasks = c.tasks;
  a.samples = c.samples;
  a.w_stride = c.w_stride;
  a.tw_stride = c.tw_stride;
  a.dw_stride = c.dw_stride;
  a.dw_base_stride = c.dw_base_stride;
  const auto in = [](const void* p) { return static_cast<const S*>(p); };
  const auto out = [](void* p) { return static_cast<S*>(p); };
  a.x = in(c.x);
  a.w = in(c.w);
  a.dy = in(c.dy);
  a.tx = in(c.tx);
  a.tw = in(c.tw);
  a.tdy = in(c.tdy);
  a.y = out(c.y);
  a.dx = out(c.dx);
  a.dw = out(c.dw);
  a.ty = out(c.ty);
  a.tdx = out(c.tdx);
  a.tdw = out(c.tdw);
  a.dw_base = in(c.dw_base);
  a.saved = out(c.saved);
  a.saved_below = in(c.saved_below);
  a.weight_scale = S(c.weight_scale);
  a.bias_scale = S(c.bias_scale);
  a.weight_rate = in(c.weight_rate);
  a.bias_rate = in(c.bias_rate);
  Exec exec;
  exec.scratch = c.scratch;
  exec.precision = Precision(c.precision);
  current = &c;
  cuda_emulated::shuffle_threads(std::uint64_t(c.seed));
  cuda_emulated::bilinear_pass(cuda_emulated::Pass(c.pass), a, exec, choose_as_told);
}

}  // namespace

// Runs the pass. Returns 0, or 1 with the reason in `message`.
extern "C" int run_pass(const Call* c, char* message, index_t size) {
  try {
    c->double_precision ? run<double>(*c) : run<float>(*c);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), std::size_t(size - 1));
    return 1;
  }
}

extern "C" index_t scratch_elements(const Call* c) {
  return scratch_count(desc_of(*c), c->samples);
}

extern "C" index_t saved_elements(const Call* c) { return saved_count(desc_of(*c), c->samples); }

extern "C" index_t parts(const Call* c) { return gradient_parts(desc_of(*c), c->samples); }
