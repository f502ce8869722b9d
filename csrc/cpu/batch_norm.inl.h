// Batch norm over the samples and pixels of a channel (always batch statistics), with an optional
// ReLU behind it. Formulas in math/normalize.h.
//
// Data is R = N * pixels rows of C channels. Each pass is at most one reduction sweep and one map
// sweep; normalised values are recomputed from x instead of kept. Reductions go from the last row
// to the first and maps back again, so that a map finds in the cache what was summed last.
// saved [6, C]: mean, r, s1 = mean(dz), s2 = mean(dz xhat), tmean, q, with dz the adjoint behind
// the ReLU's mask, so that m1 = g s1 and m2 = g s2.

namespace FM_KERNELS {

constexpr index_t kRowBlock = 128;  // rows that are summed in the scalar type

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

  FM_INLINE ChannelVector(const BatchNorm& b, Lanes<Partial> lanes, index_t c)
      : mean(lanes.get(b.mean + c)),
        r(lanes.get(b.r + c)),
        scale(b.scale ? lanes.get(b.scale + c) : splat(S(1))),
        shift(b.shift ? lanes.get(b.shift + c) : V{}),
        tscale(b.tscale ? lanes.get(b.tscale + c) : V{}),
        tshift(b.tshift ? lanes.get(b.tshift + c) : V{}),
        relu(b.relu) {}

  FM_INLINE V normalized(V x) const { return math::normalized(x, mean, r); }
  FM_INLINE V output(V xhat) const { return scale * xhat + shift; }
  // v where the ReLU lets it pass, which as in PyTorch includes NaN
  FM_INLINE V masked(V xhat, V v) const { return relu ? select(output(xhat) <= V{}, V{}, v) : v; }
};

// -- sweeps ---------------------------------------------------------------------------------------

// Vectors of channels that a reduction takes side by side: enough sums to hide their latency.
template <int Count, bool Partial>
struct Group {
  static constexpr int count = Count;
  Lanes<Partial> lanes;
};

template <class Body>
FM_INLINE void for_groups(index_t channels, Body&& body) {
  const Lanes<false> whole{kLanes};
  index_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) body(Group<4, false>{whole}, c);
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) body(Group<2, false>{whole}, c);
  if (c + kLanes <= channels) {
    body(Group<1, false>{whole}, c);
    c += kLanes;
  }
  if (c < channels) body(Group<1, true>{{channels - c}}, c);
}

typedef double Wide __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

FM_INLINE void add_wide(double* sums, V v) {
  *reinterpret_cast<Wide*>(sums) += __builtin_convertvector(v, Wide);
}

// Where reductions keep their sums: behind two rows of channels in the scratch memory.
FM_INLINE S* scratch_row(const Exec& exec, index_t channels, int row) {
  return static_cast<S*>(exec.scratch) + row * align_up(channels, 16);
}

struct Sums {
  const double *first, *second;  // [C]
};

// Two sums per channel over blocks of the data: add(group, c, block, acc) adds a block's terms to
// acc [group.count][2]. Blocks are summed in S and added up in double, in parts whose number
// depends on the blocks alone; prepare(part, block) comes first.
struct Nothing {
  FM_INLINE void operator()(index_t, index_t) const {}
};

template <class Add, class Prepare = Nothing>
Sums reduce_blocks(index_t blocks, index_t channels, const Exec& exec, Add&& add,
                   const Prepare& prepare = {}) {
  const index_t width = align_up(channels, 16);
  double* sums = reinterpret_cast<double*>(scratch_row(exec, channels, 2));
  const index_t parts = max_of<index_t>(1, min_of(kStatisticParts, blocks / 2));
  parallel(exec, parts, 1, blocks / parts * kRowBlock * channels, [&](index_t begin, index_t end) {
    for (index_t part = end; part-- > begin;) {
      double* own = sums + part * 2 * width;
      std::memset(own, 0, 2 * width * sizeof(double));
      const index_t first = blocks * part / parts;
      for (index_t block = blocks * (part + 1) / parts; block-- > first;) {
        prepare(part, block);
        for_groups(channels, [&](auto group, index_t c) {
          constexpr int G = decltype(group)::count;
          V acc[G][2] = {};
          add(group, c, block, acc);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            add_wide(own + c + g * kLanes, acc[g][0]);
            add_wide(own + width + c + g * kLanes, acc[g][1]);
          }
        });
      }
    }
  });
  for (index_t part = 1; part < parts; ++part) {
    const double* other = sums + part * 2 * width;
    for (index_t i = 0; i < 2 * width; ++i) sums[i] += other[i];
  }
  return {sums, sums + width};
}

// make(lanes, c) for every vector of a group.
template <class F, int G>
struct Each {
  F of[G];
};

template <class Make, int G, bool Partial, int... I>
FM_INLINE auto each_of(Make&& make, Group<G, Partial> group, index_t c,
                       std::integer_sequence<int, I...>) {
  using F = decltype(make(group.lanes, c));
  return Each<F, G>{{make(group.lanes, c + I * kLanes)...}};
}

template <class Make, int G, bool Partial>
FM_INLINE auto each_of(Make&& make, Group<G, Partial> group, index_t c) {
  return each_of(make, group, c, std::make_integer_sequence<int, G>{});
}

// Two sums per channel over rows: make(lanes, c) gives term(i, acc), which adds the terms of the
// elements at offset i. Small groups take several rows at a time.
template <class Make>
Sums reduce_rows(index_t rows, index_t channels, const Exec& exec, Make&& make) {
  const auto add = [&](auto group, index_t c, index_t block, auto& acc) {
    constexpr int G = decltype(group)::count, U = 4 / G;
    const auto term = each_of(make, group, c);
    const index_t end = min_of(rows, (block + 1) * kRowBlock);
    index_t row = block * kRowBlock;
    V sums[U * G][2] = {};
    for (; row + U <= end; row += U) {
#pragma GCC unroll 4
      for (int k = 0; k < U * G; ++k) {
        term.of[k % G]((row + k / G) * channels + c + k % G * kLanes, sums[k]);
      }
    }
    for (; row < end; ++row) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) term.of[g](row * channels + c + g * kLanes, sums[g]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < U * G; ++k) {
      acc[k % G][0] += sums[k][0];
      acc[k % G][1] += sums[k][1];
    }
  };
  return reduce_blocks((rows + kRowBlock - 1) / kRowBlock, channels, exec, add);
}

// Maps every element: make(lanes, c) gives the function applied to the element offsets.
template <class Make>
void map_rows(index_t rows, index_t channels, const Exec& exec, Make&& make) {
  parallel(exec, rows, kRowBlock, 8 * channels, [&](index_t begin, index_t end) {
    for (index_t r0 = begin; r0 < end; r0 += kRowBlock) {
      const index_t r1 = min_of(end, r0 + kRowBlock);
      for_columns(channels, [&](auto lanes, index_t c) {
        const auto apply = make(lanes, c);
        for (index_t row = r0; row < r1; ++row) apply(row * channels + c);
      });
    }
  });
}

// -- statistics -----------------------------------------------------------------------------------

// From sums of x less the channel's first value, which keeps the one-sweep variance accurate. No
// maximum with zero: a NaN in the data must reach the output.
inline void store_statistics(const LayerArgs<S>& a, const BatchNorm& b, const Sums& sums) {
  const double each = 1.0 / double(b.rows), eps = a.desc->eps;
  for (index_t c = 0; c < b.channels; ++c) {
    const double mean = sums.first[c] * each;
    const double variance = sums.second[c] * each - mean * mean;
    b.mean[c] = S(double(a.x[c]) + mean);
    b.r[c] = S(1.0 / std::sqrt((variance < 0 ? 0.0 : variance) + eps));
  }
}

inline void store_tangent_statistics(const BatchNorm& b, const Sums& sums) {
  const double each = 1.0 / double(b.rows);
  for (index_t c = 0; c < b.channels; ++c) {
    b.tmean[c] = S(sums.first[c] * each);
    b.q[c] = S(double(b.r[c]) * (sums.second[c] * each));
  }
}

// means of two sums, and the sums themselves as the adjoints of shift and scale
inline void store_adjoint_sums(const BatchNorm& b, const LayerDesc& d, const Sums& sums, S* mean1,
                               S* mean2, S* dw) {
  const double each = 1.0 / double(b.rows);
  for (index_t c = 0; c < b.channels; ++c) {
    mean1[c] = S(sums.first[c] * each);
    mean2[c] = S(sums.second[c] * each);
  }
  if (!dw) return;
  for (index_t c = 0; d.has_bias && c < b.channels; ++c) dw[d.bias_offset + c] = S(sums.first[c]);
  for (index_t c = 0; d.has_weight && c < b.channels; ++c) dw[c] = S(sums.second[c]);
}

// -- the parts of the passes that pooling shares: `rows` rows of x, tx, dy, tdy -------------------

inline void map_output(const BatchNorm& b, index_t rows, const S* x, S* y, const Exec& exec) {
  map_rows(rows, b.channels, exec, [&](auto lanes, index_t c) {
    const ChannelVector v(b, lanes, c);
    return [=](index_t i) {
      const V out = v.output(v.normalized(lanes.get(x + i)));
      lanes.put(y + i, v.relu ? select(out < V{}, V{}, out) : out);
    };
  });
}

inline void map_tangent(const BatchNorm& b, index_t rows, const S* x, const S* tx, S* ty,
                        const Exec& exec) {
  map_rows(rows, b.channels, exec, [&](auto lanes, index_t c) {
    const ChannelVector v(b, lanes, c);
    const V tmean = lanes.get(b.tmean + c), q = lanes.get(b.q + c);
    return [=](index_t i) {
      const V xhat = v.normalized(lanes.get(x + i));
      const V t = tx ? lanes.get(tx + i) : V{};
      const V txhat = math::normalize_tangent(t, xhat, v.r, tmean, q);
      lanes.put(ty + i, v.masked(xhat, v.scale * txhat + v.tscale * xhat + v.tshift));
    };
  });
}

inline Sums adjoint_sums(const BatchNorm& b, index_t rows, const S* x, const S* dy,
                         const Exec& exec) {
  return reduce_rows(rows, b.channels, exec, [&](auto lanes, index_t c) {
    return [=, v = ChannelVector(b, lanes, c)](index_t i, V* acc) {
      const V xhat = v.normalized(lanes.get(x + i));
      const V dz = v.masked(xhat, lanes.get(dy + i));
      acc[0] += dz;
      acc[1] += dz * xhat;
    };
  });
}

// xhat, its tangent, dz and its tangent at one element
struct NormPoint {
  V xhat, txhat, dz, tdz;
};

struct NormInputs {
  const S *x, *tx, *dy, *tdy;
};

template <bool Partial>
struct NormPoints {
  NormInputs in;
  Lanes<Partial> lanes;
  ChannelVector<Partial> v;
  V tmean, q;

  FM_INLINE NormPoints(const NormInputs& inputs, const BatchNorm& b, Lanes<Partial> l, index_t c)
      : in(inputs), lanes(l), v(b, l, c), tmean(l.get(b.tmean + c)), q(l.get(b.q + c)) {}

  FM_INLINE V tangent(index_t i, V xhat) const {
    return math::normalize_tangent(in.tx ? lanes.get(in.tx + i) : V{}, xhat, v.r, tmean, q);
  }
  FM_INLINE NormPoint at(index_t i) const {
    NormPoint p;
    p.xhat = v.normalized(lanes.get(in.x + i));
    p.txhat = tangent(i, p.xhat);
    p.dz = v.masked(p.xhat, lanes.get(in.dy + i));
    p.tdz = v.masked(p.xhat, lanes.get(in.tdy + i));
    return p;
  }
};

// sums of tdz and of tdz xhat + dz txhat
inline Sums tangent_adjoint_sums(const BatchNorm& b, index_t rows, const NormInputs& in,
                                 const Exec& exec) {
  return reduce_rows(rows, b.channels, exec, [&](auto lanes, index_t c) {
    return [=, points = NormPoints(in, b, lanes, c)](index_t i, V* acc) {
      const NormPoint p = points.at(i);
      acc[0] += p.tdz;
      acc[1] += p.tdz * p.xhat + p.dz * p.txhat;
    };
  });
}

// The channel means that dx and tdx take: of h and h xhat, and their tangents.
struct AdjointMeans {
  V m1, m2, tm1, tm2;

  template <bool Partial>
  FM_INLINE AdjointMeans(const BatchNorm& b, const ChannelVector<Partial>& v, Lanes<Partial> lanes,
                         index_t c, const S* ts1, const S* ts2) {
    const V s1 = lanes.get(b.s1 + c), s2 = lanes.get(b.s2 + c);
    m1 = v.scale * s1;
    m2 = v.scale * s2;
    tm1 = ts1 ? v.scale * lanes.get(ts1 + c) + v.tscale * s1 : V{};
    tm2 = ts2 ? v.scale * lanes.get(ts2 + c) + v.tscale * s2 : V{};
  }
};

// -- the passes -----------------------------------------------------------------------------------

inline void batch_norm_forward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  const auto term = [&](auto lanes, index_t c) {
    const V first = lanes.get(a.x + c);
    return [=, x = a.x](index_t i, V* acc) {
      const V v = lanes.get(x + i) - first;
      acc[0] += v;
      acc[1] += v * v;
    };
  };
  store_statistics(a, b, reduce_rows(b.rows, b.channels, exec, term));
  map_output(b, b.rows, a.x, a.y, exec);
}

inline void batch_norm_backward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  store_adjoint_sums(b, *a.desc, adjoint_sums(b, b.rows, a.x, a.dy, exec), b.s1, b.s2, a.dw);
  if (!a.dx) return;
  map_rows(b.rows, b.channels, exec, [&](auto lanes, index_t c) {
    const ChannelVector v(b, lanes, c);
    const AdjointMeans m(b, v, lanes, c, nullptr, nullptr);
    return [=, x = a.x, dy = a.dy, dx = a.dx](index_t i) {
      const V xhat = v.normalized(lanes.get(x + i));
      const V h = v.scale * v.masked(xhat, lanes.get(dy + i));
      lanes.put(dx + i, math::normalize_backward(h, xhat, v.r, m.m1, m.m2));
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
  store_tangent_statistics(b, reduce_rows(b.rows, b.channels, exec, term));
  map_tangent(b, b.rows, a.x, a.tx, a.ty, exec);
}

inline void batch_norm_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  const BatchNorm b = batch_norm_of(a);
  const NormInputs in{a.x, a.tx, a.dy, a.tdy};
  S* ts1 = scratch_row(exec, b.channels, 0);
  S* ts2 = scratch_row(exec, b.channels, 1);
  store_adjoint_sums(b, *a.desc, tangent_adjoint_sums(b, b.rows, in, exec), ts1, ts2, a.tdw);
  if (!a.tdx) return;
  map_rows(b.rows, b.channels, exec, [&](auto lanes, index_t c) {
    const NormPoints points(in, b, lanes, c);
    const AdjointMeans m(b, points.v, lanes, c, ts1, ts2);
    return [=, tdx = a.tdx](index_t i) {
      const auto& v = points.v;
      const NormPoint p = points.at(i);
      const V dx = math::normalize_backward(v.scale * p.dz, p.xhat, v.r, m.m1, m.m2);
      const V th = v.scale * p.tdz + v.tscale * p.dz;
      lanes.put(tdx + i, math::normalize_tangent_backward(dx, th, p.xhat, p.txhat, v.r, points.q,
                                                          m.m2, m.tm1, m.tm2));
    };
  });
}

}  // namespace FM_KERNELS
