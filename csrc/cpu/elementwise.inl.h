// Activations: three scalar functions of math/activation.h swept over contiguous data.

namespace FM_KERNELS {

constexpr index_t kSweep = 4096;  // elements a thread takes at a time

template <class F>
void elementwise_forward(const LayerArgs<S>& a, const Exec& exec) {
  const S alpha = S(a.desc->alpha);
  const S* FM_RESTRICT x = a.x;
  S* FM_RESTRICT y = a.y;
  parallel(exec, a.samples * a.desc->in.size(), kSweep, 8, [=](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) y[i] = F::f(x[i], alpha);
  });
}

template <class F>
void elementwise_slope(const LayerArgs<S>& a, const S* FM_RESTRICT v, S* FM_RESTRICT out,
                       const Exec& exec) {
  const S alpha = S(a.desc->alpha);
  const S* FM_RESTRICT x = a.x;
  const S* FM_RESTRICT y = a.y;
  parallel(exec, a.samples * a.desc->in.size(), kSweep, 8, [=](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) out[i] = F::df(x[i], y[i], alpha) * v[i];
  });
}

template <class F>
void elementwise_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.dx) elementwise_slope<F>(a, a.dy, a.dx, exec);
}

template <class F>
void elementwise_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  elementwise_slope<F>(a, a.tx, a.ty, exec);
}

template <class F>
void elementwise_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.tdx) return;
  if (!F::kCurved) return elementwise_slope<F>(a, a.tdy, a.tdx, exec);
  const S alpha = S(a.desc->alpha);
  const S* FM_RESTRICT x = a.x;
  const S* FM_RESTRICT y = a.y;
  const S* FM_RESTRICT tx = a.tx;
  const S* FM_RESTRICT dy = a.dy;
  const S* FM_RESTRICT tdy = a.tdy;
  S* FM_RESTRICT tdx = a.tdx;
  parallel(exec, a.samples * a.desc->in.size(), kSweep, 8, [=](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      tdx[i] = F::d2f(x[i], y[i], alpha) * tx[i] * dy[i] + F::df(x[i], y[i], alpha) * tdy[i];
    }
  });
}

}  // namespace FM_KERNELS
