// Linear layers whose weights are factored: W = W_0 + rate A' B, never formed.
//
//   forward            y   = x W + b
//   backward           dx  = dy W'                             db  = sum dy
//   tangent_forward    ty  = tx W + x tW + tb
//   tangent_backward   tdx = tdy W' + dy tW'                   tdb = sum tdy
//
//   x W = x W_0 + rate (x A') B                  dy W' = dy W_0' + rate (dy B') A
//
// x A' is the Gram matrix of two lists of rows, [N, R]; it lives in scratch. The adjoint is the
// same product with A and B, and W_0 and its transpose, in each other's place. The driver keeps the
// factors of dw, which are x, dy and their tangents; w, tw, dw and tdw are the bias.

namespace FM_KERNELS {

// Of M rows x and R rows a: out[m, r] = scale * sum over i of x[m, i] a[r, i].
struct GramTile {
  const S *x, *a;
  index_t n, out_row;
  S scale;
  S* out;
};

constexpr int kGramRows = kLanes > 1 ? 2 : 1;
constexpr int kGramColumns = int(kLanes) / kGramRows;

template <int M, int R>
void gram_tile(const GramTile& t) {
  V sum[kLanes] = {};
  for_columns(t.n, [&](auto lanes, index_t i) {
    V a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = lanes.get(t.a + r * t.n + i);
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
      const V x = lanes.get(t.x + m * t.n + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[m * kGramColumns + r] += x * a[r];
    }
  });
  sum_each<int(kLanes) / 2>(sum);
  S values[kLanes];
  store(values, sum[0]);
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) t.out[m * t.out_row + r] = t.scale * values[m * kGramColumns + r];
  }
}

using GramTileFn = void (*)(const GramTile&);

struct GramTiles {
  GramTileFn columns[kGramColumns];
};

template <int M, int... R>
constexpr GramTiles gram_tiles(std::integer_sequence<int, R...>) {
  return {{gram_tile<M, R + 1>...}};
}

using AllGramColumns = std::make_integer_sequence<int, kGramColumns>;
constexpr GramTiles kGramTiles[kGramRows] = {gram_tiles<1>(AllGramColumns{}),
                                             gram_tiles<kGramRows>(AllGramColumns{})};

// out [rows, factors] = scale * x a'
inline void gram(index_t rows, index_t factors, index_t n, const S* x, const S* a, S scale,
                 S* out) {
  for (index_t r = 0; r < factors; r += kGramColumns) {
    const index_t columns = min_of<index_t>(kGramColumns, factors - r);
    for (index_t m = 0; m < rows; m += kGramRows) {
      const index_t height = min_of<index_t>(kGramRows, rows - m);
      kGramTiles[height - 1].columns[columns - 1](
          {x + m * n, a + r * n, n, factors, scale, out + m * factors + r});
    }
  }
}

FM_INLINE Factors<S> transposed(const Factors<S>& w) {
  return {w.transposed, w.weights, w.b, w.a, w.b_stride, w.a_stride, w.rows, w.rate};
}

// y = start + x W, [rows, columns] of x [rows, depth]. Starts where y is, or from a row.
struct FactoredProduct {
  index_t rows, columns, depth;
  S* y;

  void begin(const S* start) const {
    for (index_t n = 0; n < rows; ++n) {
      for_columns(columns, [&](auto lanes, index_t c) {
        lanes.put(y + n * columns + c, start ? lanes.get(start + c) : V{});
      });
    }
  }

  void add(const S* x, const Factors<S>& w, const Exec& exec) const {
    if (w.weights) {
      DenseProduct p{rows, columns, depth, {}, depth, 1, y, {}};
      p.operands.add(x, w.weights);
      p.epilogue.base = y;
      dense_product(p, exec);
    }
    if (w.rows == 0) return;
    S* products = static_cast<S*>(exec.scratch);
    gram(rows, w.rows, depth, x, w.a, w.rate ? *w.rate : S(1), products);
    DenseProduct p{rows, columns, w.rows, {}, w.rows, 1, y, {}};
    p.operands.add(products, w.b);
    p.epilogue.base = y;
    dense_product(p, exec);
  }

  void relu() const {
    for_columns(rows * columns, [&](auto lanes, index_t i) {
      const V v = lanes.get(y + i);
      lanes.put(y + i, select(VI(v < V{}), V{}, v));
    });
  }

  // Zero where `by` is not positive.
  void mask(const S* by) const {
    for_columns(rows * columns, [&](auto lanes, index_t i) {
      lanes.put(y + i, select(VI(lanes.get(by + i) > V{}), lanes.get(y + i), V{}));
    });
  }
};

inline FactoredProduct factored_outputs(const LayerArgs<S>& a, S* y) {
  return {a.samples, a.desc->out.channels, a.desc->in.channels, y};
}

inline FactoredProduct factored_inputs(const LayerArgs<S>& a, S* dx) {
  return {a.samples, a.desc->in.channels, a.desc->out.channels, dx};
}

inline const S* factored_bias(const LayerDesc& d, const S* w) { return d.has_bias ? w : nullptr; }

inline void factored_bias_adjoint(const LayerArgs<S>& a, const S* dy, S* db) {
  if (!db || !a.desc->has_bias) return;
  sum_rows(dy, a.samples, a.desc->out.channels, a.dw_base, scale_of(a.bias_scale, a.bias_rate), db);
}

inline void factored_forward(const LayerArgs<S>& a, const Exec& exec) {
  const FactoredProduct p = factored_outputs(a, a.y);
  p.begin(factored_bias(*a.desc, a.w));
  p.add(a.x, *a.w_factors, exec);
  if (a.desc->relu) p.relu();
}

inline void factored_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.dx) {
    const FactoredProduct p = factored_inputs(a, a.dx);
    p.begin(nullptr);
    p.add(a.dy, transposed(*a.w_factors), exec);
    if (a.desc->relu_input) p.mask(a.x);
  }
  factored_bias_adjoint(a, a.dy, a.dw);
}

inline void factored_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  const FactoredProduct p = factored_outputs(a, a.ty);
  p.begin(a.tw ? factored_bias(*a.desc, a.tw) : nullptr);
  if (a.tx) p.add(a.tx, *a.w_factors, exec);
  if (a.tw_factors) p.add(a.x, *a.tw_factors, exec);
  if (a.desc->relu) p.mask(a.y);
}

inline void factored_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  if (a.tdx) {
    const FactoredProduct p = factored_inputs(a, a.tdx);
    p.begin(nullptr);
    p.add(a.tdy, transposed(*a.w_factors), exec);
    if (a.tw_factors) p.add(a.dy, transposed(*a.tw_factors), exec);
    if (a.desc->relu_input) p.mask(a.x);
  }
  factored_bias_adjoint(a, a.tdy, a.tdw);
}

inline void transpose_matrix(index_t rows, index_t columns, const S* src, S* dst, const Exec&) {
  transpose(src, rows, columns, dst, rows);
}

// The products of one chunk of factor rows, into rows [begin, end) of the sum.
inline void add_chunk(const FactorSum<S>& s, GradientTile tile, index_t begin, index_t end) {
  const Operands operands{{{s.a.data, s.b.data}}, 1};
  const index_t blocks = (s.out + kTileColumns - 1) / kTileColumns;
  for (index_t i = begin; i < end; i += kTileRows) {
    const index_t count = min_of<index_t>(kTileRows, end - i);
    tile.input = i;
    for (index_t b = 0; b < blocks; ++b) {
      const ColumnBlock block = column_block(s.out, b);
      tile.column = block.column;
      tile.tail = block.tail;
      kGradientTiles[block.vectors - 1][block.partial].rows[count - 1](
          operands, tile, s.sum + i * s.out + block.column);
    }
  }
}

// One chain of multiply-adds for every element, over all tasks' rows in order, whichever chunks,
// waves or threads they come in.
inline void add_products(const FactorSum<S>& s, index_t begin, index_t end, const Exec&) {
  index_t src[kMaxChunk], dst[kMaxChunk];
  const index_t total = s.tasks * s.rows, step = chunk_rows(end - begin, s.out);
  bool fresh = s.begins;
  for (index_t first = 0; first < total; first += step) {
    const index_t rows = min_of(step, total - first);
    for (index_t i = 0; i < rows; ++i) {
      const index_t task = (first + i) / s.rows, row = first + i - task * s.rows;
      src[i] = task * s.a.stride + row * s.in;
      dst[i] = task * s.b.stride + row * s.out;
    }
    add_chunk(s, {src, dst, rows, 0, 0, 0, s.out, fresh}, begin, end);
    fresh = false;
  }
  S* sum = s.sum + begin * s.out;
  for (index_t i = 0; i < (end - begin) * s.out; ++i) sum[i] = fresh ? S(0) : s.scale * sum[i];
}

}  // namespace FM_KERNELS
