// Linear and Conv2d: y = w * x + b, linear in w and in x.
//
//   backward           dx = w' dy            dw = dy x'             db = sum dy
//   tangent_forward    ty = tw * x + w * tx + tb
//   tangent_backward   tdx = w' tdy + tw' dy tdw = tdy x' + dy tx'  tdb = sum tdy
//
// x [N, in], y [N, out] channels last; w [kernel pixels * in channels, out channels]. A tangent is
// the same product with two operand pairs. dx reads the weights transposed within each kernel
// pixel; the transposes live in scratch.

namespace FM_KERNELS {

// One step of a transpose in registers: swaps the off-diagonal quarters of every block of 2 Step
// rows and columns. After steps L/2, ..., 2, 1 the vectors hold the transpose.
template <int Step, int... I>
FM_INLINE void swap_quarters(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int L = int(kLanes);
  const V upper = __builtin_shufflevector(a, b, (I & Step ? L + I - Step : I)...);
  b = __builtin_shufflevector(a, b, (I & Step ? L + I : I + Step)...);
  a = upper;
}

template <int Step>
FM_INLINE void transpose_steps(V (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < int(kLanes); ++i) {
    if (!(i & Step)) {
      swap_quarters<Step>(v[i], v[i + Step], std::make_integer_sequence<int, int(kLanes)>{});
    }
  }
  if constexpr (Step > 1) transpose_steps<Step / 2>(v);
}

// A block of up to kLanes x kLanes; both sides have rows of the given strides.
template <bool Partial>
FM_INLINE void transpose_block(const S* src, index_t src_stride, index_t rows, index_t columns,
                               S* dst, index_t dst_stride) {
  V v[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < int(kLanes); ++r) {
    v[r] = !Partial           ? load(src + r * src_stride)
           : r >= rows        ? V{}
           : columns < kLanes ? load_first(src + r * src_stride, columns)
                              : load(src + r * src_stride);
  }
  transpose_steps<int(kLanes) / 2>(v);
#pragma GCC unroll 16
  for (int c = 0; c < int(kLanes); ++c) {
    if (!Partial) {
      store(dst + c * dst_stride, v[c]);
    } else if (c < columns) {
      if (rows < kLanes) {
        store_first(dst + c * dst_stride, v[c], rows);
      } else {
        store(dst + c * dst_stride, v[c]);
      }
    }
  }
}

// dst[c, r] = src[r, c]
inline void transpose(const S* FM_RESTRICT src, index_t rows, index_t columns, S* FM_RESTRICT dst) {
  if (rows == 1 || columns == 1) {
    std::memcpy(dst, src, rows * columns * sizeof(S));
    return;
  }
  for (index_t r = 0; r < rows; r += kLanes) {
    for (index_t c = 0; c < columns; c += kLanes) {
      const index_t height = min_of(kLanes, rows - r), width = min_of(kLanes, columns - c);
      const S* from = src + r * columns + c;
      S* to = dst + c * rows + r;
      if (height == kLanes && width == kLanes) {
        transpose_block<false>(from, columns, height, width, to, rows);
      } else {
        transpose_block<true>(from, columns, height, width, to, rows);
      }
    }
  }
}

inline const S* transposed_weights(const LayerDesc& d, const S* w, S* dst) {
  if (!w) return nullptr;
  const index_t in = d.in.channels, out = d.out.channels;
  const index_t pixels = d.window.kernel[0] * d.window.kernel[1];
  for (index_t p = 0; p < pixels; ++p) transpose(w + p * in * out, in, out, dst + p * in * out);
  return dst;
}

// out[c] = sum over rows of values[r, c]: blocks of rows first, so that long sums stay accurate
inline void sum_rows(const S* values, index_t rows, index_t columns, S* out) {
  constexpr index_t kBlock = 256;
  for_columns(columns, [&](auto lanes, index_t c) {
    V total{};
    for (index_t r0 = 0; r0 < rows; r0 += kBlock) {
      V sum{};
      const index_t r1 = min_of(rows, r0 + kBlock);
      for (index_t r = r0; r < r1; ++r) sum += lanes.get(values + r * columns + c);
      total += sum;
    }
    lanes.put(out + c, total);
  });
}

// A Linear layer with one output has no row of outputs to vectorise over: its products run over the
// inputs instead.
inline bool has_single_output(const LayerDesc& d) {
  return d.out.channels == 1 && d.in.pixels() == 1 && d.out.pixels() == 1;
}

// Lanes are added pairwise, in an order of their own that never depends on the data.
FM_INLINE S sum_lanes(V v) {
  S lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (index_t half = kLanes / 2; half >= 1; half /= 2) {
    for (index_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

inline void single_output_forward(const LayerArgs<S>& a, const Operands& operands, const S* bias,
                                  S* y) {
  const index_t in = a.desc->in.channels;
  for (index_t n = 0; n < a.samples; ++n) {
    V sum{};
    for (int pair = 0; pair < operands.count; ++pair) {
      const S *x = operands.pair[pair].src + n * in, *w = operands.pair[pair].other;
      for_columns(in, [&](auto lanes, index_t i) { sum += lanes.get(x + i) * lanes.get(w + i); });
    }
    y[n] = sum_lanes(sum) + (bias ? *bias : S(0));
  }
}

inline void single_output_gradient(const LayerArgs<S>& a, const Operands& operands, S* dw) {
  const index_t in = a.desc->in.channels;
  for_columns(in, [&](auto lanes, index_t i) {
    V sum{};
    for (int pair = 0; pair < operands.count; ++pair) {
      const S *x = operands.pair[pair].src + i, *dy = operands.pair[pair].other;
      for (index_t n = 0; n < a.samples; ++n) sum += lanes.get(x + n * in) * splat(dy[n]);
    }
    lanes.put(dw + i, sum);
  });
}

inline const S* bias_of(const LayerDesc& d, const S* w) {
  return d.has_bias && w ? w + d.bias_offset : nullptr;
}

inline void bilinear_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  GatherProduct p{&d.geometry->forward, {}, a.samples, d.out.channels, bias_of(d, a.w), a.y};
  p.operands.add(a.x, a.w);
  if (has_single_output(d)) return single_output_forward(a, p.operands, p.bias, a.y);
  gather_product(p, exec);
}

inline void bilinear_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  GatherProduct p{&d.geometry->forward, {}, a.samples, d.out.channels, bias_of(d, a.tw), a.ty};
  p.operands.add(a.x, a.tw);
  p.operands.add(a.tx, a.w);
  if (has_single_output(d)) return single_output_forward(a, p.operands, p.bias, a.ty);
  gather_product(p, exec);
}

// dx and dw of the operand pairs given; shared by backward and tangent_backward
inline void bilinear_adjoints(const LayerArgs<S>& a, const Operands& for_dx, S* dx,
                              const Operands& for_dw, const S* bias_source, S* dw,
                              const Exec& exec) {
  const LayerDesc& d = *a.desc;
  if (dx) {
    gather_product({&d.geometry->backward, for_dx, a.samples, d.in.channels, nullptr, dx}, exec);
  }
  if (!dw) return;
  if (d.has_bias) {
    sum_rows(bias_source, a.samples * d.out.pixels(), d.out.channels, dw + d.bias_offset);
  }
  if (has_single_output(d)) return single_output_gradient(a, for_dw, dw);
  const index_t inputs = d.window.kernel[0] * d.window.kernel[1] * d.in.channels;
  weight_gradient({&d.geometry->forward, for_dw, a.samples, inputs, d.out.channels, dw},
                  d.in.channels, exec);
}

inline void bilinear_backward(const LayerArgs<S>& a, const Exec& exec) {
  Operands for_dx, for_dw;
  if (a.dx) for_dx.add(a.dy, transposed_weights(*a.desc, a.w, static_cast<S*>(exec.scratch)));
  for_dw.add(a.x, a.dy);
  bilinear_adjoints(a, for_dx, a.dx, for_dw, a.dy, a.dw, exec);
}

inline void bilinear_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  Operands for_dx, for_dw;
  if (a.tdx) {
    S* scratch = static_cast<S*>(exec.scratch);
    for_dx.add(a.tdy, transposed_weights(*a.desc, a.w, scratch));
    for_dx.add(a.dy, transposed_weights(*a.desc, a.tw, scratch + a.desc->param_count));
  }
  for_dw.add(a.x, a.tdy);
  for_dw.add(a.tx, a.dy);
  bilinear_adjoints(a, for_dx, a.tdx, for_dw, a.tdy, a.tdw, exec);
}

// Appended parameter: y = (x, w) for every sample.
inline void append_pass(const LayerArgs<S>& a, const S* x, const S* w, S* y) {
  const index_t in = a.desc->in.channels, out = a.desc->out.channels;
  for (index_t n = 0; n < a.samples; ++n) {
    for (index_t i = 0; i < in; ++i) y[n * out + i] = x ? x[n * in + i] : S(0);
    for (index_t i = in; i < out; ++i) y[n * out + i] = w ? w[i - in] : S(0);
  }
}

inline void append_adjoint(const LayerArgs<S>& a, const S* dy, S* dx, S* dw) {
  const index_t in = a.desc->in.channels, out = a.desc->out.channels;
  for (index_t n = 0; dx && n < a.samples; ++n) {
    for (index_t i = 0; i < in; ++i) dx[n * in + i] = dy[n * out + i];
  }
  for (index_t i = in; dw && i < out; ++i) {
    double sum = 0;
    for (index_t n = 0; n < a.samples; ++n) sum += double(dy[n * out + i]);
    dw[i - in] = S(sum);
  }
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
