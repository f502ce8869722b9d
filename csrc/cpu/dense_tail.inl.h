// The columns of a dense product behind the last whole vector: 4 of 100, or all 6 of a layer with 6
// outputs. Lanes run over what there is plenty of, so that few of them are idle.
//
// Outputs: lanes are kGroup successive k of a few columns. A sample's inputs are read as they lie,
// repeated for each column, and the lanes of a column are added up at the end.
// Weight gradients: lanes are rows of c, which lie side by side in a.

namespace FM_KERNELS {

constexpr int kGroup = kLanes < 4 ? int(kLanes) : 4;
constexpr int kPartColumns = int(kLanes) / kGroup;  // of a vector of outputs
constexpr int kMostParts = (int(kLanes) + kPartColumns - 2) / kPartColumns;

struct DenseTail {
  index_t row, column, columns;
};

#if defined(__AVX512F__)
typedef S Part __attribute__((vector_size(kPartColumns * sizeof(S))));

// The first n elements of a part of a row.
struct PartLanes {
  index_t n;
  FM_INLINE Part get(const S* p) const {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (sizeof(S) == 4) {
      return Part(_mm_maskz_loadu_ps(__mmask8(mask), p));
    } else {
      return Part(_mm_maskz_loadu_pd(__mmask8(mask), p));
    }
  }
  FM_INLINE void put(S* p, Part v) const {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (sizeof(S) == 4) {
      _mm_mask_storeu_ps(p, __mmask8(mask), __m128(v));
    } else {
      _mm_mask_storeu_pd(p, __mmask8(mask), __m128d(v));
    }
  }
};

// Lane [column, k] is lane [k, column] of v, or the other way round if Back.
template <bool Back, int... L>
FM_INLINE V turned(V v, std::integer_sequence<int, L...>) {
  constexpr int kWidth = Back ? kPartColumns : kGroup, kHeight = Back ? kGroup : kPartColumns;
  return __builtin_shufflevector(v, v, (L % kWidth * kHeight + L / kWidth)...);
}
template <bool Back>
FM_INLINE V turn(V v) {
  return turned<Back>(v, std::make_integer_sequence<int, int(kLanes)>{});
}

// Lane [column, k] = p[k], for k < n.
template <bool Whole>
FM_INLINE V repeat_group(const S* p, index_t n) {
  const unsigned mask = (1u << n) - 1u;
  typedef S Group __attribute__((vector_size(kGroup * sizeof(S))));
  Group group;
  if constexpr (Whole) {
    std::memcpy(&group, p, sizeof(group));
  } else if constexpr (sizeof(S) == 4) {
    group = Group(_mm_maskz_loadu_ps(__mmask8(mask), p));
  } else {
    group = Group(_mm256_maskz_loadu_pd(__mmask8(mask), p));
  }
  if constexpr (sizeof(S) == 4) {
    return V(_mm512_broadcast_f32x4(__m128(group)));
  } else {
    return V(_mm512_broadcast_f64x4(__m256d(group)));
  }
}

// Lane [column, k] = b[k * stride + column], for k < n and `columns`.
FM_INLINE V group_columns(const S* b, index_t stride, index_t n, index_t columns) {
  const PartLanes lanes{columns};
  Part rows[kGroup] = {};
#pragma GCC unroll 4
  for (int k = 0; k < kGroup; ++k) {
    if (k < n) rows[k] = lanes.get(b + k * stride);
  }
  if constexpr (sizeof(S) == 4) {
    const __m256 lower = _mm256_set_m128(__m128(rows[1]), __m128(rows[0]));
    const __m256 upper = _mm256_set_m128(__m128(rows[3]), __m128(rows[2]));
    return turn<false>(V(_mm512_insertf32x8(_mm512_castps256_ps512(lower), upper, 1)));
  } else {
    const __m256d lower = _mm256_set_m128d(__m128d(rows[1]), __m128d(rows[0]));
    const __m256d upper = _mm256_set_m128d(__m128d(rows[3]), __m128d(rows[2]));
    return turn<false>(V(_mm512_insertf64x4(_mm512_castpd256_pd512(lower), upper, 1)));
  }
}
#else
template <bool Whole>
FM_INLINE V repeat_group(const S* p, index_t n) {
  V v{};
  for (int l = 0; l < int(kLanes); ++l) {
    if (Whole || l % kGroup < n) v[l] = p[l % kGroup];
  }
  return v;
}

FM_INLINE V group_columns(const S* b, index_t stride, index_t n, index_t columns) {
  V v{};
  for (index_t c = 0; c < columns; ++c) {
    for (index_t k = 0; k < n; ++k) v[c * kGroup + k] = b[k * stride + c];
  }
  return v;
}
#endif

struct LoneLane {
  FM_INLINE S get(const S* p) const { return *p; }
};

// Stores rows of c from i on, `count` of them: lane [column, row] of v.
template <class Finish>
FM_INLINE void put_rows(const DenseProduct& p, V v, index_t i, index_t count, index_t columns,
                        Finish&& finish) {
#if defined(__AVX512F__)
  const PartLanes lanes{columns};
  Part rows[kGroup];
  v = turn<true>(v);
  std::memcpy(rows, &v, sizeof(v));
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r, i += p.columns) {
    if (r < count) lanes.put(p.c + i, finish(lanes, rows[r], i));
  }
#else
  S lanes[kLanes];
  store(lanes, v);
  for (index_t r = 0; r < count; ++r, i += p.columns) {
    for (index_t c = 0; c < columns; ++c) {
      p.c[i + c] = finish(LoneLane{}, lanes[c * kGroup + r], i + c);
    }
  }
#endif
}

// Adds kGroup products to every lane's chain.
template <bool Whole, int M, int C>
FM_INLINE void add_group(V (&acc)[M][C], const SplitRows<M>& a, const V (&b)[C], index_t n) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const V x = repeat_group<Whole>(a.at(m), n);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[m][c] += x * b[c];
  }
}

// M rows by C parts of columns.
template <int M, int C>
void output_tail(const DenseProduct& p, const DenseTail& at) {
  const index_t last = at.columns - (C - 1) * kPartColumns;
  const auto parts = [&](V(&v)[C], const S* b, index_t n) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      v[c] = group_columns(b + c * kPartColumns, p.columns, n, c < C - 1 ? kPartColumns : last);
    }
  };
  V start[C] = {}, acc[M][C];
  if (p.epilogue.start) parts(start, p.epilogue.start + at.column, 1);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[m][c] = start[c];
  }
  for (int pair = 0; pair < p.operands.count; ++pair) {
    SplitRows<M> a(p.operands.pair[pair].src + at.row * p.a_row, p.a_row);
    const S* b = p.operands.pair[pair].other + at.column;
    V columns[C];
    index_t k = 0;
    for (; k + kGroup <= p.depth; k += kGroup, b += kGroup * p.columns) {
      parts(columns, b, kGroup);
      add_group<true>(acc, a, columns, kGroup);
      a.advance(kGroup);
    }
    if (k < p.depth) {
      parts(columns, b, p.depth - k);
      add_group<false>(acc, a, columns, p.depth - k);
    }
  }
  constexpr int kGroups = (M + kGroup - 1) / kGroup;
  V sums[kGroups][C];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      V rows[kLanes];
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
        rows[r] = g * kGroup + r < M ? acc[g * kGroup + r < M ? g * kGroup + r : 0][c] : V{};
      }
      sum_each<kGroup / 2>(rows);
      sums[g][c] = rows[0];
    }
  }
  with_epilogue(p.epilogue, [&](auto&& finish) {
    const index_t offset = at.row * p.columns + at.column;
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        put_rows(p, sums[g][c], offset + g * kGroup * p.columns + c * kPartColumns,
                 min_of(kGroup, M - g * kGroup), c < C - 1 ? kPartColumns : last, finish);
      }
    }
  });
}

using DenseTailFn = void (*)(const DenseProduct&, const DenseTail&);

// Rows of a tile: accumulators, the columns and a row must fit the registers.
constexpr int output_tail_rows(int parts) { return parts <= 2 ? kTileRows : kTileRows * 2 / parts; }

template <int C, int... M>
constexpr TileTable<DenseTailFn> output_tails(std::integer_sequence<int, M...>) {
  return {{(M < output_tail_rows(C) ? output_tail<(M < output_tail_rows(C) ? M + 1 : 1), C>
                                    : nullptr)...}};
}

struct OutputTails {
  TileTable<DenseTailFn> parts[kMostParts];
};

template <int... C>
constexpr OutputTails output_tails_of(std::integer_sequence<int, C...>) {
  return {{output_tails<C + 1>(AllRows{})...}};
}

constexpr OutputTails kOutputTails = output_tails_of(std::make_integer_sequence<int, kMostParts>{});

// Samples are split between threads. Few rows are not worth splitting.
inline void dense_product(const DenseProduct& p, const Exec& exec) {
  const index_t tail = p.columns % kLanes;
  parallel(exec, p.rows, kTileRows, p.depth * p.columns, [&](index_t begin, index_t end) {
    dense_blocks<false>(p, begin, end);
    if (tail == 0) return;
    const int parts = int(tail + kPartColumns - 1) / kPartColumns;
    for_parts(begin, end, output_tail_rows(parts), [&](index_t row, index_t count) {
      kOutputTails.parts[parts - 1].rows[count - 1](p, {row, p.columns - tail, tail});
    });
  });
}

constexpr int kGradientColumns = 6;
constexpr int kGradientVectors = kTileRows / 3;

// C columns of N vectors of rows, the last of them Partial.
template <int C, int N, bool Partial>
void gradient_tail(const DenseProduct& p, const DenseTail& at, index_t rows) {
  const index_t last = rows - (N - 1) * kLanes;
  V acc[C][N] = {};
  for (int pair = 0; pair < p.operands.count; ++pair) {
    const S* a = p.operands.pair[pair].src + at.row;
    const S* b = p.operands.pair[pair].other + at.column;
    for (index_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.columns) {
      V x[N];
      load_row<N, Partial>(x, a, last);
#pragma GCC unroll 6
      for (int c = 0; c < C; ++c) {
        const V value = splat(b[c]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[c][n] += value * x[n];
      }
    }
  }
  S sums[C][N * kLanes];
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums[c] + n * kLanes, acc[c][n]);
  }
  with_epilogue(p.epilogue, [&](auto&& finish) {
    for (index_t r = 0; r < rows; ++r) {
      const index_t i = (at.row + r) * p.columns + at.column;
      for (int c = 0; c < C; ++c) p.c[i + c] = finish(LoneLane{}, sums[c][r], i + c);
    }
  });
}

using GradientTailFn = void (*)(const DenseProduct&, const DenseTail&, index_t);

// [vectors - 1][columns - 1]
struct GradientTails {
  GradientTailFn of[kGradientVectors][kGradientColumns];
};

template <bool Partial, int N, int... C>
constexpr void fill_gradient_tails(GradientTails& t, std::integer_sequence<int, C...>) {
  ((t.of[N - 1][C] = gradient_tail<C + 1, N, Partial>), ...);
}

template <bool Partial, int... N>
constexpr GradientTails gradient_tails(std::integer_sequence<int, N...>) {
  GradientTails t{};
  (fill_gradient_tails<Partial, N + 1>(t, std::make_integer_sequence<int, kGradientColumns>{}),
   ...);
  return t;
}

using AllGradientVectors = std::make_integer_sequence<int, kGradientVectors>;
constexpr GradientTails kGradientTails[2] = {gradient_tails<false>(AllGradientVectors{}),
                                             gradient_tails<true>(AllGradientVectors{})};

inline void gradient_tails_of(const DenseProduct& p, index_t begin, index_t end) {
  const index_t tail = p.columns % kLanes, vectors = (end - begin + kLanes - 1) / kLanes;
  for_parts(p.columns - tail, p.columns, kGradientColumns, [&](index_t column, index_t columns) {
    for_parts(0, vectors, kGradientVectors, [&](index_t first, index_t count) {
      const index_t row = begin + first * kLanes, rows = min_of(count * kLanes, end - row);
      kGradientTails[rows % kLanes != 0].of[count - 1][columns - 1](p, {row, column, columns},
                                                                    rows);
    });
  });
}

// Samples in runs of about so many elements of b, equally long: in the first-level cache they stay
// while all tiles of c pass over them.
constexpr index_t kRunElements = 36 * 1024 / sizeof(S);

inline void dense_gradient(const DenseProduct& whole, const Exec& exec) {
  const index_t runs =
      max_of<index_t>(1, (whole.depth * whole.columns + kRunElements - 1) / kRunElements);
  const index_t run = (whole.depth + runs - 1) / runs;
  parallel(exec, whole.rows, kTileRows, whole.depth * whole.columns,
           [&](index_t begin, index_t end) {
             gradient_tails_of(whole, begin, end);
             DenseProduct p = whole;
             for (index_t first = 0; first < whole.depth; first += run) {
               p.depth = min_of(run, whole.depth - first);
               for (int pair = 0; pair < p.operands.count; ++pair) {
                 const Operand& from = whole.operands.pair[pair];
                 p.operands.pair[pair] = {from.src + first * whole.a_step,
                                          from.other + first * whole.columns};
               }
               if (first > 0) p.epilogue.base = p.c;
               dense_blocks<true>(p, begin, end);
             }
           });
}

}  // namespace FM_KERNELS
