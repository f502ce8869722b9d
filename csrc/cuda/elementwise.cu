// Activations: the scalar functions of math/activation.h swept over all tasks at once.
//
//   forward            y   = f(x)
//   backward           dx  = f'(x) dy
//   tangent_forward    ty  = f'(x) tx
//   tangent_backward   tdx = f''(x) tx dy + f'(x) tdy
//
// Activations are dense over tasks, so a layer is one flat array of n = T N features. A thread
// takes one pack, whatever is left of it at the end. Nothing is saved but y, which f' and f'' may
// want. Kinds whose f'' is zero share the kernel of the slope for three of the passes.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "math/activation.h"

namespace FM_CUDA {
namespace {

template <class S>
struct ElementwiseParams {
  const S *x, *y;    // y is not read by the forward pass
  const S* v;        // what the slope is multiplied with, null: zero
  const S *tx, *dy;  // of the curved term
  S* out;
  S alpha;
  index_t n;
};

enum class Sweep { value, slope, curved };

template <class S, class F, Sweep Kind>
FM_DEVICE S element(const ElementwiseParams<S>& p, S x, S y, S v, S tx, S dy) {
  if constexpr (Kind == Sweep::value) {
    return F::f(x, p.alpha);
  } else if constexpr (Kind == Sweep::slope) {
    return F::df(x, y, p.alpha) * v;
  } else {
    return F::d2f(x, y, p.alpha) * tx * dy + F::df(x, y, p.alpha) * v;
  }
}

// The elements [i, i + W), all of them inside.
template <class S, class F, Sweep Kind, int W>
FM_DEVICE void apply_pack(const ElementwiseParams<S>& p, index_t i) {
  const Pack<S, W> x = load<W>(p.x + i);
  Pack<S, W> y{}, v{}, tx{}, dy{}, out;
  if constexpr (Kind != Sweep::value) {
    y = load<W>(p.y + i);
    v = load_or_zero<W>(p.v, i);
  }
  if constexpr (Kind == Sweep::curved) {
    tx = load_or_zero<W>(p.tx, i);
    dy = load<W>(p.dy + i);
  }
  FM_UNROLL
  for (int w = 0; w < W; ++w) {
    out.at[w] = element<S, F, Kind>(p, x.at[w], y.at[w], v.at[w], tx.at[w], dy.at[w]);
  }
  store<W>(p.out + i, out);
}

template <class S, class F, Sweep Kind, int W>
FM_KERNEL void elementwise_kernel(const ElementwiseParams<S> p) {
  await_previous_kernels();
  const index_t i = (index_t(blockIdx.x) * blockDim.x + threadIdx.x) * W;
  if (i + W <= p.n) {
    apply_pack<S, F, Kind, W>(p, i);
  } else {
    for (index_t j = i; j < p.n; ++j) apply_pack<S, F, Kind, 1>(p, j);
  }
}

template <class S, class F, Sweep Kind>
void run(const ElementwiseParams<S>& p, const Exec& exec) {
  constexpr int W = kPack<S>;
  const bool wide = on_packs({p.x, p.y, p.v, p.tx, p.dy, p.out});
  const unsigned blocks = flat_blocks(divide_up(p.n, wide ? W : 1), "activation");
  if (wide) {
    launch(elementwise_kernel<S, F, Kind, W>, blocks, kThreads, 0, exec, p);
  } else {
    launch(elementwise_kernel<S, F, Kind, 1>, blocks, kThreads, 0, exec, p);
  }
}

template <class S>
ElementwiseParams<S> params_of(const LayerArgs<S>& a, const S* v, S* out) {
  return {a.x,
          a.y,
          v,
          nullptr,
          nullptr,
          out,
          S(a.desc->alpha),
          a.tasks * a.samples * a.desc->in.size()};
}

}  // namespace

template <class F, class S>
void elementwise_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<S, F, Sweep::value>(params_of<S>(a, nullptr, a.y), exec);
}

template <class F, class S>
void elementwise_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.dx) run<S, F, Sweep::slope>(params_of(a, a.dy, a.dx), exec);
}

template <class F, class S>
void elementwise_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<S, F, Sweep::slope>(params_of(a, a.tx, a.ty), exec);
}

template <class F, class S>
void elementwise_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.tdx) return;
  ElementwiseParams<S> p = params_of(a, a.tdy, a.tdx);
  if constexpr (F::kCurved) {
    p.tx = a.tx;
    p.dy = a.dy;
    run<S, F, Sweep::curved>(p, exec);
  } else {
    run<S, F, Sweep::slope>(p, exec);
  }
}

#define FM_ACTIVATION(S, F)                                                             \
  template void elementwise_forward<math::F>(const LayerArgs<S>&, const Exec&);         \
  template void elementwise_backward<math::F>(const LayerArgs<S>&, const Exec&);        \
  template void elementwise_tangent_forward<math::F>(const LayerArgs<S>&, const Exec&); \
  template void elementwise_tangent_backward<math::F>(const LayerArgs<S>&, const Exec&);
#define FM_ACTIVATIONS(S)     \
  FM_ACTIVATION(S, Relu)      \
  FM_ACTIVATION(S, LeakyRelu) \
  FM_ACTIVATION(S, Tanh)      \
  FM_ACTIVATION(S, Sigmoid)   \
  FM_ACTIVATION(S, Silu)      \
  FM_ACTIVATION(S, Gelu)      \
  FM_ACTIVATION(S, GeluTanh)  \
  FM_ACTIVATION(S, Elu)       \
  FM_ACTIVATION(S, Softplus)

FM_ACTIVATIONS(float)
FM_ACTIVATIONS(double)

}  // namespace FM_CUDA
