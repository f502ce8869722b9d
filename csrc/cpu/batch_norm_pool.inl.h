// Batch norm, ReLU and a max pooling whose windows neither overlap nor reach over the border, in
// one layer: the normalised image is never written.
//
// The normalisation rises or falls with x as its scale is positive or negative, so the winner of a
// window is known before the statistics are: the sweep that sums x also picks it. Pixels behind the
// last whole window count for the statistics and win nothing.
//
//   forward            one sweep of x: sums and winners;        y from the winners
//   backward           sums over the winners;                   one sweep of x, dx
//   tangent_forward    one sweep of x, tx: sums and tangents of the winners;   ty from the winners
//   tangent_backward   sums over the winners;                   one sweep of x, tx, tdx
//
// saved: batch norm's [6, C], ts1, ts2 and tscale, then of every output the winner's x and tx. The
// winner's place is the first of its window with this x: of equal values the first wins, as in
// PyTorch.

namespace FM_KERNELS {

struct PooledNorm {
  BatchNorm norm;
  index_t outputs;  // pooled rows of C channels
  S *ts1, *ts2;     // [C] tangents of s1, s2
  S* tscale;        // [C] for the convolution below: tdw may have replaced tw by then
  S *x, *tx;        // [outputs, C] of the winners
};

inline PooledNorm pooled_norm_of(const LayerArgs<S>& a) {
  const index_t pixels = a.samples * a.desc->out.pixels();
  const index_t c = a.desc->in.channels;
  S* winners = a.saved + align_up(9 * c, 16);
  return {batch_norm_of(a),
          pixels,
          a.saved + 6 * c,
          a.saved + 7 * c,
          a.saved + 8 * c,
          winners,
          winners + a.samples * a.desc->out.size()};
}

// Calls tap(i) for the offsets of a window's pixels, K x K if K > 0. Passed on by value: kept in
// registers, where what is stored can't change it.
template <int K>
struct Taps {
  index_t height, width, row, channels;  // row and channels: elements to the next row and pixel

  template <class Tap>
  FM_INLINE void operator()(index_t in, Tap&& tap) const {
    for (index_t i = 0; i < (K ? K : height); ++i) {
      for (index_t j = 0; j < (K ? K : width); ++j) tap(in + i * row + j * channels);
    }
  }
};

// The windows of an image, K x K if K > 0, and the strips they come in: one row of windows with all
// the rows of pixels down to the next strip, or to the end of the image.
template <int K>
struct Windows {
  const LayerDesc& d;

  FM_INLINE index_t height() const { return K ? K : d.window.kernel[0]; }
  FM_INLINE index_t width() const { return K ? K : d.window.kernel[1]; }
  FM_INLINE index_t strips(index_t samples) const { return samples * d.out.height; }
  // strips of about kRowBlock pixels
  FM_INLINE index_t strips_in_block() const {
    return max_of<index_t>(1, kRowBlock / (height() * d.in.width));
  }

  // window(taps, first pixel, output) and rest(pixel) at offsets of all that a strip holds
  template <class Window, class Rest>
  FM_INLINE void strip(index_t strip, Window&& window, Rest&& rest) const {
    const index_t n = strip / d.out.height, h = strip % d.out.height;
    const index_t first = (n * d.in.height + h * height()) * d.in.width;
    const index_t rows = h + 1 < d.out.height ? height() : d.in.height - h * height();
    const index_t c = d.in.channels, pixels = d.in.width, windows = d.out.width;
    const Taps<K> taps{height(), width(), pixels * c, c};
    for (index_t w = 0; w < windows; ++w) {
      window(taps, (first + w * taps.width) * c, (strip * windows + w) * c);
    }
    for (index_t i = 0; i < taps.height; ++i) {
      for (index_t j = windows * taps.width; j < pixels; ++j) rest((first + i * pixels + j) * c);
    }
    for (index_t i = taps.height * pixels; i < rows * pixels; ++i) rest((first + i) * c);
  }
};

// Calls body with the windows of a layer, the most frequent size known to the compiler.
template <class Body>
void with_windows(const LayerDesc& d, Body&& body) {
  if (d.window.kernel[0] == 2 && d.window.kernel[1] == 2) {
    body(Windows<2>{d});
  } else {
    body(Windows<0>{d});
  }
}

// Finds the winner among a window's pixels: the first whose x is the saved one.
struct Winner {
  V x;
  VI found{};

  FM_INLINE VI is(V value) {
    const VI here = (value == x) & ~found;
    found |= here;
    return here;
  }
};

// Two sums per channel over all pixels, strip by strip: make(lanes, c) gives an object with
// window(taps, in, out, acc) and rest(in, acc).
// Before a block is summed, prepare(part, begin, end) may fill its strips.
struct Ready {
  FM_INLINE void operator()(index_t, index_t, index_t) const {}
};

template <int K, class Make, class Prepare = Ready>
Sums reduce_windows(const LayerArgs<S>& a, Windows<K> windows, const Exec& exec, Make&& make,
                    const Prepare& prepare = {}) {
  const index_t strips = windows.strips(a.samples), step = windows.strips_in_block();
  const index_t blocks = (strips + step - 1) / step;
  const auto add = [&](auto group, index_t channel, index_t block, auto& acc) {
    constexpr int G = decltype(group)::count;
    const auto term = each_of(make, group, channel);
    const index_t end = min_of(strips, (block + 1) * step);
    for (index_t strip = block * step; strip < end; ++strip) {
      windows.strip(
          strip,
          [&](auto taps, index_t in, index_t out) {
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
              const index_t c = channel + g * kLanes;
              term.of[g].window(taps, in + c, out + c, acc[g]);
            }
          },
          [&](index_t in) {
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) term.of[g].rest(in + channel + g * kLanes, acc[g]);
          });
    }
  };
  const auto fill = [&](index_t part, index_t block) {
    prepare(part, block * step, min_of(strips, (block + 1) * step));
  };
  return reduce_blocks(blocks, a.desc->in.channels, exec, add, fill);
}

// Maps every pixel: make(lanes, c) gives an object with window(taps, in, out) and rest(in).
template <int K, class Make>
void map_windows(const LayerArgs<S>& a, Windows<K> windows, const Exec& exec, Make&& make) {
  parallel(
      exec, windows.strips(a.samples), 1, 8 * a.desc->in.width * a.desc->in.channels,
      [&](index_t begin, index_t end) {
        for (index_t strip = begin; strip < end; ++strip) {
          for_columns(a.desc->in.channels, [&](auto lanes, index_t c) {
            const auto apply = make(lanes, c);
            windows.strip(
                strip,
                [&](auto taps, index_t in, index_t out) { apply.window(taps, in + c, out + c); },
                [&](index_t in) { apply.rest(in + c); });
          });
        }
      });
}

// -- forward --------------------------------------------------------------------------------------

template <bool Partial>
struct PooledSums {
  Lanes<Partial> lanes;
  const S* x;
  S* winners;
  V first, sign;  // of the scale: the winner has the largest sign * x

  FM_INLINE PooledSums(const LayerArgs<S>& a, const PooledNorm& p, Lanes<Partial> l, index_t c)
      : lanes(l), x(a.x), winners(p.x), first(l.get(a.x + c)), sign(splat(S(1))) {
    if (!p.norm.scale) return;
    const V scale = l.get(p.norm.scale + c), one = splat(S(1));
    sign = select(scale > V{}, one, select(scale < V{}, -one, V{}));
  }

  FM_INLINE void add(V value, V* acc) const {
    const V v = value - first;
    acc[0] += v;
    acc[1] += v * v;
  }
  FM_INLINE void rest(index_t in, V* acc) const { add(lanes.get(x + in), acc); }

  template <class AllTaps>
  FM_INLINE void window(AllTaps taps, index_t in, index_t out, V* acc) const {
    V winner = lanes.get(x + in), best = sign * winner;
    V own[2] = {};
    taps(in, [&](index_t i) {
      const V value = lanes.get(x + i), key = sign * value;
      add(value, own);
      const VI better = key > best;
      best = select(better, key, best);
      winner = select(better, value, winner);
    });
    acc[0] += own[0];
    acc[1] += own[1];
    lanes.put(winners + out, winner);
  }
};

inline void batch_norm_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  const PooledNorm p = pooled_norm_of(a);
  if (a.swept_below) return map_output(p.norm, p.outputs, p.x, a.y, exec);
  with_windows(*a.desc, [&](auto windows) {
    store_statistics(a, p.norm, reduce_windows(a, windows, exec, [&](auto lanes, index_t c) {
                       return PooledSums(a, p, lanes, c);
                     }));
  });
  map_output(p.norm, p.outputs, p.x, a.y, exec);
}

// -- backward -------------------------------------------------------------------------------------

template <bool Partial>
struct PooledAdjoint {
  Lanes<Partial> lanes;
  const S *x, *winners, *dy;
  S* dx;  // from element `first` on
  index_t first;
  ChannelVector<Partial> v;
  AdjointMeans m;

  FM_INLINE PooledAdjoint(const LayerArgs<S>& a, const PooledNorm& p, Lanes<Partial> l, index_t c,
                          S* out, index_t from)
      : lanes(l),
        x(a.x),
        winners(p.x),
        dy(a.dy),
        dx(out),
        first(from),
        v(p.norm, l, c),
        m(p.norm, v, l, c, nullptr, nullptr) {}

  FM_INLINE void put(index_t in, V value, V h) const {
    lanes.put(dx + in - first, math::normalize_backward(h, v.normalized(value), v.r, m.m1, m.m2));
  }
  FM_INLINE void rest(index_t in) const { put(in, lanes.get(x + in), V{}); }

  template <class AllTaps>
  FM_INLINE void window(AllTaps taps, index_t in, index_t out) const {
    Winner winner{lanes.get(winners + out)};
    const V h = v.scale * v.masked(v.normalized(winner.x), lanes.get(dy + out));
    taps(in, [&](index_t i) {
      const V value = lanes.get(x + i);
      put(i, value, select(winner.is(value), h, V{}));
    });
  }
};

inline void batch_norm_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  const PooledNorm p = pooled_norm_of(a);
  const BatchNorm& b = p.norm;
  store_adjoint_sums(b, *a.desc, adjoint_sums(b, p.outputs, p.x, a.dy, exec), b.s1, b.s2, a.dw);
  if (!a.dx) return;
  with_windows(*a.desc, [&](auto windows) {
    map_windows(a, windows, exec,
                [&](auto lanes, index_t c) { return PooledAdjoint(a, p, lanes, c, a.dx, 0); });
  });
}

// -- tangent_forward ------------------------------------------------------------------------------

template <bool Partial>
struct PooledTangentSums {
  Lanes<Partial> lanes;
  const S *x, *tx, *winners;
  S* twinners;
  ChannelVector<Partial> v;

  FM_INLINE PooledTangentSums(const LayerArgs<S>& a, const PooledNorm& p, Lanes<Partial> l,
                              index_t c)
      : lanes(l), x(a.x), tx(a.tx), winners(p.x), twinners(p.tx), v(p.norm, l, c) {}

  FM_INLINE void add(V value, V t, V* acc) const {
    acc[0] += t;
    acc[1] += t * v.normalized(value);
  }
  FM_INLINE void rest(index_t in, V* acc) const { add(lanes.get(x + in), lanes.get(tx + in), acc); }

  template <class AllTaps>
  FM_INLINE void window(AllTaps taps, index_t in, index_t out, V* acc) const {
    Winner winner{lanes.get(winners + out)};
    V own[2] = {}, tangent{};
    taps(in, [&](index_t i) {
      const V value = lanes.get(x + i), t = lanes.get(tx + i);
      add(value, t, own);
      tangent = select(winner.is(value), t, tangent);
    });
    acc[0] += own[0];
    acc[1] += own[1];
    lanes.put(twinners + out, tangent);
  }
};

inline void batch_norm_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  const PooledNorm p = pooled_norm_of(a);
  const BatchNorm& b = p.norm;
  if (a.swept_below) {
    // which has left the statistics
    for (index_t c = 0; c < b.channels; ++c) p.tscale[c] = b.tscale ? b.tscale[c] : S(0);
  } else if (a.tx) {
    with_windows(*a.desc, [&](auto windows) {
      store_tangent_statistics(b, reduce_windows(a, windows, exec, [&](auto lanes, index_t c) {
                                 return PooledTangentSums(a, p, lanes, c);
                               }));
    });
  } else {
    for (index_t c = 0; c < b.channels; ++c) b.tmean[c] = b.q[c] = S(0);
  }
  map_tangent(b, p.outputs, p.x, a.tx ? p.tx : nullptr, a.ty, exec);
}

// -- tangent_backward -----------------------------------------------------------------------------

template <bool Partial>
struct PooledTangentAdjoint {
  NormPoints<Partial> pixels;
  const S* winners;
  AdjointMeans m;
  S* tdx;  // from element `first` on
  index_t first;

  FM_INLINE PooledTangentAdjoint(const LayerArgs<S>& a, const PooledNorm& p, Lanes<Partial> l,
                                 index_t c, S* out, index_t from)
      : pixels({a.x, a.tx, a.dy, a.tdy}, p.norm, l, c),
        winners(p.x),
        m(p.norm, pixels.v, l, c, p.ts1, p.ts2),
        tdx(out),
        first(from) {}

  FM_INLINE void put(index_t in, V value, V h, V th) const {
    const auto& v = pixels.v;
    const V xhat = v.normalized(value), txhat = pixels.tangent(in, xhat);
    const V dx = math::normalize_backward(h, xhat, v.r, m.m1, m.m2);
    pixels.lanes.put(tdx + in - first, math::normalize_tangent_backward(
                                           dx, th, xhat, txhat, v.r, pixels.q, m.m2, m.tm1, m.tm2));
  }
  FM_INLINE void rest(index_t in) const { put(in, pixels.lanes.get(pixels.in.x + in), V{}, V{}); }

  template <class AllTaps>
  FM_INLINE void window(AllTaps taps, index_t in, index_t out) const {
    const auto& v = pixels.v;
    Winner winner{pixels.lanes.get(winners + out)};
    const V xhat = v.normalized(winner.x);
    const V dz = v.masked(xhat, pixels.lanes.get(pixels.in.dy + out));
    const V tdz = v.masked(xhat, pixels.lanes.get(pixels.in.tdy + out));
    const V h = v.scale * dz, th = v.scale * tdz + v.tscale * dz;
    taps(in, [&](index_t i) {
      const V value = pixels.lanes.get(pixels.in.x + i);
      const VI here = winner.is(value);
      put(i, value, select(here, h, V{}), select(here, th, V{}));
    });
  }
};

inline void batch_norm_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  const PooledNorm p = pooled_norm_of(a);
  const BatchNorm& b = p.norm;
  const NormInputs winners{p.x, a.tx ? p.tx : nullptr, a.dy, a.tdy};
  store_adjoint_sums(b, *a.desc, tangent_adjoint_sums(b, p.outputs, winners, exec), p.ts1, p.ts2,
                     a.tdw);
  if (!a.tdx) return;
  with_windows(*a.desc, [&](auto windows) {
    map_windows(a, windows, exec, [&](auto lanes, index_t c) {
      return PooledTangentAdjoint(a, p, lanes, c, a.tdx, 0);
    });
  });
}

}  // namespace FM_KERNELS
