// The first convolution together with the batch norm and pooling above it: both go over strips of
// rows of the convolution's output, so that a strip is normalised while the cache holds it.
//
//   forward            y of a strip, its sums and winners
//   backward           dy of a strip from the norm's sums, its part of dw: dy is never stored
//   tangent_forward    ty of a strip, its sums and winners
//   tangent_backward   tdy of a strip, its part of tdw
//
// These passes are the convolution's, and hold the norm's sweeps over unpooled pixels; the norm's
// own passes keep those over pooled ones. `above` holds the norm's arguments. A strip is a row of
// pooling windows; strips are taken in parts whose number depends on them alone, each with sums of
// its own that are added up in order.

namespace FM_KERNELS {

// Rows of a strip of the layer above: image, first and last.
struct StripRows {
  index_t image, begin, end;
  template <int K>
  StripRows(const Windows<K>& windows, index_t strip) {
    const index_t strips = windows.d.out.height;
    image = strip / strips;
    begin = strip % strips * windows.height();
    end = strip % strips + 1 < strips ? begin + windows.height() : windows.d.in.height;
  }
};

// Outputs of the strips [begin, end), in the memory of a part.
template <int K>
void convolve_strips(const LayerArgs<S>& a, const ConvBand& b, Windows<K> windows, index_t part,
                     index_t begin, index_t end, S* y, const S* also) {
  const index_t row = b.d->out.width * b.outputs;
  for (index_t strip = begin; strip < end; ++strip) {
    const StripRows at(windows, strip);
    const index_t first = (at.image * b.d->out.height + at.begin) * row;
    const index_t size = (at.end - at.begin) * row;
    b.load_band(a.x, at.image, at.begin, at.end, b.band(part));
    // blocks come from the last to the first
    Ahead ahead{{y + first - size, also ? also + first - size : nullptr}, 0, first > 0 ? size : 0};
    band_convolve(b, b.band(part), at.end - at.begin, y + first, ahead);
  }
}

inline void conv_norm_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerArgs<S>& up = *a.above;
  const PooledNorm p = pooled_norm_of(up);
  const ConvBand b(*a.desc, exec);
  b.load_weights(a.w);
  b.load_band(a.x, 0, 0, 1, b.band(0));  // sums are taken of y less its first pixel
  band_convolve(b, b.band(0), 1, a.y);
  with_windows(*up.desc, [&](auto windows) {
    const auto convolve = [&](index_t part, index_t begin, index_t end) {
      convolve_strips(a, b, windows, part, begin, end, a.y, nullptr);
    };
    const auto sums = [&](auto lanes, index_t c) { return PooledSums(up, p, lanes, c); };
    store_statistics(up, p.norm, reduce_windows(up, windows, exec, sums, convolve));
  });
}

inline void conv_norm_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerArgs<S>& up = *a.above;  // whose tx is this layer's ty
  const PooledNorm p = pooled_norm_of(up);
  const ConvBand b(*a.desc, exec);
  b.load_weights(a.tw);
  with_windows(*up.desc, [&](auto windows) {
    const auto convolve = [&](index_t part, index_t begin, index_t end) {
      convolve_strips(a, b, windows, part, begin, end, a.ty, up.x);
    };
    const auto sums = [&](auto lanes, index_t c) { return PooledTangentSums(up, p, lanes, c); };
    store_tangent_statistics(p.norm, reduce_windows(up, windows, exec, sums, convolve));
  });
}

// dw from adjoints that make(lanes, c, first element of the strip, where it goes) computes.
template <int K, class Make>
void strips_weight_gradient(const LayerArgs<S>& a, Windows<K> windows, const S* read_also, S* dw,
                            const Exec& exec, Make&& make) {
  const ConvBand b(*a.desc, exec);
  const index_t strips = windows.strips(a.samples), parts = min_of(kStatisticParts, strips);
  const index_t work = a.desc->out.width * windows.height() * b.inputs * b.outputs;
  parallel(exec, parts, 1, strips / parts * work, [&](index_t begin, index_t end) {
    for (index_t part = begin; part < end; ++part) {
      S *band = b.band(part), *dy = b.adjoint(part), *sum = b.sum(part);
      std::memset(sum, 0, b.sum_size * sizeof(S));
      for (index_t s = strips * part / parts; s < strips * (part + 1) / parts; ++s) {
        const StripRows at(windows, s);
        const index_t first = (at.image * b.d->out.height + at.begin) * b.d->out.width * b.outputs;
        for_groups(b.outputs, [&](auto group, index_t channel) {
          constexpr int G = decltype(group)::count;
          const auto apply = each_of(
              [&](auto lanes, index_t c) { return make(lanes, c, first, dy); }, group, channel);
          windows.strip(
              s,
              [&](auto taps, index_t in, index_t out) {
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) {
                  const index_t c = channel + g * kLanes;
                  apply.of[g].window(taps, in + c, out + c);
                }
              },
              [&](index_t in) {
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) apply.of[g].rest(in + channel + g * kLanes);
              });
        });
        b.load_band(a.x, at.image, at.begin, at.end, band);
        const index_t size = (at.end - at.begin) * b.d->out.width * b.outputs;
        const S* also = read_also ? read_also + first + size : nullptr;
        band_weight_gradient(b, band, at.end - at.begin, dy, sum,
                             {{a.above->x + first + size, also}, 0, s + 1 < strips ? size : 0});
      }
    }
  });
  for (index_t i = 0; i < b.inputs + (a.desc->has_bias ? 1 : 0); ++i) {
    S* to = i < b.inputs ? dw + i * b.outputs : dw + a.desc->bias_offset;
    for_columns(b.outputs, [&](auto lanes, index_t c) {
      V total{};
      for (index_t part = 0; part < parts; ++part) {
        total += load(b.sum(part) + i * b.width + c);
      }
      lanes.put(to + c, total);
    });
  }
}

inline void conv_norm_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.dw) return;
  const LayerArgs<S>& up = *a.above;
  const PooledNorm p = pooled_norm_of(up);
  with_windows(*up.desc, [&](auto windows) {
    strips_weight_gradient(a, windows, nullptr, a.dw, exec,
                           [&](auto lanes, index_t c, index_t first, S* dy) {
                             return PooledAdjoint(up, p, lanes, c, dy, first);
                           });
  });
}

inline void conv_norm_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.tdw) return;
  const LayerArgs<S>& up = *a.above;
  PooledNorm p = pooled_norm_of(up);
  p.norm.tscale = p.tscale;
  with_windows(*up.desc, [&](auto windows) {
    strips_weight_gradient(a, windows, up.tx, a.tdw, exec,
                           [&](auto lanes, index_t c, index_t first, S* tdy) {
                             return PooledTangentAdjoint(up, p, lanes, c, tdy, first);
                           });
  });
}

}  // namespace FM_KERNELS
