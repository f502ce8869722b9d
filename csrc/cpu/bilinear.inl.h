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

// dst[c, r] = src[r, c], square blocks so that both sides stay in the first-level cache
inline void transpose(const S* FM_RESTRICT src, index_t rows, index_t columns, S* FM_RESTRICT dst) {
  constexpr index_t kBlock = 16;
  for (index_t r0 = 0; r0 < rows; r0 += kBlock) {
    const index_t r1 = min_of(rows, r0 + kBlock);
    for (index_t c0 = 0; c0 < columns; c0 += kBlock) {
      const index_t c1 = min_of(columns, c0 + kBlock);
      for (index_t c = c0; c < c1; ++c) {
        for (index_t r = r0; r < r1; ++r) dst[c * rows + r] = src[r * columns + c];
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

inline const S* bias_of(const LayerDesc& d, const S* w) {
  return d.has_bias && w ? w + d.bias_offset : nullptr;
}

inline void bilinear_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  GatherProduct p{&d.geometry->forward, {}, a.samples, d.out.channels, bias_of(d, a.w), a.y};
  p.operands.add(a.x, a.w);
  gather_product(p, exec);
}

inline void bilinear_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  GatherProduct p{&d.geometry->forward, {}, a.samples, d.out.channels, bias_of(d, a.tw), a.ty};
  p.operands.add(a.x, a.tw);
  p.operands.add(a.tx, a.w);
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
  const index_t inputs = d.window.kernel[0] * d.window.kernel[1] * d.in.channels;
  weight_gradient({&d.geometry->forward, for_dw, a.samples, inputs, d.out.channels, dw},
                  d.in.channels, exec);
  if (d.has_bias) {
    sum_rows(bias_source, a.samples * d.out.pixels(), d.out.channels, dw + d.bias_offset);
  }
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
