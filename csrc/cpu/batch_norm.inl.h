// Batch norm over the samples and pixels of a channel (always batch statistics), with an optional
// ReLU behind it. Formulas in math/normalize.h.
//
// Data is R = N * pixels rows of C channels. Each pass is at most one reduction sweep (sums of rows
// in blocks of kRowBlock, blocks added up in double) and one map sweep; normalised values are
// recomputed from x instead of kept. saved [6, C]: mean, r, s1 = mean(dz), s2 = mean(dz xhat),
// tmean, q, with dz the adjoint behind the ReLU's mask, so that m1 = g s1 and m2 = g s2.

namespace FM_KERNELS {

constexpr index_t kRowBlock = 128;

struct BatchNorm {
  index_t rows, channels;
  const S *scale, *tscale, *shift, *tshift;  // [C], null where absent or not perturbed
  S *mean, *r, *s1, *s2, *tmean, *q;         // saved
  bool relu;
};

inline BatchNorm batch_norm_of(const LayerArgs<S>& a) {
  const LayerDesc& d = *a.desc;
  const index_t c = d.in.channels;
  const auto scale_of = [&](const S* w) { return d.has_weight && w ? w : nullptr; };
  const auto shift_of = [&](const S* w) { return d.has_bias && w ? w + d.bias_offset : nullptr; };
  S* s = a.saved;
  return {a.samples * d.in.pixels(),
          c,
          scale_of(a.w),
          scale_of(a.tw),
          shift_of(a.w),
          shift_of(a.tw),
          s,
          s + c,
          s + 2 * c,
          s + 3 * c,
          s + 4 * c,
          s + 5 * c,
          d.relu};
}

// The channel coefficients of one vector of channels.
template <bool Partial>
struct ChannelVector {
  V mean, r, scale, shift, tscale, tshift;
  bool relu;

  ChannelVector(const BatchNorm& b, Lanes<Partial> lanes, index_t c)
      : mean(lanes.get(b.mean + c)),
        r(lanes.get(b.r + c)),
        scale(b.scale ? lanes.get(b.scale + c) : splat(S(1))),
        shift(b.shift ? lanes.get(b.shift + c) : V{}),
        tscale(b.tscale ? lanes.get(b.tscale + c) : V{}),
        tshift(b.tshift ? lanes.get(b.tshift + c) : V{}),
        relu(b.relu) {}

  FM_INLINE V normalized(V x) const { return math::normalized(x, mean, r); }
  FM_INLINE V output(V xhat) const { return scale * xhat + shift; }
  // v where the ReLU lets it pass
  FM_INLINE V masked(V xhat, V v) const { return relu ? select(output(xhat) > V{}, v, V{}) : v; }
};

// Sums of `Count` quantities over all rows: term(lanes, i, acc) adds element i's terms, done(lanes,
// c, sums) takes the totals of a vector of channels.
template <int Count, class Make, class Done>
void reduce_channels(const BatchNorm& b, const Exec& exec, Make&& make, Done&& done) {
  parallel(exec, b.channels, kLanes, 4 * b.rows, [&](index_t c_begin, index_t c_end) {
    for_columns(c_end - c_begin, [&](auto lanes, index_t c_offset) {
      const index_t c = c_begin + c_offset;
      const auto term = make(lanes, c);
      double total[Count][kLanes] = {};
      for (index_t r0 = 0; r0 < b.rows; r0 += kRowBlock) {
        V acc[Count] = {};
        const index_t r1 = min_of(b.rows, r0 + kRowBlock);
        for (index_t row = r0; row < r1; ++row) term(row * b.channels + c, acc);
        for (int k = 0; k < Count; ++k) {
          for (index_t l = 0; l < kLanes; ++l) total[k][l] += double(acc[k][l]);
        }
      }
      done(lanes, c, total);
    });
  });
}

// Maps every element: make(lanes, c) gives the function applied to the element offsets.
template <class Make>
void map_rows(const BatchNorm& b, const Exec& exec, Make&& make) {
  parallel(exec, b.rows, kRowBlock, 8 * b.channels, [&](index_t begin, index_t end) {
    for (index_t r0 = begin; r0 < end; r0 += kRowBlock) {
      const index_t r1 = min_of(end, r0 + kRowBlock);
      for_columns(b.channels, [&](auto lanes, index_t c) {
        const auto apply = make(lanes, c);
        for (index_t row = r0; row < r1; ++row) apply(row * b.channels + c);
      });
    }
  });
}

// Sums are taken of x less the channel's first value, which keeps the one-sweep variance accurate.
inline void batch_norm_statistics(const LayerArgs<S>& a, const BatchNorm& b, const Exec& exec) {
  const auto term = [&](auto lanes, index_t c) {
    const V first = lanes.get(a.x + c);
    return [=, x = a.x](index_t i, V* acc) {
      const V v = lanes.get(x + i) - first;
      acc[0] += v;
      acc[1] += v * v;
    };
  };
  reduce_channels<2>(b, exec, term, [&](auto lanes, index_t c, auto& total) {
    for (index_t l = 0; l < lanes.n; ++l) {
      const double mean = total[0][l] / double(b.rows);
      const double variance = max_of(0.0, total[1][l] / double(b.rows) - mean * mean);
      b.mean[c + l] = S(double(a.x[c + l]) + mean);
      // not max_of(NaN): a NaN in the data must reach the output
      b.r[c + l] =
          total[1][l] == total[1][l] ? S(1.0 / std::sqrt(variance + a.desc->eps)) : S(total[1][l]);
    }
  });
}

inline void batch_norm_forward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  batch_norm_statistics(a, b, exec);
  map_rows(b, exec, [&](auto lanes, index_t c) {
    const ChannelVector v(b, lanes, c);
    return [=, x = a.x, y = a.y](index_t i) {
      const V out = v.output(v.normalized(lanes.get(x + i)));
      lanes.put(y + i, v.relu ? select(out < V{}, V{}, out) : out);
    };
  });
}

// means of two sums, and the sums themselves as the adjoints of shift and scale
inline void store_adjoint_sums(const BatchNorm& b, const LayerDesc& d, index_t c, index_t n,
                               const double (&total)[2][kLanes], S* mean1, S* mean2, S* dw) {
  for (index_t l = 0; l < n; ++l) {
    mean1[c + l] = S(total[0][l] / double(b.rows));
    mean2[c + l] = S(total[1][l] / double(b.rows));
    if (dw && d.has_bias) dw[d.bias_offset + c + l] = S(total[0][l]);
    if (dw && d.has_weight) dw[c + l] = S(total[1][l]);
  }
}

inline void batch_norm_backward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  const auto term = [&](auto lanes, index_t c) {
    return [=, v = ChannelVector(b, lanes, c), x = a.x, dy = a.dy](index_t i, V* acc) {
      const V xhat = v.normalized(lanes.get(x + i));
      const V dz = v.masked(xhat, lanes.get(dy + i));
      acc[0] += dz;
      acc[1] += dz * xhat;
    };
  };
  reduce_channels<2>(b, exec, term, [&](auto lanes, index_t c, auto& total) {
    store_adjoint_sums(b, *a.desc, c, lanes.n, total, b.s1, b.s2, a.dw);
  });
  if (!a.dx) return;
  map_rows(b, exec, [&](auto lanes, index_t c) {
    const ChannelVector v(b, lanes, c);
    const V m1 = v.scale * lanes.get(b.s1 + c), m2 = v.scale * lanes.get(b.s2 + c);
    return [=, x = a.x, dy = a.dy, dx = a.dx](index_t i) {
      const V xhat = v.normalized(lanes.get(x + i));
      const V h = v.scale * v.masked(xhat, lanes.get(dy + i));
      lanes.put(dx + i, math::normalize_backward(h, xhat, v.r, m1, m2));
    };
  });
}

inline void batch_norm_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  const auto term = [&](auto lanes, index_t c) {
    return [=, v = ChannelVector(b, lanes, c), x = a.x, tx = a.tx](index_t i, V* acc) {
      const V t = tx ? lanes.get(tx + i) : V{};
      acc[0] += t;
      acc[1] += t * v.normalized(lanes.get(x + i));
    };
  };
  reduce_channels<2>(b, exec, term, [&](auto lanes, index_t c, auto& total) {
    for (index_t l = 0; l < lanes.n; ++l) {
      b.tmean[c + l] = S(total[0][l] / double(b.rows));
      b.q[c + l] = S(double(b.r[c + l]) * total[1][l] / double(b.rows));
    }
  });
  map_rows(b, exec, [&](auto lanes, index_t c) {
    const ChannelVector v(b, lanes, c);
    const V tmean = lanes.get(b.tmean + c), q = lanes.get(b.q + c);
    return [=, x = a.x, tx = a.tx, ty = a.ty](index_t i) {
      const V xhat = v.normalized(lanes.get(x + i));
      const V t = tx ? lanes.get(tx + i) : V{};
      const V txhat = math::normalize_tangent(t, xhat, v.r, tmean, q);
      lanes.put(ty + i, v.masked(xhat, v.scale * txhat + v.tscale * xhat + v.tshift));
    };
  });
}

// xhat, its tangent, dz and its tangent at one element
struct NormPoint {
  V xhat, txhat, dz, tdz;
};

template <bool Partial>
struct NormPoints {
  const S *x, *tx, *dy, *tdy;
  Lanes<Partial> lanes;
  ChannelVector<Partial> v;
  V tmean, q;

  NormPoints(const LayerArgs<S>& a, const BatchNorm& b, Lanes<Partial> l, index_t c)
      : x(a.x),
        tx(a.tx),
        dy(a.dy),
        tdy(a.tdy),
        lanes(l),
        v(b, l, c),
        tmean(l.get(b.tmean + c)),
        q(l.get(b.q + c)) {}

  FM_INLINE NormPoint at(index_t i) const {
    NormPoint p;
    p.xhat = v.normalized(lanes.get(x + i));
    p.txhat = math::normalize_tangent(tx ? lanes.get(tx + i) : V{}, p.xhat, v.r, tmean, q);
    p.dz = v.masked(p.xhat, lanes.get(dy + i));
    p.tdz = v.masked(p.xhat, lanes.get(tdy + i));
    return p;
  }
};

inline void batch_norm_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  // means of tdz and of tdz xhat + dz txhat, needed by the map sweep
  S* ts1 = static_cast<S*>(exec.scratch);
  S* ts2 = ts1 + align_up(b.channels, 16);
  const auto term = [&](auto lanes, index_t c) {
    return [=, points = NormPoints(a, b, lanes, c)](index_t i, V* acc) {
      const NormPoint p = points.at(i);
      acc[0] += p.tdz;
      acc[1] += p.tdz * p.xhat + p.dz * p.txhat;
    };
  };
  reduce_channels<2>(b, exec, term, [&](auto lanes, index_t c, auto& total) {
    store_adjoint_sums(b, *a.desc, c, lanes.n, total, ts1, ts2, a.tdw);
  });
  if (!a.tdx) return;
  map_rows(b, exec, [&](auto lanes, index_t c) {
    const NormPoints points(a, b, lanes, c);
    const auto& v = points.v;
    const V s1 = lanes.get(b.s1 + c), s2 = lanes.get(b.s2 + c);
    const V m1 = v.scale * s1, m2 = v.scale * s2;
    const V tm1 = v.scale * lanes.get(ts1 + c) + v.tscale * s1;
    const V tm2 = v.scale * lanes.get(ts2 + c) + v.tscale * s2;
    return [=, tdx = a.tdx](index_t i) {
      const NormPoint p = points.at(i);
      const V dx = math::normalize_backward(points.v.scale * p.dz, p.xhat, points.v.r, m1, m2);
      const V th = points.v.scale * p.tdz + points.v.tscale * p.dz;
      lanes.put(tdx + i, math::normalize_tangent_backward(dx, th, p.xhat, p.txhat, points.v.r,
                                                          points.q, m2, tm1, tm2));
    };
  });
}

}  // namespace FM_KERNELS
