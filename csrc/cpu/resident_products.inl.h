// The products of a stage of a resident task (resident.inl.h says what letters mean).

namespace FM_KERNELS {

// out = base + factor * rate (.) g, for w^T only if `both`, unless there is no other
struct ParameterTarget {
  S* out;
  const S* base;
  S factor;
  const S* rates;  // [segments], null: 1
  bool both;
};

// As many samples at a time as a vector has lanes; those beyond the last repeat it, so that sums
// stay in registers.
inline void dots(const Stage& s, const Operands& pairs, const S* bias, index_t count, S* c) {
  const V start = splat(bias ? *bias : S(0));
  for (index_t first = 0; first < count; first += kLanes) {
    const index_t samples = min_of(kLanes, count - first);
    V sums[kLanes] = {};
    for (int i = 0; i < pairs.count; ++i) {
      const S *x = pairs.pair[i].src + first * s.in_row, *w = pairs.pair[i].other;
      for_row(s.in, [&](auto lanes, index_t k) {
        const V weight = lanes.get(w + k);
#pragma GCC unroll 16
        for (index_t n = 0; n < kLanes; ++n) {
          sums[n] += lanes.get(x + min_of(n, samples - 1) * s.in_row + k) * weight;
        }
      });
    }
    sum_each<int(kLanes) / 2>(sums);
    if (s.out_row == 1) {
      store(c + first, start + sums[0]);
      continue;
    }
    S values[kLanes];
    store(values, start + sums[0]);
    for (index_t n = 0; n < samples; ++n) c[(first + n) * s.out_row] = values[n];
  }
}

// c [N, out_row] = bias + x w summed over pairs of x and a set of parameters, and `first`
inline void forward_product(const Stage& s, Operands pairs, const S* bias, index_t count, bool relu,
                            const S* mask, S* c, const ScaledOperands& first) {
  for (int i = 0; i < pairs.count; ++i) pairs.pair[i].other += s.single() ? s.wt : s.w;
  if (s.single()) return dots(s, pairs, bias, count, c);
  RowsProduct product{count, s.out_row, s.in, pairs, s.in_row, 1, c, {}, first};
  product.epilogue.start = bias;
  product.epilogue.relu = relu;
  product.epilogue.mask = mask;
  rows_product<false>(product);
}

inline S target_rate(const Stage& s, index_t tensor, const ParameterTarget& t) {
  return t.rates ? t.factor * t.rates[s.layer->segment + tensor] : t.factor;
}

// c [N, in_row] = d w^T summed over pairs, and `first`
inline void adjoint_product(const Stage& s, const Operands& pairs, index_t count, const S* mask,
                            S* c, const ScaledOperands& first) {
  RowsProduct product{count, s.in_row, s.out, pairs, s.out_row, 1, c, {}, first};
  product.epilogue.mask = mask;
  rows_product<false>(product);
}

inline Operands swapped(const Operands& pairs) {
  Operands result;
  for (int i = 0; i < pairs.count; ++i) result.add(pairs.pair[i].other, pairs.pair[i].src);
  return result;
}

inline void weight_products(const Stage& s, bool first, const Operands& pairs, index_t count,
                            const ParameterTarget& t) {
  RowsProduct w{s.in, s.out_row, count, pairs, 1, s.in_row, t.out + s.w, {}, {}};
  w.epilogue.base = t.base ? t.base + s.w : nullptr;
  w.epilogue.scale = target_rate(s, 0, t);
  rows_product<true>(w);
  if (!t.both || first) return;
  RowsProduct wt{s.out, s.in_row, count, swapped(pairs), 1, s.out_row, t.out + s.wt, {}, {}};
  wt.epilogue.base = t.base ? t.base + s.wt : nullptr;
  wt.epilogue.scale = target_rate(s, 0, t);
  rows_product<true>(wt);
}

// As weight_products, where the base is xq^T dq of `queries` samples.
inline void weight_products(const Stage& s, const Operands& query, index_t queries,
                            const Operands& pairs, index_t count, const ParameterTarget& t) {
  const S rate = target_rate(s, 0, t);
  rows_product<true>(RowsProduct{s.in,
                                 s.out_row,
                                 queries,
                                 query,
                                 1,
                                 s.in_row,
                                 t.out + s.w,
                                 {},
                                 {pairs, count, s.in_row, rate}});
  if (!t.both) return;
  rows_product<true>(RowsProduct{s.out,
                                 s.in_row,
                                 queries,
                                 swapped(query),
                                 1,
                                 s.out_row,
                                 t.out + s.wt,
                                 {},
                                 {swapped(pairs), count, s.out_row, rate}});
}

inline void bias_sums(const Stage& s, const Operands& pairs, index_t count,
                      const ParameterTarget& t) {
  if (!s.layer->has_bias) return;
  sum_rows(pairs.pair[0].other, count, s.out_row, t.base ? t.base + s.b : nullptr,
           target_rate(s, 1, t), t.out + s.b);
}

// With one output, w^T is a row and d a number a sample: x is read once for both products.
inline void single_products(const Stage& s, bool masked, const Operands& adjoint,
                            const Operands& pairs, index_t count, S* c, const ParameterTarget& t) {
  const Operand *to_c = adjoint.pair, *to_w = pairs.pair;
  const bool two_to_c = adjoint.count == 2, two_to_w = pairs.count == 2;
  const V scale = splat(target_rate(s, 0, t));
  for_row(s.in, [&](auto lanes, index_t k) {
    const V w = lanes.get(to_c[0].other + k);
    const V other = two_to_c ? lanes.get(to_c[1].other + k) : V{};
    V sum{};
    for (index_t n = 0; n < count; ++n) {
      const index_t i = n * s.in_row + k, o = n * s.out_row;
      const V x = lanes.get(to_w[0].src + i);
      V dx = to_c[0].src[o] * w;
      if (two_to_c) dx += to_c[1].src[o] * other;
      lanes.put(c + i, masked ? select(x > V{}, dx, V{}) : dx);
      sum += to_w[0].other[o] * x;
      if (two_to_w) sum += to_w[1].other[o] * lanes.get(to_w[1].src + i);
    }
    S* out = t.out + s.wt + k;
    lanes.put(out, (t.base ? lanes.get(t.base + s.wt + k) : V{}) + scale * sum);
  });
  if (!s.layer->has_bias) return;
  S sum = 0;
  for (index_t n = 0; n < count; ++n) sum += to_w[0].other[n * s.out_row];
  t.out[s.b] = (t.base ? t.base[s.b] : S(0)) + target_rate(s, 1, t) * sum;
}

}  // namespace FM_KERNELS
