// Linear and Conv2d: y = w * x + b, linear in w and in x.
//
//   backward           dx = w' dy            dw = dy x'             db = sum dy
//   tangent_forward    ty = tw * x + w * tx + tb
//   tangent_backward   tdx = w' tdy + tw' dy tdw = tdy x' + dy tx'  tdb = sum tdy
//
// x [N, in], y [N, out] channels last; w [kernel pixels * in channels, out channels]. A tangent is
// the same product with two operand pairs. dx reads the weights transposed within each kernel
// pixel; the transposes live in scratch. Convolutions are direct, product.inl.h, or by Winograd's
// filtering, winograd.inl.h.

namespace FM_KERNELS {

inline const S* transposed_weights(const LayerDesc& d, const S* w, S* dst) {
  if (!w) return nullptr;
  const index_t in = d.in.channels, out = d.out.channels;
  const index_t pixels = d.window.kernel[0] * d.window.kernel[1];
  if (in == 1 || out == 1) return w;
  for (index_t p = 0; p < pixels; ++p) transpose(w + p * in * out, in, out, dst + p * in * out, in);
  return dst;
}

// out[c] = base[c] + scale * sum over rows of values[r, c]: blocks of rows first, so that long sums
// stay accurate; four chains at a time, so that they do not wait for each other
inline void sum_rows(const S* values, index_t rows, index_t columns, const S* base, S scale,
                     S* out) {
  constexpr index_t kBlock = 256;
  for_columns(columns, [&](auto lanes, index_t c) {
    V total{};
    for (index_t r0 = 0; r0 < rows; r0 += kBlock) {
      V sum[4] = {};
      const index_t r1 = min_of(rows, r0 + kBlock);
      index_t r = r0;
      for (; r + 4 <= r1; r += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] += lanes.get(values + (r + i) * columns + c);
      }
      for (; r < r1; ++r) sum[0] += lanes.get(values + r * columns + c);
      total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    const V scaled = scale * total;
    lanes.put(out + c, base ? lanes.get(base + c) + scaled : scaled);
  });
}

// Lanes are added pairwise, in an order of their own that never depends on the data.
FM_INLINE S sum_lanes(V v) {
  S lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (index_t half = kLanes / 2; half >= 1; half /= 2) {
#pragma GCC unroll 8
    for (index_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// A dense layer with one output has no row of outputs to vectorise over: its products run over the
// inputs instead.
inline bool has_single_output(const LayerDesc& d) { return d.dense() && d.out.channels == 1; }

inline index_t dense_rows_of(const LayerArgs<S>& a) { return a.samples * a.desc->in.pixels(); }

inline void single_output_forward(const LayerArgs<S>& a, const Operands& operands, const S* bias,
                                  S* y) {
  const index_t in = a.desc->in.channels, rows = dense_rows_of(a);
  for (index_t n = 0; n < rows; ++n) {
    V sum{};
    for (int pair = 0; pair < operands.count; ++pair) {
      const S *x = operands.pair[pair].src + n * in, *w = operands.pair[pair].other;
      for_columns(in, [&](auto lanes, index_t i) { sum += lanes.get(x + i) * lanes.get(w + i); });
    }
    y[n] = sum_lanes(sum) + (bias ? *bias : S(0));
  }
}

// The scale of an update, times its rate where there is one.
FM_INLINE S scale_of(S scale, const S* rate) { return rate ? scale * *rate : scale; }

inline void single_output_gradient(const LayerArgs<S>& a, const Operands& operands, S* dw) {
  const index_t in = a.desc->in.channels, rows = dense_rows_of(a);
  const S scale = scale_of(a.weight_scale, a.weight_rate);
  for_columns(in, [&](auto lanes, index_t i) {
    V sum{};
    for (int pair = 0; pair < operands.count; ++pair) {
      const S *x = operands.pair[pair].src + i, *dy = operands.pair[pair].other;
      for (index_t n = 0; n < rows; ++n) sum += lanes.get(x + n * in) * splat(dy[n]);
    }
    const V scaled = scale * sum;
    lanes.put(dw + i, a.dw_base ? lanes.get(a.dw_base + i) + scaled : scaled);
  });
}

inline const S* bias_of(const LayerDesc& d, const S* w) {
  return d.has_bias && w ? w + d.bias_offset : nullptr;
}

// y or ty; the mask of a tangent is the ReLU's output
inline void bilinear_outputs(const LayerArgs<S>& a, const Operands& operands, const S* bias,
                             const S* mask, S* out, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  if (has_single_output(d)) return single_output_forward(a, operands, bias, out);
  if (!d.dense()) {
    const WinogradSizes size(d, a.samples);
    if (size.outputs) {
      const index_t* padding = d.window.padding;
      return winograd_product(
          {operands, d.in, d.out, a.samples, {padding[0], padding[1]}, false, bias, out}, size,
          exec);
    }
    return gather_product({&d.geometry->forward, operands, a.samples, d.out.channels, bias, out},
                          exec);
  }
  const index_t in = d.in.channels;
  DenseProduct p{dense_rows_of(a), d.out.channels, in, operands, in, 1, out, {}};
  p.epilogue.start = bias;
  p.epilogue.relu = d.relu && !mask;
  p.epilogue.mask = mask;
  dense_product(p, exec);
}

inline void bilinear_forward(const LayerArgs<S>& a, const Exec& exec) {
  Operands operands;
  operands.add(a.x, a.w);
  bilinear_outputs(a, operands, bias_of(*a.desc, a.w), nullptr, a.y, exec);
}

inline void bilinear_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  Operands operands;
  operands.add(a.x, a.tw);
  operands.add(a.tx, a.w);
  bilinear_outputs(a, operands, bias_of(*a.desc, a.tw), a.desc->relu ? a.y : nullptr, a.ty, exec);
}

inline void bilinear_input_adjoint(const LayerArgs<S>& a, const Operands& operands, S* dx,
                                   const Exec& exec) {
  const LayerDesc& d = *a.desc;
  if (!d.dense()) {
    const WinogradSizes size(d, a.samples);
    if (size.inputs) {
      const index_t* padding = d.window.padding;
      return winograd_product(
          {operands, d.out, d.in, a.samples, {2 - padding[0], 2 - padding[1]}, true, nullptr, dx},
          size, exec);
    }
    return gather_product({&d.geometry->backward, operands, a.samples, d.in.channels, nullptr, dx},
                          exec);
  }
  const index_t out = d.out.channels;
  DenseProduct p{dense_rows_of(a), d.in.channels, out, operands, out, 1, dx, {}};
  p.epilogue.mask = d.relu_input ? a.x : nullptr;
  dense_product(p, exec);
}

inline void bilinear_weight_adjoint(const LayerArgs<S>& a, const Operands& operands,
                                    const S* bias_source, S* dw, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  const index_t in = d.in.channels, out = d.out.channels;
  if (d.has_bias) {
    sum_rows(bias_source, a.samples * d.out.pixels(), out,
             a.dw_base ? a.dw_base + d.bias_offset : nullptr, scale_of(a.bias_scale, a.bias_rate),
             dw + d.bias_offset);
  }
  if (has_single_output(d)) return single_output_gradient(a, operands, dw);
  if (!d.dense()) {
    const WinogradSizes size(d, a.samples);
    if (size.outputs) return winograd_gradient(d, operands, a.samples, size, dw, exec);
    const index_t inputs = d.window.kernel[0] * d.window.kernel[1] * in;
    return weight_gradient({&d.geometry->forward, operands, a.samples, inputs, out, dw}, in, exec);
  }
  DenseProduct p{in, out, dense_rows_of(a), operands, 1, in, dw, {}};
  p.epilogue.base = a.dw_base;
  p.epilogue.scale = scale_of(a.weight_scale, a.weight_rate);
  dense_gradient(p, exec);
}

inline void bilinear_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.dx) {
    Operands operands;
    operands.add(a.dy, transposed_weights(*a.desc, a.w, static_cast<S*>(exec.scratch)));
    bilinear_input_adjoint(a, operands, a.dx, exec);
  }
  if (a.dw) {
    Operands operands;
    operands.add(a.x, a.dy);
    bilinear_weight_adjoint(a, operands, a.dy, a.dw, exec);
  }
}

inline void bilinear_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.tdx) {
    S* scratch = static_cast<S*>(exec.scratch);
    Operands operands;
    operands.add(a.tdy, transposed_weights(*a.desc, a.w, scratch));
    operands.add(a.dy, transposed_weights(*a.desc, a.tw, scratch + a.desc->param_count));
    bilinear_input_adjoint(a, operands, a.tdx, exec);
  }
  if (a.tdw) {
    Operands operands;
    operands.add(a.x, a.tdy);
    operands.add(a.tx, a.dy);
    bilinear_weight_adjoint(a, operands, a.tdy, a.tdw, exec);
  }
}

// Appended parameter: y = (x, w) for every sample.
inline void append_pass(const LayerArgs<S>& a, const S* x, const S* w, S* y) {
  const index_t in = a.desc->in.channels, out = a.desc->out.channels;
  for (index_t n = 0; n < a.samples; ++n, y += out) {
    for_columns(in, [&](auto lanes, index_t i) { lanes.put(y + i, x ? lanes.get(x + i) : V{}); });
    for_columns(out - in,
                [&](auto lanes, index_t i) { lanes.put(y + in + i, w ? lanes.get(w + i) : V{}); });
    if (x) x += in;
  }
}

// out[c] = sum over rows of values[r * row + c], in double and in order: a few columns at a time,
// so that their chains do not wait for each other. What a block reads beyond them is left out.
inline void sum_rows_in_order(const S* values, index_t rows, index_t row, index_t columns, S* out) {
  constexpr index_t kBlock = 8;
  const S* end = values + (rows - 1) * row + columns;
  for (index_t c = 0; c < columns; c += kBlock) {
    const index_t width = min_of(kBlock, columns - c);
    double sums[kBlock] = {};
    const S* p = values + c;
    index_t r = 0;
    for (; r < rows && p + kBlock <= end; ++r, p += row) {
#pragma GCC unroll 8
      for (index_t i = 0; i < kBlock; ++i) sums[i] += double(p[i]);
    }
    for (; r < rows; ++r, p += row) {
      for (index_t i = 0; i < width; ++i) sums[i] += double(p[i]);
    }
    for (index_t i = 0; i < width; ++i) out[c + i] = S(sums[i]);
  }
}

inline void append_adjoint(const LayerArgs<S>& a, const S* dy, S* dx, S* dw) {
  const index_t in = a.desc->in.channels, out = a.desc->out.channels;
  for (index_t n = 0; dx && n < a.samples; ++n) {
    for_columns(in, [&](auto lanes, index_t i) {
      lanes.put(dx + n * in + i, lanes.get(dy + n * out + i));
    });
  }
  if (dw) sum_rows_in_order(dy + in, a.samples, out, out - in, dw);
}

inline void append_forward(const LayerArgs<S>& a, const Exec&) { append_pass(a, a.x, a.w, a.y); }
inline void append_backward(const LayerArgs<S>& a, const Exec&) {
  append_adjoint(a, a.dy, a.dx, a.dw);
}
inline void append_tangent_forward(const LayerArgs<S>& a, const Exec&) {
  append_pass(a, a.tx, a.tw, a.ty);
}
inline void append_tangent_backward(const LayerArgs<S>& a, const Exec&) {
  append_adjoint(a, a.tdy, a.tdx, a.tdw);
}

}  // namespace FM_KERNELS
