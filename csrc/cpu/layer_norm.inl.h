// Layer norm over all features of a sample. Formulas in math/normalize.h.
//
// saved [6, N]: mean, r, m1, m2, tmean, q of every sample.

namespace FM_KERNELS {

struct LayerNorm {
  index_t samples, features;
  const S *scale, *tscale, *shift, *tshift;  // [F], null where absent or not perturbed
  S *mean, *r, *m1, *m2, *tmean, *q;         // saved, [N]
};

inline LayerNorm layer_norm_of(const LayerArgs<S>& a) {
  const LayerDesc& d = *a.desc;
  const index_t n = a.samples;
  const auto scale_of = [&](const S* w) { return d.has_weight && w ? w : nullptr; };
  const auto shift_of = [&](const S* w) { return d.has_bias && w ? w + d.bias_offset : nullptr; };
  S* s = a.saved;
  return {n, d.in.size(), scale_of(a.w), scale_of(a.tw), shift_of(a.w), shift_of(a.tw),
          s, s + n,       s + 2 * n,     s + 3 * n,      s + 4 * n,     s + 5 * n};
}

FM_INLINE S at_or(const S* p, index_t i, S otherwise) { return p ? p[i] : otherwise; }

inline void layer_norm_forward(const LayerArgs<S>& a, const Exec&) {
  const LayerNorm b = layer_norm_of(a);
  for (index_t n = 0; n < b.samples; ++n) {
    const S* x = a.x + n * b.features;
    double sum = 0, squares = 0;
    for (index_t i = 0; i < b.features; ++i) sum += double(x[i]);
    const double mean = sum / double(b.features);
    for (index_t i = 0; i < b.features; ++i)
      squares += (double(x[i]) - mean) * (double(x[i]) - mean);
    b.mean[n] = S(mean);
    b.r[n] = S(1.0 / std::sqrt(squares / double(b.features) + a.desc->eps));
    for (index_t i = 0; i < b.features; ++i) {
      const S xhat = math::normalized(x[i], b.mean[n], b.r[n]);
      a.y[n * b.features + i] = at_or(b.scale, i, S(1)) * xhat + at_or(b.shift, i, S(0));
    }
  }
}

inline void clear_adjoints(const LayerDesc& d, index_t features, S* dw) {
  if (dw && d.has_weight) std::memset(dw, 0, features * sizeof(S));
  if (dw && d.has_bias) std::memset(dw + d.bias_offset, 0, features * sizeof(S));
}

inline void layer_norm_backward(const LayerArgs<S>& a, const Exec&) {
  const LayerNorm b = layer_norm_of(a);
  const LayerDesc& d = *a.desc;
  clear_adjoints(d, b.features, a.dw);
  for (index_t n = 0; n < b.samples; ++n) {
    const S *x = a.x + n * b.features, *dy = a.dy + n * b.features;
    double sum1 = 0, sum2 = 0;
    for (index_t i = 0; i < b.features; ++i) {
      const S xhat = math::normalized(x[i], b.mean[n], b.r[n]);
      const S h = at_or(b.scale, i, S(1)) * dy[i];
      sum1 += double(h);
      sum2 += double(h * xhat);
      if (a.dw && d.has_weight) a.dw[i] += dy[i] * xhat;
      if (a.dw && d.has_bias) a.dw[d.bias_offset + i] += dy[i];
    }
    b.m1[n] = S(sum1 / double(b.features));
    b.m2[n] = S(sum2 / double(b.features));
    for (index_t i = 0; a.dx && i < b.features; ++i) {
      const S xhat = math::normalized(x[i], b.mean[n], b.r[n]);
      const S h = at_or(b.scale, i, S(1)) * dy[i];
      a.dx[n * b.features + i] = math::normalize_backward(h, xhat, b.r[n], b.m1[n], b.m2[n]);
    }
  }
}

inline void layer_norm_tangent_forward(const LayerArgs<S>& a, const Exec&) {
  const LayerNorm b = layer_norm_of(a);
  for (index_t n = 0; n < b.samples; ++n) {
    const S* x = a.x + n * b.features;
    const S* tx = a.tx ? a.tx + n * b.features : nullptr;
    double sum1 = 0, sum2 = 0;
    for (index_t i = 0; tx && i < b.features; ++i) {
      sum1 += double(tx[i]);
      sum2 += double(tx[i] * math::normalized(x[i], b.mean[n], b.r[n]));
    }
    b.tmean[n] = S(sum1 / double(b.features));
    b.q[n] = S(double(b.r[n]) * sum2 / double(b.features));
    for (index_t i = 0; i < b.features; ++i) {
      const S xhat = math::normalized(x[i], b.mean[n], b.r[n]);
      const S t = math::normalize_tangent(at_or(tx, i, S(0)), xhat, b.r[n], b.tmean[n], b.q[n]);
      a.ty[n * b.features + i] =
          at_or(b.scale, i, S(1)) * t + at_or(b.tscale, i, S(0)) * xhat + at_or(b.tshift, i, S(0));
    }
  }
}

inline void layer_norm_tangent_backward(const LayerArgs<S>& a, const Exec&) {
  const LayerNorm b = layer_norm_of(a);
  const LayerDesc& d = *a.desc;
  clear_adjoints(d, b.features, a.tdw);
  for (index_t n = 0; n < b.samples; ++n) {
    const index_t row = n * b.features;
    const S *x = a.x + row, *dy = a.dy + row, *tdy = a.tdy + row;
    const S* tx = a.tx ? a.tx + row : nullptr;
    const auto xhat_at = [&](index_t i) { return math::normalized(x[i], b.mean[n], b.r[n]); };
    const auto txhat_at = [&](index_t i, S xhat) {
      return math::normalize_tangent(at_or(tx, i, S(0)), xhat, b.r[n], b.tmean[n], b.q[n]);
    };
    const auto th_at = [&](index_t i) {
      return at_or(b.scale, i, S(1)) * tdy[i] + at_or(b.tscale, i, S(0)) * dy[i];
    };
    double sum1 = 0, sum2 = 0;
    for (index_t i = 0; i < b.features; ++i) {
      const S xhat = xhat_at(i), txhat = txhat_at(i, xhat), th = th_at(i);
      sum1 += double(th);
      sum2 += double(th * xhat + at_or(b.scale, i, S(1)) * dy[i] * txhat);
      if (a.tdw && d.has_weight) a.tdw[i] += tdy[i] * xhat + dy[i] * txhat;
      if (a.tdw && d.has_bias) a.tdw[d.bias_offset + i] += tdy[i];
    }
    const S tm1 = S(sum1 / double(b.features)), tm2 = S(sum2 / double(b.features));
    for (index_t i = 0; a.tdx && i < b.features; ++i) {
      const S xhat = xhat_at(i), txhat = txhat_at(i, xhat);
      const S h = at_or(b.scale, i, S(1)) * dy[i];
      const S dx = math::normalize_backward(h, xhat, b.r[n], b.m1[n], b.m2[n]);
      a.tdx[row + i] = math::normalize_tangent_backward(dx, th_at(i), xhat, txhat, b.r[n], b.q[n],
                                                        b.m2[n], tm1, tm2);
    }
  }
}

}  // namespace FM_KERNELS
