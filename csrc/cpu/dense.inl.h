// Products of small dense matrices, for Linear layers.
//
//   c[m, :] = epilogue(sum over operand pairs and k of a[m, k] b[k, :])
//
// Outputs and their adjoints take a = x (or dy), b = w (or its transpose), a row m being a sample;
// weight gradients take a = x transposed, b = dy, a row m being an input and k the sample. A tile
// is up to 12 rows by two whole vectors of c. The columns behind the last whole vector, the tail,
// are vectorised the other way, dense_tail.inl.h: masked vectors would cost as much as whole ones.
//
// Every element is one chain of fused multiply-adds over k (in the tail of outputs, kGroup chains
// added up), whichever tile or thread it falls to.

namespace FM_KERNELS {

// What becomes of a finished element: at most one of relu, mask, and base and scale.
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
  index_t row, column;
};

// Calls body(finish), where finish(lanes, v, i) is what is stored for the sums v of the elements of
// c from i on. Which epilogue it is takes a branch a tile, not one a vector.
template <class Body>
FM_INLINE void with_epilogue(const Epilogue& e, Body&& body) {
  if (e.relu) {
    body([](auto, auto v, index_t) { return v < decltype(v){} ? decltype(v){} : v; });
  } else if (e.mask) {
    const S* mask = e.mask;
    body([mask](auto lanes, auto v, index_t i) {
      return lanes.get(mask + i) > decltype(v){} ? v : decltype(v){};
    });
  } else if (e.base) {
    const S *base = e.base, scale = e.scale;
    body([base, scale](auto lanes, auto v, index_t i) { return lanes.get(base + i) + scale * v; });
  } else if (e.scale != S(1)) {
    const S scale = e.scale;
    body([scale](auto, auto v, index_t) { return scale * v; });
  } else {
    body([](auto, auto v, index_t) { return v; });
  }
}

// Rows of a tile from two places: offsets of all of them from one would not fit the registers.
template <int M>
struct SplitRows {
  static constexpr int kHalf = (M + 1) / 2;
  const S *lower, *upper;
  index_t stride;
  FM_INLINE SplitRows(const S* a, index_t stride)
      : lower(a), upper(a + kHalf * stride), stride(stride) {
    asm("" : "+r"(upper));  // or the compiler would see through it
  }
  FM_INLINE const S* at(int m) const {
    return m < kHalf ? lower + m * stride : upper + (m - kHalf) * stride;
  }
  FM_INLINE void advance(index_t n) {
    lower += n;
    upper += n;
  }
};

// Rows are a step apart (a sample's inputs) or adjacent (inputs of a weight gradient).
template <int M, int N, bool AdjacentRows>
void dense_tile(const DenseProduct& p, const DenseTile& at) {
  V acc[M][N];
  const index_t columns = p.columns, depth = p.depth;
  const S* start = p.epilogue.start ? p.epilogue.start + at.column : nullptr;
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = start ? load(start + n * kLanes) : V{};
  }
  for (int pair = 0; pair < p.operands.count; ++pair) {
    const S* from = p.operands.pair[pair].src + at.row * (AdjacentRows ? 1 : p.a_row);
    const S* b = p.operands.pair[pair].other + at.column;
    SplitRows<M> a(from, p.a_row);
    for (index_t k = 0; k < depth; ++k, b += columns) {
      V row[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const V value = splat(AdjacentRows ? from[m] : *a.at(m));
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
      }
      if constexpr (AdjacentRows) {
        from += p.a_step;
      } else {
        a.advance(1);
      }
    }
  }
  with_epilogue(p.epilogue, [&](auto&& finish) {
    const index_t offset = at.row * columns + at.column;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const index_t i = offset + m * columns + n * kLanes;
        store(p.c + i, finish(Lanes<false>{kLanes}, acc[m][n], i));
      }
    }
  });
}

using DenseTileFn = void (*)(const DenseProduct&, const DenseTile&);

template <int N, bool AdjacentRows, int... M>
constexpr TileTable<DenseTileFn> dense_tiles(std::integer_sequence<int, M...>) {
  return {{dense_tile<M + 1, N, AdjacentRows>...}};
}

// [vectors - 1]
template <bool AdjacentRows>
constexpr TileTable<DenseTileFn> kDenseTiles[kTileVectors] = {
    dense_tiles<1, AdjacentRows>(AllRows{}), dense_tiles<2, AdjacentRows>(AllRows{})};

// Calls body(first, count) for parts of equal size, rather than a small one at the end.
template <class Body>
FM_INLINE void for_parts(index_t begin, index_t end, index_t most, Body&& body) {
  const index_t count = (end - begin + most - 1) / most;
  for (index_t t = 0; t < count; ++t) {
    const index_t from = begin + (end - begin) * t / count;
    body(from, begin + (end - begin) * (t + 1) / count - from);
  }
}

// Rows [begin, end) of all whole vectors of c: a block of b stays in the first-level cache while
// they pass it.
template <bool AdjacentRows>
FM_INLINE void dense_blocks(const DenseProduct& p, index_t begin, index_t end) {
  const index_t whole = p.columns / kLanes;
  for (index_t v = 0; v < whole; v += kTileVectors) {
    const auto& tiles = kDenseTiles<AdjacentRows>[min_of<index_t>(kTileVectors, whole - v) - 1];
    for_parts(begin, end, kTileRows,
              [&](index_t row, index_t count) { tiles.rows[count - 1](p, {row, v * kLanes}); });
  }
}

}  // namespace FM_KERNELS
