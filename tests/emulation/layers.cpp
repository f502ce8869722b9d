// Layers, losses, vector operations, optimizers and samplers of the emulated CUDA backend, one call
// each, for tests/test_cuda_layers.py and its neighbours. Integers are 64 bits wide; every function
// returns 0, or 1 and leaves the reason in `last_error`.
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/sampling.h"
#include "guarded.h"
#include "math/activation.h"

using namespace fm;
namespace emulated = fm::cuda_emulated;

namespace {

// body(S()) for the scalar of a call
template <class Body>
int with_scalar(index_t double_precision, Body&& body) {
  return guarded([&] { double_precision ? body(double()) : body(float()); });
}

#define FM_OPS(layer)                                           \
  {emulated::layer##_forward<S>, emulated::layer##_backward<S>, \
   emulated::layer##_tangent_forward<S>, emulated::layer##_tangent_backward<S>}

template <class F, class S>
LayerOps<S> activation() {
  return {emulated::elementwise_forward<F, S>, emulated::elementwise_backward<F, S>,
          emulated::elementwise_tangent_forward<F, S>,
          emulated::elementwise_tangent_backward<F, S>};
}

template <class S>
LayerOps<S> ops_of(LayerKind kind) {
  switch (kind) {
    case LayerKind::batch_norm:
      return FM_OPS(batch_norm);
    case LayerKind::batch_norm_pool:
      return FM_OPS(batch_norm_pool);
    case LayerKind::layer_norm:
      return FM_OPS(layer_norm);
    case LayerKind::relu:
      return activation<math::Relu, S>();
    case LayerKind::leaky_relu:
      return activation<math::LeakyRelu, S>();
    case LayerKind::tanh:
      return activation<math::Tanh, S>();
    case LayerKind::sigmoid:
      return activation<math::Sigmoid, S>();
    case LayerKind::silu:
      return activation<math::Silu, S>();
    case LayerKind::gelu:
      return activation<math::Gelu, S>();
    case LayerKind::gelu_tanh:
      return activation<math::GeluTanh, S>();
    case LayerKind::elu:
      return activation<math::Elu, S>();
    case LayerKind::softplus:
      return activation<math::Softplus, S>();
    case LayerKind::max_pool:
      return FM_OPS(max_pool);
    case LayerKind::average_pool:
      return FM_OPS(average_pool);
    case LayerKind::append_parameter:
      return FM_OPS(append);
    default:
      fail("no such layer here");
  }
}

}  // namespace

extern "C" {

struct Layer {
  index_t kind;
  index_t in[3], out[3];  // height, width, channels
  index_t kernel[2], stride[2], padding[2];
  index_t has_weight, has_bias, relu, bias_offset, param_count;
  double eps, alpha;
};

struct Buffers {
  index_t double_precision, tasks, samples, w_stride, tw_stride, dw_stride;
  const void *x, *w, *dy, *tx, *tw, *tdy;
  void *y, *dx, *dw, *ty, *tdx, *tdw, *saved, *scratch;
};

void shuffle(index_t seed) { emulated::shuffle_threads(std::uint64_t(seed)); }

static LayerDesc desc_of(const Layer& l) {
  LayerDesc d;
  d.kind = LayerKind(l.kind);
  d.in = {l.in[0], l.in[1], l.in[2]};
  d.out = {l.out[0], l.out[1], l.out[2]};
  for (int i = 0; i < 2; ++i) {
    d.window.kernel[i] = l.kernel[i];
    d.window.stride[i] = l.stride[i];
    d.window.padding[i] = l.padding[i];
  }
  d.has_weight = l.has_weight;
  d.has_bias = l.has_bias;
  d.relu = l.relu;
  d.bias_offset = l.bias_offset;
  d.param_count = l.param_count;
  d.eps = l.eps;
  d.alpha = l.alpha;
  return d;
}

index_t saved_elements(const Layer* l, index_t samples) {
  return saved_count(desc_of(*l), samples);
}
index_t scratch_elements(const Layer* l, index_t samples) {
  return scratch_count(desc_of(*l), samples);
}

int layer_pass(const Layer* l, const Buffers* b, index_t pass) {
  return with_scalar(b->double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    const LayerDesc d = desc_of(*l);
    const auto in = [](const void* p) { return static_cast<const S*>(p); };
    const auto out = [](void* p) { return static_cast<S*>(p); };
    LayerArgs<S> a;
    a.desc = &d;
    a.tasks = b->tasks;
    a.samples = b->samples;
    a.w_stride = b->w_stride;
    a.tw_stride = b->tw_stride;
    a.dw_stride = b->dw_stride;
    a.x = in(b->x);
    a.w = in(b->w);
    a.dy = in(b->dy);
    a.tx = in(b->tx);
    a.tw = in(b->tw);
    a.tdy = in(b->tdy);
    a.y = out(b->y);
    a.dx = out(b->dx);
    a.dw = out(b->dw);
    a.ty = out(b->ty);
    a.tdx = out(b->tdx);
    a.tdw = out(b->tdw);
    a.saved = out(b->saved);
    // a norm with an output of fewer pixels does a mean over images as well
    LayerDesc pool;
    pool.kind = LayerKind::average_pool;
    pool.in = d.in;
    pool.out = d.out;
    LayerArgs<S> mean = a;
    mean.desc = &pool;
    if (d.kind == LayerKind::batch_norm && d.out.pixels() != d.in.pixels()) {
      a.above = &mean;
      a.dy = a.tdy = nullptr;
      a.y = a.ty = nullptr;
    }
    Exec exec;
    exec.scratch = b->scratch;
    const LayerOps<S> ops = ops_of<S>(d.kind);
    const typename LayerOps<S>::Pass passes[] = {ops.forward, ops.backward, ops.tangent_forward,
                                                 ops.tangent_backward};
    passes[pass](a, exec);
  });
}

index_t loss_scratch_elements(index_t samples) { return loss_scratch_count(samples); }

// kind as LossKind; hessian: 0 or 1
int loss(index_t kind, index_t hessian, index_t double_precision, index_t tasks, index_t samples,
         index_t outputs, double scale, const void* z, const void* target, const void* tz, void* dz,
         void* tdz, double* value, double* accuracy, index_t value_stride, void* scratch) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    LossArgs<S> a;
    a.tasks = tasks;
    a.samples = samples;
    a.outputs = outputs;
    a.scale = S(scale);
    a.z = static_cast<const S*>(z);
    a.target = target;
    a.tz = static_cast<const S*>(tz);
    a.dz = static_cast<S*>(dz);
    a.tdz = static_cast<S*>(tdz);
    a.value = value;
    a.accuracy = accuracy;
    a.value_stride = value_stride;
    const LossOps<S> all[] = {
        {emulated::squared_error_value<S>, emulated::squared_error_hessian<S>},
        {emulated::cross_entropy_value<S>, emulated::cross_entropy_hessian<S>},
        {emulated::gaussian_policy_value<S>, emulated::gaussian_policy_hessian<S>}};
    Exec exec;
    exec.scratch = scratch;
    (hessian ? all[kind].hessian : all[kind].value)(a, exec);
  });
}

// a, b, out: vectors of all tasks, strides in elements
int vector(const char* name, index_t double_precision, index_t tasks, index_t n, const void* a,
           index_t a_stride, const void* b, index_t b_stride, void* out, index_t out_stride,
           double alpha, const void* rate, const Segment* segments, index_t segment_count,
           const void* per_segment, const void* per_parameter) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    const VectorOps<S> v = emulated::vector_ops<S>();
    const auto in = [](const void* p) { return static_cast<const S*>(p); };
    const Rows<const S> x{in(a), a_stride}, y{in(b), b_stride};
    const Rows<S> to{static_cast<S*>(out), out_stride};
    const StepRates<S> rates{segments, segment_count, in(per_segment), in(per_parameter)};
    const std::string what = name;
    if (what == "descend") return v.descend(rates, tasks, x, y, to, {});
    if (what == "scale_by_rates") return v.scale_by_rates(rates, tasks, y, to, {});
    if (what == "segment_dots") return v.segment_dots(rates, tasks, x, y, to, {});
    if (what == "negative_product") return v.negative_product(tasks, n, x, y, to, {});
    if (what == "update") return v.update(tasks, n, x, S(alpha), in(rate), y, to, {});
    if (what == "fill") return v.fill(tasks, n, S(alpha), to, {});
    if (what == "copy") return v.copy(tasks, n, y, to, {});
    if (what == "add") return v.add(tasks, n, y, to, {});
    if (what == "mean_rows") return v.mean_rows(tasks, n, 0, n, x.data, to.data, {});
    fail("no vector operation ", what);
  });
}

// [T, n] losses and accuracies; no tensors beside them
int mean_loss(index_t double_precision, index_t tasks, index_t n, const double* weights,
              double* loss, double* accuracy, void* out) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    emulated::vector_ops<S>().mean_tensors(nullptr, 0, tasks,
                                           {n, weights, loss, accuracy, static_cast<S*>(out)}, {});
  });
}

// src: within rows of `row` elements; index may hold nulls
int mean_tensors(index_t double_precision, index_t tasks, index_t row, index_t count,
                 const index_t* n, const std::int32_t* const* index, const void* const* src,
                 void* const* dst, index_t losses, const double* weights, double* loss,
                 double* accuracy, void* out) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    std::vector<Move<S>> moves(count);
    for (index_t i = 0; i < count; ++i) {
      moves[i] = {n[i], index[i], {static_cast<const S*>(src[i]), row}, {static_cast<S*>(dst[i])}};
    }
    emulated::vector_ops<S>().mean_tensors(
        moves.data(), count, tasks, {losses, weights, loss, accuracy, static_cast<S*>(out)}, {});
  });
}

// tensors of n[i] elements; index may hold nulls
int move(index_t scatter, index_t double_precision, index_t tasks, index_t count, const index_t* n,
         const std::int32_t* const* index, const void* const* src, void* const* dst) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    std::vector<Move<S>> moves(count);
    for (index_t i = 0; i < count; ++i) {
      moves[i].n = n[i];
      moves[i].index = index[i];
      moves[i].src = {static_cast<const S*>(src[i]), n[i]};
      moves[i].dst = {static_cast<S*>(dst[i]), n[i]};
    }
    const VectorOps<S> v = emulated::vector_ops<S>();
    (scatter ? v.scatter : v.gather)(moves.data(), count, tasks, {});
  });
}

int to_channels_last(index_t double_precision, index_t n, index_t channels, index_t pixels,
                     const void* src, void* dst) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    emulated::vector_ops<S>().to_channels_last(n, channels, pixels, static_cast<const S*>(src),
                                               static_cast<S*>(dst), {});
  });
}

int rate_table(index_t collect, index_t double_precision, index_t rows, index_t n,
               const std::uint8_t* adapted, const void* values, index_t per_tensor, void* out) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    const VectorOps<S> v = emulated::vector_ops<S>();
    (collect ? v.collect_rates : v.spread_rates)(rows, n, adapted, static_cast<const S*>(values),
                                                 per_tensor, static_cast<S*>(out), {});
  });
}

// options: lr, beta1, beta2, eps, weight decay, decoupled, maximize
int adam(index_t double_precision, index_t count, const index_t* n, const void* const* g,
         void* const* p, void* const* m, void* const* v, void* const* largest, float* const* steps,
         const double* options, const double* lr, unsigned* arrivals) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    std::vector<AdamTensor<S>> tensors(count);
    const auto of = [](void* const* list, index_t i) { return static_cast<S*>(list[i]); };
    for (index_t i = 0; i < count; ++i) {
      tensors[i] = {n[i],     static_cast<const S*>(g[i]),        of(p, i), of(m, i),
                    of(v, i), largest ? of(largest, i) : nullptr, steps[i]};
    }
    const math::AdamOptions o{options[0], options[1],      options[2],     options[3],
                              options[4], options[5] != 0, options[6] != 0};
    emulated::optimizer_ops<S>().adam(o, lr, arrivals, tensors.data(), count, {});
  });
}

// options: lr, momentum, dampening, weight decay, nesterov, maximize
int sgd(index_t double_precision, index_t count, const index_t* n, const void* const* g,
        void* const* p, void* const* buffers, index_t first, const double* options,
        const double* lr) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    std::vector<SgdTensor<S>> tensors(count);
    for (index_t i = 0; i < count; ++i) {
      tensors[i] = {n[i], static_cast<const S*>(g[i]), static_cast<S*>(p[i]),
                    buffers ? static_cast<S*>(buffers[i]) : nullptr, first != 0};
    }
    const math::SgdRule<S> rule{
        S(options[5] ? -1 : 1), S(options[3]),   S(options[0]), S(options[1]),
        S(1 - options[2]),      options[4] != 0, false};
    emulated::optimizer_ops<S>().sgd(rule, lr, tensors.data(), count, {});
  });
}

int task_words(std::uint64_t key, std::uint64_t first, index_t tasks, index_t plane, index_t count,
               std::uint32_t* words) {
  return guarded(
      [&] { emulated::task_words({key, first, tasks}, std::uint32_t(plane), count, words, {}); });
}

// ranges: low and high of amplitude, phase and x; stream: key and number of the next task
int sinusoids(index_t double_precision, tasks::DeviceStream* stream, index_t tasks, index_t support,
              index_t queries, const double* ranges, void* support_x, void* support_y,
              void* query_x, void* query_y, void* amplitudes, void* phases) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    const auto out = [](void* p) { return static_cast<S*>(p); };
    tasks::Sinusoids<S> c;
    c.stream.tasks = tasks;
    c.support = support;
    c.queries = queries;
    c.amplitude = {ranges[0], ranges[1]};
    c.phase = {ranges[2], ranges[3]};
    c.x = {ranges[4], ranges[5]};
    c.support_x = out(support_x);
    c.support_y = out(support_y);
    c.query_x = out(query_x);
    c.query_y = out(query_y);
    c.amplitudes = out(amplitudes);
    c.phases = out(phases);
    emulated::sampling_ops<S>().sinusoids(c, stream, {});
  });
}

// sizes: classes, drawings, ways, shots, queries
int episodes(const tasks::DeviceStream* stream, index_t tasks, const index_t* sizes,
             std::int64_t* support, std::int64_t* query, std::int64_t* support_labels,
             std::int64_t* query_labels) {
  return guarded([&] {
    const tasks::Episodes c{{0, 0, tasks}, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    const tasks::EpisodePlaces places{support, query, support_labels, query_labels};
    emulated::sampling_ops<float>().episodes(c, stream, places, {});
  });
}

// sizes: characters, drawings, channels, height, width; the stream is moved by `tasks`
int gather_images(index_t double_precision, const std::uint8_t* images, const index_t* sizes,
                  const index_t* quarters, index_t invert, index_t channels_last,
                  const std::int64_t* rows, index_t support, index_t query, void* support_x,
                  void* query_x, tasks::DeviceStream* stream, index_t tasks) {
  return with_scalar(double_precision, [&](auto scalar) {
    using S = decltype(scalar);
    tasks::Images m{images, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    for (int i = 0; i < 4; ++i) m.quarters[i] = int(quarters[i]);
    m.invert = invert;
    m.channels_last = channels_last;
    const tasks::ImagePlaces<S> places{
        rows, support, query, static_cast<S*>(support_x), static_cast<S*>(query_x), stream, tasks};
    emulated::sampling_ops<S>().images(m, places, {});
  });
}

}  // extern "C"
