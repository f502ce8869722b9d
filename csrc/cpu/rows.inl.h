// Products of small matrices whose rows are padded to whole (half) vectors, for resident tasks.
//
//   c[m, :] = epilogue(sum over operand pairs and k of a[m, k] b[k, :])
//
// where sums of other pairs, of a depth of their own, may come first and be scaled,
// as in dense.inl.h, but without masks: the padding of b is read and that of c is written, whatever
// it holds. A tile is up to kRowsTile rows by whole rows of c's block: two vectors, or the last
// ones of a row and a half vector. Two half vectors share a register lane by lane, so that one
// broadcast of two neighbours in a multiplies both: those of two rows where rows are adjacent, of
// two steps of k where steps are. So 40 columns take two and a half multiply-adds a row instead of
// three, and no blends, which would take turns with them (bench/workshop/008).
//
// Every element is one chain of fused multiply-adds over k, or in a half vector over two steps two
// chains, one of even and one of odd k, whichever tile it falls to.

namespace FM_KERNELS {

#if defined(__AVX512F__)
constexpr index_t kRowUnit = kLanes / 2;
#else
constexpr index_t kRowUnit = kLanes;
#endif

// Elements from row to row of a padded matrix.
FM_INLINE index_t padded_row(index_t columns) { return align_up(columns, kRowUnit); }

using AllLanes = std::make_integer_sequence<int, int(kLanes)>;
typedef double UnalignedDouble __attribute__((aligned(sizeof(S)), may_alias));

// Pairs whose sums are scaled before others are added.
struct ScaledOperands {
  Operands operands;
  index_t depth = 0, stride = 0;  // stride: from row to row of a, or from step to step
  S scale = S(1);
};

struct RowsProduct {
  index_t rows, columns, depth;  // columns: padded, also the rows of b and c
  Operands operands;             // (a, b)
  index_t a_row, a_step;         // one of them is 1
  S* c;
  Epilogue epilogue;
  ScaledOperands first;
};

// Two half vectors in one: `low` is row 2i, `high` row 2i + 1. Where there are no half vectors,
// nothing of this is called.
#if defined(__AVX512F__)
FM_INLINE V half_twice(const S* p) {
  return V(_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(p))));
}
FM_INLINE V load_half(const S* p) {
  return V(_mm512_zextpd256_pd512(_mm256_loadu_pd(reinterpret_cast<const double*>(p))));
}
FM_INLINE V half_pair(const S* low, const S* high) {
  const __m512d v = _mm512_castpd256_pd512(_mm256_loadu_pd(reinterpret_cast<const double*>(low)));
  return V(_mm512_insertf64x4(v, _mm256_loadu_pd(reinterpret_cast<const double*>(high)), 1));
}
FM_INLINE void put_low(S* p, V v) {
  _mm256_storeu_pd(reinterpret_cast<double*>(p), _mm512_castpd512_pd256(__m512d(v)));
}
FM_INLINE void put_high(S* p, V v) {
  _mm256_storeu_pd(reinterpret_cast<double*>(p), _mm512_extractf64x4_pd(__m512d(v), 1));
}
// p[0] and p[1] in turn.
FM_INLINE V splat_two(const S* p) {
  if constexpr (sizeof(S) == 4) {
    return V(_mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const UnalignedDouble*>(p))));
  } else {
    return V(_mm512_broadcast_f64x2(_mm_loadu_pd(reinterpret_cast<const double*>(p))));
  }
}
// Each lane of the lower half twice, and even lanes into the lower half, odd ones into the upper.
template <int... I>
FM_INLINE V lanes_twice(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I / 2)...);
}
template <int... I>
FM_INLINE V lanes_to_halves(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I * 2 % int(kLanes) + I * 2 / int(kLanes))...);
}
// The lower halves of a and b, lane by lane.
template <int... I>
FM_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * int(kLanes))...);
}
// Sums of two neighbouring lanes, those of `low` in the lower half.
template <int... I>
FM_INLINE V add_neighbours(V low, V high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, (2 * I)...) +
         __builtin_shufflevector(low, high, (2 * I + 1)...);
}
#else
FM_INLINE V half_twice(const S* p) { return load(p); }
FM_INLINE V load_half(const S* p) { return load(p); }
FM_INLINE V half_pair(const S* low, const S*) { return load(low); }
FM_INLINE void put_low(S* p, V v) { store(p, v); }
FM_INLINE void put_high(S* p, V v) { store(p, v); }
FM_INLINE V splat_two(const S* p) { return splat(*p); }
template <int... I>
FM_INLINE V lanes_twice(V v, std::integer_sequence<int, I...>) {
  return v;
}
template <int... I>
FM_INLINE V lanes_to_halves(V v, std::integer_sequence<int, I...>) {
  return v;
}
template <int... I>
FM_INLINE V interleave(V a, V, std::integer_sequence<int, I...>) {
  return a;
}
template <int... I>
FM_INLINE V add_neighbours(V low, V, std::integer_sequence<int, I...>) {
  return low;
}
#endif

// for_columns that takes exactly half a vector without a mask: a masked load waits until stores to
// its whole vector, which for a half vector are two, have reached the cache.
struct HalfLanes {
  FM_INLINE V get(const S* p) const { return load_half(p); }
  FM_INLINE void put(S* p, V v) const { put_low(p, v); }
};

template <class Body>
FM_INLINE void for_row(index_t columns, Body&& body) {
  index_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) body(Lanes<false>{kLanes}, c);
  if (kRowUnit < kLanes && columns - c == kRowUnit) {
    body(HalfLanes{}, c);
  } else if (c < columns) {
    body(Lanes<true>{columns - c}, c);
  }
}

// M rows by N vectors and, with Half, half a one.
template <int M, int N, bool Half>
struct RowsTile {
  static constexpr int kMain = N > 0 ? N : 1, kPairs = Half ? (M + 1) / 2 : 1;
  V main[M][kMain];
  V half[kPairs];

  // what is done with each register: f(register, pointer offset from its row)
  template <class Get, class GetPair, class Put>
  FM_INLINE void apply(index_t row, S* c, Get&& get, GetPair&& get_pair, Put&& put) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const index_t i = m * row + n * kLanes;
        store(c + i, put(main[m][n], get(i)));
      }
    }
    if constexpr (Half) {
#pragma GCC unroll 6
      for (int p = 0; p < kPairs; ++p) {
        const index_t low = 2 * p * row + N * kLanes, high = 2 * p + 1 < M ? low + row : low;
        const V v = put(half[p], get_pair(low, high));
        put_low(c + low, v);
        if (2 * p + 1 < M) put_high(c + high, v);
      }
    }
  }
};

template <int M, int N, bool Half, bool AdjacentRows, bool Scaled>
void rows_tile(const RowsProduct& p, index_t row, index_t column) {
  using Tile = RowsTile<M, N, Half>;
  constexpr bool kTwoSteps = Half && !AdjacentRows;
  Tile t;
  [[maybe_unused]] V tails[kTwoSteps ? M : 1] = {};
  const index_t columns = p.columns;
  const S* start = p.epilogue.start;
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      t.main[m][n] = !Scaled && start ? load(start + column + n * kLanes) : V{};
    }
  }
  if constexpr (Half) {
#pragma GCC unroll 6
    for (int i = 0; i < Tile::kPairs; ++i) {
      t.half[i] = !Scaled && start ? half_twice(start + column + N * kLanes) : V{};
    }
  }
  const auto add = [&](const Operands& operands, index_t depth, index_t a_row,
                       index_t a_step) __attribute__((always_inline)) {
    for (int pair = 0; pair < operands.count; ++pair) {
      const S* a = operands.pair[pair].src + row * a_row;
      const S* b = operands.pair[pair].other + column;
      index_t k = 0;
      if constexpr (kTwoSteps) {
        for (; k + 2 <= depth; k += 2, a += 2, b += 2 * columns) {
          V first[Tile::kMain], second[Tile::kMain];
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) {
            first[n] = load(b + n * kLanes);
            second[n] = load(b + columns + n * kLanes);
          }
          const V tail = interleave(load_half(b + N * kLanes), load_half(b + columns + N * kLanes),
                                    AllLanes{});
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            const S* at = a + m * a_row;
            const V one = splat(at[0]), other = splat(at[1]);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) t.main[m][n] += one * first[n];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) t.main[m][n] += other * second[n];
            tails[m] += splat_two(at) * tail;
          }
        }
      }
      for (; k < depth; ++k, a += a_step, b += columns) {
        V right[Tile::kMain], tail{};
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) right[n] = load(b + n * kLanes);
        if constexpr (kTwoSteps) {
          tail = interleave(load_half(b + N * kLanes), V{}, AllLanes{});
        } else if constexpr (Half) {
          tail = lanes_twice(half_twice(b + N * kLanes), AllLanes{});
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const V value = splat(a[m * a_row]);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) t.main[m][n] += value * right[n];
          if constexpr (kTwoSteps) {
            tails[m] += value * tail;
          } else if constexpr (Half) {
            if (m % 2 == 1) {
              t.half[m / 2] += splat_two(a + m - 1) * tail;
            } else if (m == M - 1) {
              t.half[m / 2] += value * tail;
            }
          }
        }
      }
    }
  };
  if constexpr (Scaled) {
    const index_t stride = p.first.stride;
    add(p.first.operands, p.first.depth, AdjacentRows ? 1 : stride, AdjacentRows ? stride : 1);
    const V scale = splat(p.first.scale);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        t.main[m][n] = scale * t.main[m][n];
        if (start) t.main[m][n] += load(start + column + n * kLanes);
      }
      if constexpr (kTwoSteps) tails[m] = scale * tails[m];
    }
    if constexpr (Half) {
#pragma GCC unroll 6
      for (int i = 0; i < Tile::kPairs; ++i) {
        t.half[i] = scale * t.half[i];
        if (start) t.half[i] += half_twice(start + column + N * kLanes);
      }
    }
  }
  add(p.operands, p.depth, AdjacentRows ? 1 : p.a_row, AdjacentRows ? p.a_step : 1);
  if constexpr (Half) {
#pragma GCC unroll 6
    for (int i = 0; i < Tile::kPairs; ++i) {
      if constexpr (kTwoSteps) {
        const int low = 2 * i, high = low + 1 < M ? low + 1 : low;
        t.half[i] += add_neighbours(tails[low], tails[high], AllLanes{});
      } else {
        t.half[i] = lanes_to_halves(t.half[i], AllLanes{});
      }
    }
  }
  const Epilogue& e = p.epilogue;
  const index_t offset = row * columns + column;
  S* c = p.c + offset;
  const auto nothing = [](index_t) { return V{}; };
  const auto no_pair = [](index_t, index_t) { return V{}; };
  if (e.base) {
    const S* base = e.base + offset;
    const V scale = splat(e.scale);
    t.apply(
        columns, c, [=](index_t i) { return load(base + i); },
        [=](index_t i, index_t j) { return half_pair(base + i, base + j); },
        [=](V v, V from) { return from + scale * v; });
  } else if (e.mask) {
    const S* mask = e.mask + offset;
    t.apply(
        columns, c, [=](index_t i) { return load(mask + i); },
        [=](index_t i, index_t j) { return half_pair(mask + i, mask + j); },
        [](V v, V m) { return VI(m > V{}) ? v : V{}; });
  } else if (e.relu) {
    t.apply(columns, c, nothing, no_pair, [](V v, V) { return VI(v < V{}) ? V{} : v; });
  } else {
    const V scale = splat(e.scale);
    t.apply(columns, c, nothing, no_pair, [=](V v, V) { return scale * v; });
  }
}

using RowsTileFn = void (*)(const RowsProduct&, index_t, index_t);

// Accumulators, a row of b (two, where a tail takes two steps) and two broadcasts must fit the
// registers.
constexpr int rows_most(int vectors, bool half, [[maybe_unused]] bool adjacent_rows) {
#if defined(__AVX512F__)
  if (vectors == 2 && half) return adjacent_rows ? 10 : 8;
  return 12;
#else
  return vectors + half > 1 ? 6 : 8;
#endif
}

constexpr int kRowsTile = 12;

struct RowsTiles {
  RowsTileFn rows[kRowsTile];  // [M - 1]
};

template <int N, bool Half, bool AdjacentRows, bool Scaled, int... M>
constexpr RowsTiles rows_tiles(std::integer_sequence<int, M...>) {
  return {{(M < rows_most(N, Half, AdjacentRows)
                ? rows_tile<(M < rows_most(N, Half, AdjacentRows) ? M + 1 : 1), N, Half,
                            AdjacentRows, Scaled>
                : nullptr)...}};
}

template <int N, bool Half, bool AdjacentRows, bool Scaled>
constexpr RowsTiles rows_tiles_of() {
  if constexpr (N == 0 && !Half) return {};
  if constexpr (Half && kRowUnit == kLanes) return {};
  return rows_tiles<N, Half, AdjacentRows, Scaled>(std::make_integer_sequence<int, kRowsTile>{});
}

// [vectors][half]
template <bool AdjacentRows, bool Scaled>
constexpr RowsTiles kRowsTiles[3][2] = {{rows_tiles_of<0, false, AdjacentRows, Scaled>(),
                                         rows_tiles_of<0, true, AdjacentRows, Scaled>()},
                                        {rows_tiles_of<1, false, AdjacentRows, Scaled>(),
                                         rows_tiles_of<1, true, AdjacentRows, Scaled>()},
                                        {rows_tiles_of<2, false, AdjacentRows, Scaled>(),
                                         rows_tiles_of<2, true, AdjacentRows, Scaled>()}};

template <bool AdjacentRows>
inline void rows_product(const RowsProduct& p) {
  const bool scaled = p.first.operands.count > 0;
  for (index_t column = 0; column < p.columns;) {
    const index_t vectors = min_of<index_t>(2, (p.columns - column) / kLanes);
    const index_t end = column + vectors * kLanes;
    const bool half = end < p.columns && p.columns - end < kLanes;
    const RowsTiles& table = scaled ? kRowsTiles<AdjacentRows, true>[vectors][half]
                                    : kRowsTiles<AdjacentRows, false>[vectors][half];
    const RowsTileFn* tiles = table.rows;
    const index_t most = rows_most(int(vectors), half, AdjacentRows);
    const index_t count = (p.rows + most - 1) / most;
    for (index_t t = 0, from = 0; t < count; ++t) {  // of nearly equal size
      const index_t to = p.rows * (t + 1) / count;
      tiles[to - from - 1](p, from, column);
      from = to;
    }
    column = half ? p.columns : end;
  }
}

}  // namespace FM_KERNELS
