// The first convolution with the batch norm and pooling above it, where winners and moments are
// enough: its outputs are never stored, and only the forward pass computes them all.
//
// With h the scaled adjoint behind pooling and ReLU, zero but for winners (math/normalize.h),
//
//   dy   = r (h - m1 - yhat m2)
//   dw   = r (sum P h - m1 s - m2 X)                                     X = sum P yhat = r G w
//   ty   of the winners;   tmean = tw' s / n + tb,   q = X' tw r / n
//   tdw  = r (sum P (th - q h) - (tm1 - q m1) s - m2 TX - (tm2 - q m2) X)
//                                                  TX = sum P tyhat = r G tw - q X
//
// with patches P and their moments s and G of patch_moments.inl.h: sums over winners and products
// of small matrices. The bias has no gradient.
//
//   y          the first row of the first image, and the winners' places, a byte each
//   saved      G and s, from each forward pass

namespace FM_KERNELS {

// Whether these passes are for a convolution and the norm above it: in whole vectors of outputs.
inline bool takes_winners(const LayerArgs<S>& a) {
  const LayerDesc &d = *a.desc, &up = *a.above->desc;
  const index_t c = d.in.channels;
  return kPermutes && d.window.kernel[0] == 3 && d.window.kernel[1] == 3 && (c == 1 || c == 3) &&
         d.out.channels % kLanes == 0 && up.window.kernel[0] == 2 && up.window.kernel[1] == 2;
}

// One of them, for a number of channels that the compiler knows.
template <int C>
struct ConvWinners {
  static constexpr index_t kPatch = 9 * C;
  const LayerArgs<S>& a;
  const LayerArgs<S>& up;
  const Exec& exec;
  PooledNorm p;
  ConvBand b;
  PatchMoments moments;
  Windows<2> windows;
  std::uint8_t* places;
  S *product, *tangent_product;  // X and TX [patch, width]
  index_t strips, parts;

  ConvWinners(const LayerArgs<S>& args, const Exec& e)
      : a(args),
        up(*args.above),
        exec(e),
        p(pooled_norm_of(up)),
        b(*args.desc, e),
        moments(args.saved, kPatch),
        windows{*up.desc},
        places(reinterpret_cast<std::uint8_t*>(args.y + args.desc->out.width * b.outputs)),
        product(b.moments),
        tangent_product(b.moments + b.sum_size),
        strips(windows.strips(args.samples)),
        parts(min_of(kStatisticParts, strips)) {}

  index_t pixels() const { return a.samples * a.desc->out.pixels(); }

  // body(part, strip, its rows) with the strip's x in the band of the part; `begin` and `end` of
  // each part.
  template <class Begin, class Body>
  void for_strips(index_t work, Begin&& begin, Body&& body) const {
    parallel(exec, parts, 1, strips / parts * work, [&](index_t first, index_t last) {
      for (index_t part = first; part < last; ++part) {
        begin(part);
        for (index_t s = strips * part / parts; s < strips * (part + 1) / parts; ++s) {
          const StripRows at(windows, s);
          b.load_band(a.x, at.image, at.begin, at.end, b.band(part));
          body(part, s, at);
        }
      }
    });
  }
  index_t work(index_t products) const {
    return products * kPatch * b.outputs * up.desc->out.width;
  }

  WinnerStrip strip(index_t part, index_t s, index_t c) const {
    const index_t width = up.desc->out.width;
    return {b.band(part), b.row, width, b.outputs, b.width, places + s * width * b.outputs + c};
  }

  // X of the weights that the panel holds.
  void multiply_moments() const {
    moments.multiply(b.panel, b.width, product);
    for (index_t c = 0; c < b.width; c += kLanes) {
      const V r = load(p.norm.r + c);
      for (index_t i = 0; i < kPatch; ++i) {
        S* to = product + i * b.width + c;
        store(to, r * load(to));
      }
    }
  }

  // Two sums of a strip's outputs y, its winners and their places.
  void pick_winners(index_t s, const StripRows& at, const S* y, double* sums) const {
    const index_t c_step = b.outputs, width = a.desc->out.width, row = width * c_step;
    const index_t count = up.desc->out.width, out = s * count * c_step;
    const VI place[4] = {VI{}, VI{} + Int(C), VI{} + Int(kLanes), VI{} + Int(kLanes + C)};
    for (index_t c = 0; c < b.outputs; c += kLanes) {
      const PooledSums<false> sum(up, p, {kLanes}, c);
      V acc[2] = {};
      for (index_t w = 0; w < count; ++w) {
        const S* from = y + w * 2 * c_step + c;
        V own[2] = {}, winner = load(from), best = sum.sign * winner;
        VI where = place[0];
        sum.add(winner, own);
#pragma GCC unroll 3
        for (int t = 1; t < 4; ++t) {
          const V value = load(from + t / 2 * row + t % 2 * c_step), key = sum.sign * value;
          sum.add(value, own);
          const VI better = key > best;
          best = select(better, key, best);
          winner = select(better, value, winner);
          where = better ? place[t] : where;
        }
        acc[0] += own[0];
        acc[1] += own[1];
        store(p.x + out + w * c_step + c, winner);
        store_places(places + out + w * c_step + c, where);
      }
      for (index_t r = 0; r < at.end - at.begin; ++r) {
        for (index_t q = r < 2 ? 2 * count : 0; q < width; ++q) {
          sum.add(load(y + r * row + q * c_step + c), acc);
        }
      }
      add_wide(sums + c, acc[0]);
      add_wide(sums + align_up(b.outputs, 16) + c, acc[1]);
    }
  }

  void forward() const {
    const index_t width = align_up(b.outputs, 16);
    double* sums = reinterpret_cast<double*>(scratch_row(exec, b.outputs, 2));
    b.load_weights(a.w);
    b.load_band(a.x, 0, 0, 1, b.band(0));  // sums are taken of y less its first pixel
    band_convolve(b, b.band(0), 1, a.y);
    for_strips(
        work(6),
        [&](index_t part) {
          PatchSums<C>(b.patch_sum(part)).clear();
          std::memset(sums + part * 2 * width, 0, 2 * width * sizeof(double));
        },
        [&](index_t part, index_t s, const StripRows& at) {
          PatchSums<C>(b.patch_sum(part))
              .add_strip(b.band(part), b.row, a.desc->out.width, at.begin, at.end,
                         a.desc->out.height);
          band_convolve(b, b.band(part), at.end - at.begin, b.adjoint(part));
          pick_winners(s, at, b.adjoint(part), sums + part * 2 * width);
        });
    moments.store<C>(b.patch_sums, b.patch_size, parts, pixels());
    for (index_t part = 1; part < parts; ++part) {
      for (index_t i = 0; i < 2 * width; ++i) sums[i] += sums[part * 2 * width + i];
    }
    store_statistics(up, p.norm, {sums, sums + width});
  }

  void tangent_forward() const {
    b.load_weights(a.w);
    multiply_moments();
    b.load_weights(a.tw);
    for_strips(
        work(2), [](index_t) {},
        [&](index_t part, index_t s, const StripRows&) {
          for (index_t c = 0; c < b.outputs; c += kLanes) {
            const WinnerStrip at = strip(part, s, c);
            S* t = p.tx + s * at.windows * b.outputs + c;
            index_t w = 0;
            for (; w + 2 <= at.windows; w += 2) winner_outputs<C, 2>(at, w, b.panel + c, t);
            if (w < at.windows) winner_outputs<C, 1>(at, w, b.panel + c, t);
          }
        });
    const V each = splat(S(1.0 / double(pixels())));
    for (index_t c = 0; c < b.outputs; c += kLanes) {
      V mean{}, q{};
      for (index_t i = 0; i < kPatch; ++i) {
        const V tw = load(b.panel + i * b.width + c);
        mean += splat(moments.sums[i]) * tw;
        q += load(product + i * b.width + c) * tw;
      }
      store(p.norm.tmean + c, each * mean + load(b.panel + kPatch * b.width + c));
      store(p.norm.q + c, load(p.norm.r + c) * each * q);
    }
  }

  // The parts' sums over winners of P h: make(channel) gives h(element of the pooled image).
  template <class Make>
  void sum_winners(Make&& make) const {
    for_strips(
        work(2), [&](index_t part) { std::memset(b.sum(part), 0, b.sum_size * sizeof(S)); },
        [&](index_t part, index_t s, const StripRows&) {
          S* h = b.adjoint(part);
          for (index_t c = 0; c < b.outputs; c += kLanes) {
            const WinnerStrip at = strip(part, s, c);
            const auto value = make(c);
            const index_t out = s * at.windows * b.outputs + c;
            for (index_t w = 0; w < at.windows; ++w) {
              store(h + w * b.width + c, value(out + w * b.outputs));
            }
            S* sum = b.sum(part) + c;
            if constexpr (C == 1) {
              winner_gradient<C, 0, 3>(at, h + c, sum);
            } else {
              winner_gradient<C, 0, 2>(at, h + c, sum);
              winner_gradient<C, 2, 1>(at, h + c, sum);
            }
          }
        });
  }

  // dw[i] = finish(i, sum over winners, at a channel)
  template <class Finish>
  void store_gradient(S* dw, Finish&& finish) const {
    for (index_t c = 0; c < b.outputs; c += kLanes) {
      const auto value = finish(c);
      for (index_t i = 0; i < kPatch; ++i) {
        V total{};
        for (index_t part = 0; part < parts; ++part) total += load(b.sum(part) + i * b.width + c);
        store(dw + i * b.outputs + c, value(total, i));
      }
      // nothing, or NaN
      if (a.desc->has_bias) store(dw + a.desc->bias_offset + c, V{} * load(p.norm.r + c));
    }
  }

  void backward() const {
    b.load_weights(a.w);
    multiply_moments();
    sum_winners([&](index_t c) {
      return [=, v = ChannelVector<false>(p.norm, {kLanes}, c), x = p.x, dy = up.dy](index_t i) {
        return v.scale * v.masked(v.normalized(load(x + i)), load(dy + i));
      };
    });
    store_gradient(a.dw, [&](index_t c) {
      const ChannelVector<false> v(p.norm, {kLanes}, c);
      const AdjointMeans m(p.norm, v, {kLanes}, c, nullptr, nullptr);
      return [=, x_of = product + c, s = moments.sums, width = b.width](V sum, index_t i) {
        const V x = load(x_of + i * width);
        return v.r * (sum - m.m1 * splat(s[i]) - m.m2 * x);
      };
    });
  }

  void tangent_backward() const {
    BatchNorm norm = p.norm;
    norm.tscale = p.tscale;
    b.load_weights(a.w);
    multiply_moments();
    b.load_weights(a.tw);
    moments.multiply(b.panel, b.width, tangent_product);
    sum_winners([&](index_t c) {
      return [=, v = ChannelVector<false>(norm, {kLanes}, c), q = load(norm.q + c), x = p.x,
              dy = up.dy, tdy = up.tdy](index_t i) {
        const V xhat = v.normalized(load(x + i));
        const V dz = v.masked(xhat, load(dy + i)), tdz = v.masked(xhat, load(tdy + i));
        return v.scale * tdz + v.tscale * dz - q * (v.scale * dz);
      };
    });
    store_gradient(a.tdw, [&](index_t c) {
      const ChannelVector<false> v(norm, {kLanes}, c);
      const AdjointMeans m(norm, v, {kLanes}, c, p.ts1, p.ts2);
      const V q = load(norm.q + c);
      return [=, x_of = product + c, tx_of = tangent_product + c, s = moments.sums,
              width = b.width](V sum, index_t i) {
        const V x = load(x_of + i * width);
        const V tx = v.r * load(tx_of + i * width) - q * x;
        return v.r * (sum - (m.tm1 - q * m.m1) * splat(s[i]) - m.m2 * tx - (m.tm2 - q * m.m2) * x);
      };
    });
  }
};

// Calls body with the passes of a convolution.
template <class Body>
void with_winners(const LayerArgs<S>& a, const Exec& exec, Body&& body) {
  if constexpr (kPermutes) {
    if (a.desc->in.channels == 1) {
      body(ConvWinners<1>(a, exec));
    } else {
      body(ConvWinners<3>(a, exec));
    }
  }
}

// A bilinear layer's passes: alone, or with what is above it, where the winners may be enough.
inline void conv_forward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.above) return bilinear_forward(a, exec);
  if (!takes_winners(a)) return conv_norm_pool_forward(a, exec);
  with_winners(a, exec, [](const auto& passes) { passes.forward(); });
}
inline void conv_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.above) return bilinear_backward(a, exec);
  if (!takes_winners(a)) return conv_norm_pool_backward(a, exec);
  if (a.dw) with_winners(a, exec, [](const auto& passes) { passes.backward(); });
}
inline void conv_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.above) return bilinear_tangent_forward(a, exec);
  if (!takes_winners(a)) return conv_norm_pool_tangent_forward(a, exec);
  with_winners(a, exec, [](const auto& passes) { passes.tangent_forward(); });
}
inline void conv_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (!a.above) return bilinear_tangent_backward(a, exec);
  if (!takes_winners(a)) return conv_norm_pool_tangent_backward(a, exec);
  if (a.tdw) with_winners(a, exec, [](const auto& passes) { passes.tangent_backward(); });
}

}  // namespace FM_KERNELS
