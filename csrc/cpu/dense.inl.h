// Products of small dense matrices, for Linear layers.
//
//   c[m, :] = epilogue(sum over operand pairs and k of a[m, k] b[k, :])
//
// Outputs and their adjoints take a = x (or dy), b = w (or its transpose), a row m being a sample;
// weight gradients take a = x transposed, b = dy, a row m being an input and k the sample. A tile
// is up to 12 rows by two vectors and what is left of a row of c behind the last whole vector:
// nothing, up to a quarter of a vector (the quarters of four rows share a register, so that 100
// columns take 6.25 multiply-adds a row and not 7), up to half a vector (in registers half as wide,
// which cost half as much on processors that run a wide operation in two halves), or more.
//
// Every element is one chain of fused multiply-adds over k, whichever tile or thread it falls to.

namespace FM_KERNELS {

// What is left of a row behind its last whole vector.
enum Tail : int { no_tail, quarter_tail, half_tail, wide_tail, tail_kinds };

#if defined(__AVX512F__)
constexpr bool kNarrowTails = true;
typedef S H __attribute__((vector_size(FM_VECTOR_BYTES / 2)));
typedef Int HI __attribute__((vector_size(FM_VECTOR_BYTES / 2)));
typedef S Q __attribute__((vector_size(FM_VECTOR_BYTES / 4)));
typedef Int QI __attribute__((vector_size(FM_VECTOR_BYTES / 4)));
#else
constexpr bool kNarrowTails = false;
#endif

// Of one row: get, put and the part that multiplies; of `kRows` rows that share a register: `row`
// spreads what every one of them is multiplied with, `merge` puts a row's factor in its place.
template <int T>
struct TailLanes {
  using Vector = V;
  using Shared = V;
  using Mask = VI;
  static constexpr int kRows = 1;
  index_t n;
  FM_INLINE Vector get(const S* p) const { return load_first(p, n); }
  FM_INLINE void put(S* p, Vector v) const { store_first(p, v, n); }
  FM_INLINE Shared row(const S* p) const { return get(p); }
  static FM_INLINE Shared merge(Shared, V v, int) { return v; }
  static FM_INLINE Vector part(Shared v, int) { return v; }
};

#if defined(__AVX512F__)
template <>
struct TailLanes<quarter_tail> {
  using Vector = Q;
  using Shared = V;
  using Mask = QI;
  static constexpr int kRows = 4;
  index_t n;
  FM_INLINE Q get(const S* p) const {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (sizeof(S) == 4) {
      return Q(_mm_maskz_loadu_ps(__mmask8(mask), p));
    } else {
      return Q(_mm_maskz_loadu_pd(__mmask8(mask), p));
    }
  }
  FM_INLINE void put(S* p, Q v) const {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (sizeof(S) == 4) {
      _mm_mask_storeu_ps(p, __mmask8(mask), __m128(v));
    } else {
      _mm_mask_storeu_pd(p, __mmask8(mask), __m128d(v));
    }
  }
  FM_INLINE V row(const S* p) const {
    if constexpr (sizeof(S) == 4) {
      return V(_mm512_broadcast_f32x4(__m128(get(p))));
    } else {
      return V(_mm512_broadcast_f64x2(__m128d(get(p))));
    }
  }
  static FM_INLINE V merge(V before, V v, int place) {
    const unsigned mask = ((1u << kLanes / 4) - 1u) << (place * int(kLanes) / 4);
    if (place == 0) return v;
    if constexpr (sizeof(S) == 4) {
      return V(_mm512_mask_blend_ps(__mmask16(mask), __m512(before), __m512(v)));
    } else {
      return V(_mm512_mask_blend_pd(__mmask8(mask), __m512d(before), __m512d(v)));
    }
  }
  static FM_INLINE Q part(V v, int place) {
    Q quarters[4];
    std::memcpy(quarters, &v, sizeof(v));
    return quarters[place];
  }
};

template <>
struct TailLanes<half_tail> {
  using Vector = H;
  using Shared = H;
  using Mask = HI;
  static constexpr int kRows = 1;
  index_t n;
  FM_INLINE H get(const S* p) const {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (sizeof(S) == 4) {
      return H(_mm256_maskz_loadu_ps(__mmask8(mask), p));
    } else {
      return H(_mm256_maskz_loadu_pd(__mmask8(mask), p));
    }
  }
  FM_INLINE void put(S* p, H v) const {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (sizeof(S) == 4) {
      _mm256_mask_storeu_ps(p, __mmask8(mask), __m256(v));
    } else {
      _mm256_mask_storeu_pd(p, __mmask8(mask), __m256d(v));
    }
  }
  FM_INLINE H row(const S* p) const { return get(p); }
  static FM_INLINE H merge(H, V v, int) {
    if constexpr (sizeof(S) == 4) {
      return H(_mm512_castps512_ps256(__m512(v)));
    } else {
      return H(_mm512_castpd512_pd256(__m512d(v)));
    }
  }
  static FM_INLINE H part(H v, int) { return v; }
};
#endif

// What becomes of a finished element.
struct Epilogue {
  const S* start = nullptr;  // [columns] a bias, where the sums start
  bool relu = false;         // negative outputs become zero
  const S* mask = nullptr;   // as c: zero where this is not positive
  const S* base = nullptr;   // as c: c = base + scale * sum, which may be c itself
  S scale = S(1);
};

struct DenseProduct {
  index_t rows, columns, depth;
  Operands operands;  // (a, b)
  index_t a_row, a_step;
  S* c;  // [rows, columns], dense like b
  Epilogue epilogue;
};

struct DenseTile {
  index_t row, column, tail;
};

template <class Vector, class Mask>
FM_INLINE Vector finish(const Epilogue& e, Vector v, Vector mask, Vector base) {
  if (e.relu) v = Mask(v < Vector{}) ? Vector{} : v;
  if (e.mask) v = Mask(mask > Vector{}) ? v : Vector{};
  if (e.base) return base + e.scale * v;
  return e.scale == S(1) ? v : e.scale * v;
}

// Rows are a step apart (a sample's inputs) or adjacent (inputs of a weight gradient).
template <int M, int N, int T, bool AdjacentRows>
void dense_tile(const DenseProduct& p, const DenseTile& at) {
  using Rest = TailLanes<T>;
  const Rest rest{at.tail};
  constexpr int kMain = N > 0 ? N : 1, kTails = (M + Rest::kRows - 1) / Rest::kRows;
  const index_t columns = p.columns, tail_at = N * kLanes;
  V acc[M][kMain];
  typename Rest::Shared last[kTails];
  const S* start = p.epilogue.start ? p.epilogue.start + at.column : nullptr;
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = start ? load(start + n * kLanes) : V{};
  }
  if constexpr (T != no_tail) {
#pragma GCC unroll 12
    for (auto& v : last) v = start ? rest.row(start + tail_at) : typename Rest::Shared{};
  }
  for (int pair = 0; pair < p.operands.count; ++pair) {
    const index_t a_row = AdjacentRows ? 1 : p.a_row;
    const index_t a_step = AdjacentRows ? p.a_step : 1;
    const S* a = p.operands.pair[pair].src + at.row * a_row;
    const S* b = p.operands.pair[pair].other + at.column;
    for (index_t k = 0; k < p.depth; ++k, a += a_step, b += columns) {
      V row[kMain];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
      typename Rest::Shared row_tail{}, factor{};
      if constexpr (T != no_tail) row_tail = rest.row(b + tail_at);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const V value = splat(a[m * a_row]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
        if constexpr (T != no_tail) {
          factor = Rest::merge(factor, value, m % Rest::kRows);
          if (m % Rest::kRows == Rest::kRows - 1 || m == M - 1) {
            last[m / Rest::kRows] += factor * row_tail;
          }
        }
      }
    }
  }
  const Epilogue& e = p.epilogue;
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const index_t offset = (at.row + m) * columns + at.column;
    const S* mask = e.mask ? e.mask + offset : nullptr;
    const S* base = e.base ? e.base + offset : nullptr;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const index_t i = n * kLanes;
      store(p.c + offset + i,
            finish<V, VI>(e, acc[m][n], mask ? load(mask + i) : V{}, base ? load(base + i) : V{}));
    }
    if constexpr (T != no_tail) {
      using Vector = typename Rest::Vector;
      const Vector v = Rest::part(last[m / Rest::kRows], m % Rest::kRows);
      rest.put(p.c + offset + tail_at,
               finish<Vector, typename Rest::Mask>(e, v, mask ? rest.get(mask + tail_at) : Vector{},
                                                   base ? rest.get(base + tail_at) : Vector{}));
    }
  }
}

using DenseTileFn = void (*)(const DenseProduct&, const DenseTile&);

// Rows of a tile: accumulators, one row of b and one broadcast must fit the registers.
constexpr int dense_rows(int vectors, int tail) {
  return vectors == 2 && tail != no_tail ? kTileRows * 2 / 3 : kTileRows;
}

constexpr int built_tail(int tail) {
  return kNarrowTails || tail == no_tail ? tail : int(wide_tail);
}

template <int N, int T, bool AdjacentRows, int... M>
constexpr TileTable<DenseTileFn> dense_tiles(std::integer_sequence<int, M...>) {
  return {{(M < dense_rows(N, T) ? dense_tile<M + 1, N, T, AdjacentRows> : nullptr)...}};
}

template <int N, int T, bool AdjacentRows>
constexpr TileTable<DenseTileFn> dense_tiles_of() {
  if constexpr (N == 0 && T == no_tail) return {};
  return dense_tiles<N, built_tail(T), AdjacentRows>(AllRows{});
}

struct DenseTiles {
  TileTable<DenseTileFn> tails[tail_kinds];
};

template <int N, bool AdjacentRows, int... T>
constexpr DenseTiles dense_tiles_of(std::integer_sequence<int, T...>) {
  return {{dense_tiles_of<N, T, AdjacentRows>()...}};
}

using AllTails = std::make_integer_sequence<int, tail_kinds>;

// [vectors]
template <bool AdjacentRows>
constexpr DenseTiles kDenseTiles[3] = {dense_tiles_of<0, AdjacentRows>(AllTails{}),
                                       dense_tiles_of<1, AdjacentRows>(AllTails{}),
                                       dense_tiles_of<2, AdjacentRows>(AllTails{})};

// The columns of c in blocks of two vectors, the last with the tail.
struct DenseBlocks {
  index_t whole, tail, count;
  explicit DenseBlocks(index_t columns)
      : whole(columns / kLanes),
        tail(columns % kLanes),
        count(max_of<index_t>(1, (whole + 1) / 2)) {}
  index_t vectors(index_t block) const { return min_of<index_t>(2, whole - 2 * block); }
  int tail_kind(index_t block) const {
    if (tail == 0 || block + 1 < count) return no_tail;
    if (!kNarrowTails || tail > kLanes / 2) return wide_tail;
    return tail > kLanes / 4 ? half_tail : quarter_tail;
  }
};

template <bool AdjacentRows>
FM_INLINE void dense_block(const DenseProduct& p, const DenseBlocks& blocks, index_t block,
                           index_t begin, index_t end) {
  const index_t vectors = blocks.vectors(block);
  const int tail = blocks.tail_kind(block);
  const auto& tiles = kDenseTiles<AdjacentRows>[vectors].tails[tail].rows;
  const index_t most = dense_rows(int(vectors), tail);
  // tiles of equal size rather than a small one at the end
  const index_t count = (end - begin + most - 1) / most;
  for (index_t t = 0; t < count; ++t) {
    const index_t from = begin + (end - begin) * t / count;
    const index_t to = begin + (end - begin) * (t + 1) / count;
    tiles[to - from - 1](p, {from, block * kTileColumns, blocks.tail});
  }
}

// Samples are split between threads: a block of b stays in the first-level cache while all rows of
// a pass it. Few rows are not worth splitting.
inline void dense_product(const DenseProduct& p, const Exec& exec) {
  const DenseBlocks blocks(p.columns);
  parallel(exec, p.rows, kTileRows, p.depth * p.columns, [&](index_t begin, index_t end) {
    for (index_t b = 0; b < blocks.count; ++b) dense_block<false>(p, blocks, b, begin, end);
  });
}

// Samples in runs of about so many elements of b, equally long: in the first-level cache they stay
// while all tiles of c pass over them.
constexpr index_t kRunElements = 36 * 1024 / sizeof(S);

inline void dense_gradient(const DenseProduct& whole, const Exec& exec) {
  const DenseBlocks blocks(whole.columns);
  const index_t runs =
      max_of<index_t>(1, (whole.depth * whole.columns + kRunElements - 1) / kRunElements);
  const index_t run = (whole.depth + runs - 1) / runs;
  parallel(exec, whole.rows, kTileRows, whole.depth * whole.columns,
           [&](index_t begin, index_t end) {
             DenseProduct p = whole;
             for (index_t first = 0; first < whole.depth; first += run) {
               p.depth = min_of(run, whole.depth - first);
               for (int pair = 0; pair < p.operands.count; ++pair) {
                 const Operand& from = whole.operands.pair[pair];
                 p.operands.pair[pair] = {from.src + first * whole.a_step,
                                          from.other + first * whole.columns};
               }
               if (first > 0) p.epilogue.base = p.c;
               for (index_t b = 0; b < blocks.count; ++b)
                 dense_block<true>(p, blocks, b, begin, end);
             }
           });
}

}  // namespace FM_KERNELS
