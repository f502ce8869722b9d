// Pooling over windows of an image, channels last. Padding never wins a maximum and counts as zeros
// in an average (PyTorch's count_include_pad).
//
//   max       y = x[winner]          dx[winner] += dy       tangents the same: the winner is kept
//   average   y = sum x / k          dx += dy / k           linear: tangents are the passes
//   themselves
//
// saved (max): the winning tap of every output, an integer as wide as the scalar, channels last.

namespace FM_KERNELS {

// Calls body(tap, input pixel offset) for the taps of output pixel (h, w) inside the image.
template <class Body>
FM_INLINE void for_taps(const LayerDesc& d, index_t h, index_t w, Body&& body) {
  const Window& win = d.window;
  for (index_t i = 0; i < win.kernel[0]; ++i) {
    const index_t row = h * win.stride[0] - win.padding[0] + i;
    if (row < 0 || row >= d.in.height) continue;
    for (index_t j = 0; j < win.kernel[1]; ++j) {
      const index_t column = w * win.stride[1] - win.padding[1] + j;
      if (column < 0 || column >= d.in.width) continue;
      body(i * win.kernel[1] + j, (row * d.in.width + column) * d.in.channels);
    }
  }
}

// Calls body(n, h, w, output offset) for every output pixel; samples are split among threads.
template <class Body>
FM_INLINE void for_outputs(const LayerArgs<S>& a, const Exec& exec, Body&& body) {
  const Shape& out = a.desc->out;
  parallel(exec, a.samples, 1, 4 * a.desc->in.size(), [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      for (index_t p = 0; p < out.pixels(); ++p) {
        body(n, p / out.width, p % out.width, (n * out.pixels() + p) * out.channels);
      }
    }
  });
}

template <bool Partial>
FM_INLINE VI load_winner(Lanes<Partial> lanes, const S* saved) {
  const V bits = lanes.get(saved);
  VI winner;
  std::memcpy(&winner, &bits, sizeof(winner));
  return winner;
}

inline void max_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  for_outputs(a, exec, [&](index_t n, index_t h, index_t w, index_t out) {
    const S* image = a.x + n * d.in.size();
    for_columns(d.in.channels, [&](auto lanes, index_t c) {
      V best = splat(-std::numeric_limits<S>::infinity());
      VI winner{};
      for_taps(d, h, w, [&](index_t tap, index_t in) {
        const V x = lanes.get(image + in + c);
        const VI better = (x > best) | (x != x);  // as in PyTorch, NaN wins
        best = select(better, x, best);
        winner = better ? VI{} + Int(tap) : winner;
      });
      lanes.put(a.y + out + c, best);
      V bits;
      std::memcpy(&bits, &winner, sizeof(bits));
      lanes.put(a.saved + out + c, bits);
    });
  });
}

inline void max_pool_gather(const LayerArgs<S>& a, const S* tx, S* ty, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  for_outputs(a, exec, [&](index_t n, index_t h, index_t w, index_t out) {
    const S* image = tx + n * d.in.size();
    for_columns(d.in.channels, [&](auto lanes, index_t c) {
      const VI winner = load_winner(lanes, a.saved + out + c);
      V value{};
      for_taps(d, h, w, [&](index_t tap, index_t in) {
        value = select(winner == Int(tap), lanes.get(image + in + c), value);
      });
      lanes.put(ty + out + c, value);
    });
  });
}

inline void clear_images(const LayerArgs<S>& a, S* dx, const Exec& exec) {
  const index_t size = a.desc->in.size();
  parallel(exec, a.samples, 1, 4 * a.desc->in.size(), [&](index_t begin, index_t end) {
    std::memset(dx + begin * size, 0, (end - begin) * size * sizeof(S));
  });
}

inline void max_pool_scatter(const LayerArgs<S>& a, const S* dy, S* dx, const Exec& exec) {
  if (!dx) return;
  const LayerDesc& d = *a.desc;
  clear_images(a, dx, exec);
  for_outputs(a, exec, [&](index_t n, index_t h, index_t w, index_t out) {
    S* image = dx + n * d.in.size();
    for_columns(d.in.channels, [&](auto lanes, index_t c) {
      const VI winner = load_winner(lanes, a.saved + out + c);
      const V value = lanes.get(dy + out + c);
      for_taps(d, h, w, [&](index_t tap, index_t in) {
        S* p = image + in + c;
        lanes.put(p, lanes.get(p) + select(winner == Int(tap), value, V{}));
      });
    });
  });
}

inline void max_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  max_pool_scatter(a, a.dy, a.dx, exec);
}
inline void max_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  max_pool_gather(a, a.tx, a.ty, exec);
}
inline void max_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  max_pool_scatter(a, a.tdy, a.tdx, exec);
}

FM_INLINE S average_weight(const LayerDesc& d) {
  return S(1) / S(d.window.kernel[0] * d.window.kernel[1]);
}

inline void average_gather(const LayerArgs<S>& a, const S* x, S* y, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  const V weight = splat(average_weight(d));
  for_outputs(a, exec, [&](index_t n, index_t h, index_t w, index_t out) {
    const S* image = x + n * d.in.size();
    for_columns(d.in.channels, [&](auto lanes, index_t c) {
      V sum{};
      for_taps(d, h, w, [&](index_t, index_t in) { sum += lanes.get(image + in + c); });
      lanes.put(y + out + c, sum * weight);
    });
  });
}

inline void average_scatter(const LayerArgs<S>& a, const S* dy, S* dx, const Exec& exec) {
  if (!dx) return;
  const LayerDesc& d = *a.desc;
  const V weight = splat(average_weight(d));
  clear_images(a, dx, exec);
  for_outputs(a, exec, [&](index_t n, index_t h, index_t w, index_t out) {
    S* image = dx + n * d.in.size();
    for_columns(d.in.channels, [&](auto lanes, index_t c) {
      const V value = lanes.get(dy + out + c) * weight;
      for_taps(d, h, w, [&](index_t, index_t in) {
        S* p = image + in + c;
        lanes.put(p, lanes.get(p) + value);
      });
    });
  });
}

inline void average_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  average_gather(a, a.x, a.y, exec);
}
inline void average_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  average_scatter(a, a.dy, a.dx, exec);
}
inline void average_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  average_gather(a, a.tx, a.ty, exec);
}
inline void average_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  average_scatter(a, a.tdy, a.tdx, exec);
}

}  // namespace FM_KERNELS
