// The 16 products of winograd.inl.h and winograd_gradient.inl.h, of small matrices in the cache:
//
//   c[m, :] = start + sum over operand pairs and k of a[m, k] b[k, :]      (+ c[m, :] if it adds)
//
// As in dense.inl.h, for rows of a that are samples (tiles of outputs) or adjacent (inputs of a
// weight gradient). Sums are so short, 32 terms where there are 32 channels, that what precedes and
// follows them counts: here that is a load and a store, not an epilogue.
//
// Every element is one chain of multiply-adds over k, whichever tile it falls to.

namespace FM_KERNELS {

struct PositionProduct {
  index_t rows, columns, depth;
  Operands operands;  // (a, b)
  index_t a_stride;   // of rows, or of k where rows are adjacent
  const S* start;     // [columns], null: zero
  bool adds;
  S* c;
};

template <int M, int N, bool Partial, bool AdjacentRows>
void position_tile(const PositionProduct& p, index_t first, const ColumnBlock& block) {
  V acc[M][N], start[N] = {};
  if (p.start) load_row<N, Partial>(start, p.start + block.column, block.tail);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = start[n];
  }
  const index_t columns = p.columns, depth = p.depth;
  const index_t a_row = AdjacentRows ? 1 : p.a_stride, a_step = AdjacentRows ? p.a_stride : 1;
  for (int pair = 0; pair < p.operands.count; ++pair) {
    const S* a = p.operands.pair[pair].src + first * a_row;
    const S* b = p.operands.pair[pair].other + block.column;
    for (index_t k = 0; k < depth; ++k, a += a_step, b += columns) {
      V row[N];
      load_row<N, Partial>(row, b, block.tail);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V value = splat(a[m * a_row]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
      }
    }
  }
  S* c = p.c + first * columns + block.column;
  if (p.adds) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      V before[N];
      load_row<N, Partial>(before, c + m * columns, block.tail);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[m][n] += before[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_row<N, Partial>(c + m * columns, acc[m], block.tail);
}

using PositionTile = void (*)(const PositionProduct&, index_t, const ColumnBlock&);

template <int N, bool Partial, bool AdjacentRows, int... M>
constexpr TileTable<PositionTile> position_tiles(std::integer_sequence<int, M...>) {
  return {{position_tile<M + 1, N, Partial, AdjacentRows>...}};
}

// [vectors - 1][partial]
template <bool AdjacentRows>
constexpr TileTable<PositionTile> kPositionTiles[kTileVectors][2] = {
    {position_tiles<1, false, AdjacentRows>(AllRows{}),
     position_tiles<1, true, AdjacentRows>(AllRows{})},
    {position_tiles<2, false, AdjacentRows>(AllRows{}),
     position_tiles<2, true, AdjacentRows>(AllRows{})}};

template <bool AdjacentRows>
FM_INLINE void position_product(const PositionProduct& p) {
  const index_t blocks = (p.columns + kTileColumns - 1) / kTileColumns;
  const index_t count = (p.rows + kTileRows - 1) / kTileRows;
  for (index_t b = 0; b < blocks; ++b) {
    const ColumnBlock block = column_block(p.columns, b);
    const auto& tiles = kPositionTiles<AdjacentRows>[block.vectors - 1][block.partial];
    for (index_t t = 0, from = 0; t < count; ++t) {  // of nearly equal size
      const index_t to = p.rows * (t + 1) / count;
      tiles.rows[to - from - 1](p, from, block);
      from = to;
    }
  }
}

}  // namespace FM_KERNELS
