// The two products behind Linear and Conv2d, on channels-last data and without im2col.
//
// Gather product (forward, tangent_forward, dx, tdx):
//   dst[pixel, :] = bias + sum over operand pairs, runs and c of src[pixel's run + c] W[run + c, :]
// A tile is kTileRows pixels by up to two vectors of outputs, held in registers over all runs and
// both operand pairs. Pixels of a tile come from one group of the gather table, images following
// each other, so there are no bounds to test and no padding to multiply.
//
// Weight gradient (dw, tdw):
//   dw[run + i, :] = sum over operand pairs and pixels of src[pixel's run + i] dst[pixel, :]
// A tile is kTileRows inputs i by up to two vectors of outputs. Pixels go by in chunks that stay in
// the first-level cache while all tiles pass over them.
//
// Every element of a result is one chain of fused multiply-adds in an order that depends on the
// table alone, whichever tile or thread it falls to.

namespace FM_KERNELS {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
constexpr index_t kTileColumns = kTileVectors * kLanes;

struct Operand {
  const S* src;
  const S* other;  // weights of the gather product, dst of the weight gradient
};

struct Operands {
  Operand pair[2] = {};
  int count = 0;
  FM_INLINE void add(const S* src, const S* other) {
    if (src && other) pair[count++] = {src, other};
  }
};

struct GatherProduct {
  const GatherTable* table;
  Operands operands;
  index_t images, outputs;
  const S* bias;
  S* dst;
};

struct TileAddress {
  const PixelGroup* group;
  const index_t* src;    // [M]
  const index_t* dst;    // [M]
  index_t column, tail;  // first output; outputs in the last vector
};

template <int N, bool Partial>
FM_INLINE void load_row(V (&v)[N], const S* p, index_t tail) {
#pragma GCC unroll 2
  for (int n = 0; n < N - 1; ++n) v[n] = load(p + n * kLanes);
  v[N - 1] = Lanes<Partial>{tail}.get(p + (N - 1) * kLanes);
}

template <int N, bool Partial>
FM_INLINE void store_row(S* p, const V (&v)[N], index_t tail) {
#pragma GCC unroll 2
  for (int n = 0; n < N - 1; ++n) store(p + n * kLanes, v[n]);
  Lanes<Partial>{tail}.put(p + (N - 1) * kLanes, v[N - 1]);
}

template <int M, int N, bool Partial>
void gather_tile(const GatherProduct& p, const TileAddress& at) {
  V acc[M][N];
  V start[N] = {};
  if (p.bias) load_row<N, Partial>(start, p.bias + at.column, at.tail);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = start[n];
  }
  for (int pair = 0; pair < p.operands.count; ++pair) {
    const Operand& operand = p.operands.pair[pair];
    for (const TapRun& run : at.group->runs) {
      const S* w = operand.other + run.weight * p.outputs + at.column;
      const S* x[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) x[m] = operand.src + at.src[m] + run.src;
      for (index_t c = 0; c < run.length; ++c, w += p.outputs) {
        V row[N];
        load_row<N, Partial>(row, w, at.tail);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const V value = splat(x[m][c]);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store_row<N, Partial>(p.dst + at.dst[m] + at.column, acc[m], at.tail);
  }
}

struct GradientTile {
  const index_t* src;  // [rows] offsets of the pixels' runs
  const index_t* dst;  // [rows]
  index_t rows, input, column, tail, outputs;
  bool fresh;  // start from zero instead of from dw
};

// Adds the tile's products to dw [M, outputs], already offset to the tile.
template <int M, int N, bool Partial>
void gradient_tile(const Operands& operands, const GradientTile& at, S* dw) {
  V acc[M][N] = {};
  if (!at.fresh) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) load_row<N, Partial>(acc[m], dw + m * at.outputs, at.tail);
  }
  for (int pair = 0; pair < operands.count; ++pair) {
    const S* src = operands.pair[pair].src + at.input;
    const S* dst = operands.pair[pair].other + at.column;
    for (index_t r = 0; r < at.rows; ++r) {
      const S* x = src + at.src[r];
      V row[N];
      load_row<N, Partial>(row, dst + at.dst[r], at.tail);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V value = splat(x[m]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_row<N, Partial>(dw + m * at.outputs, acc[m], at.tail);
}

using GatherTile = void (*)(const GatherProduct&, const TileAddress&);
using GradientTileFn = void (*)(const Operands&, const GradientTile&, S*);

template <class Fn>
struct TileTable {
  Fn rows[kTileRows];  // [M - 1]
};

template <int N, bool Partial, int... M>
constexpr TileTable<GatherTile> gather_tiles(std::integer_sequence<int, M...>) {
  return {{gather_tile<M + 1, N, Partial>...}};
}

template <int N, bool Partial, int... M>
constexpr TileTable<GradientTileFn> gradient_tiles(std::integer_sequence<int, M...>) {
  return {{gradient_tile<M + 1, N, Partial>...}};
}

using AllRows = std::make_integer_sequence<int, kTileRows>;

// [vectors - 1][partial]
constexpr TileTable<GatherTile> kGatherTiles[kTileVectors][2] = {
    {gather_tiles<1, false>(AllRows{}), gather_tiles<1, true>(AllRows{})},
    {gather_tiles<2, false>(AllRows{}), gather_tiles<2, true>(AllRows{})}};
constexpr TileTable<GradientTileFn> kGradientTiles[kTileVectors][2] = {
    {gradient_tiles<1, false>(AllRows{}), gradient_tiles<1, true>(AllRows{})},
    {gradient_tiles<2, false>(AllRows{}), gradient_tiles<2, true>(AllRows{})}};

struct ColumnBlock {
  index_t column, vectors, tail;
  bool partial;
};

FM_INLINE ColumnBlock column_block(index_t outputs, index_t block) {
  const index_t column = block * kTileColumns;
  const index_t left = min_of(outputs - column, kTileColumns);
  const index_t vectors = (left + kLanes - 1) / kLanes;
  const index_t tail = left - (vectors - 1) * kLanes;
  return {column, vectors, tail, tail != kLanes};
}

// Offsets of `count` pixels of a group from `first` on, images following each other.
FM_INLINE void pixel_offsets(const GatherTable& table, const PixelGroup& group, index_t first,
                             index_t count, index_t* src, index_t* dst) {
  const index_t pixels = index_t(group.rows.size());
  index_t image = first / pixels, pixel = first - image * pixels;
  for (index_t i = 0; i < count; ++i) {
    src[i] = image * table.src_size + group.rows[pixel].src;
    dst[i] = image * table.dst_size + group.rows[pixel].dst;
    if (++pixel == pixels) {
      pixel = 0;
      ++image;
    }
  }
}

// The part [begin, end) of a group's tiles, one block of columns.
inline void gather_tiles_of_group(const GatherProduct& p, const PixelGroup& group,
                                  const ColumnBlock& block, index_t begin, index_t end) {
  const auto& tiles = kGatherTiles[block.vectors - 1][block.partial];
  const index_t pixels = p.images * index_t(group.rows.size());
  index_t src[kTileRows], dst[kTileRows];
  for (index_t tile = begin; tile < end; ++tile) {
    const index_t first = tile * kTileRows;
    const index_t count = min_of<index_t>(kTileRows, pixels - first);
    pixel_offsets(*p.table, group, first, count, src, dst);
    tiles.rows[count - 1](p, {&group, src, dst, block.column, block.tail});
  }
}

inline void gather_product(const GatherProduct& p, const Exec& exec) {
  const index_t blocks = (p.outputs + kTileColumns - 1) / kTileColumns;
  const auto tiles_of = [&](const PixelGroup& group) {
    return (p.images * index_t(group.rows.size()) + kTileRows - 1) / kTileRows;
  };
  index_t total = 0, taps = 0;
  for (const PixelGroup& group : p.table->groups) total += blocks * tiles_of(group);
  for (const TapRun& run : p.table->groups[0].runs) taps += run.length;
  const index_t tile = (taps + 1) * p.operands.count * kTileRows * min_of(p.outputs, kTileColumns);
  parallel(exec, total, 1, tile, [&](index_t begin, index_t end) {
    index_t first = 0;  // of this group and block, among all tiles
    for (const PixelGroup& group : p.table->groups) {
      const index_t tiles = tiles_of(group);
      for (index_t b = 0; b < blocks; ++b, first += tiles) {
        const index_t from = max_of(begin, first) - first, to = min_of(end, first + tiles) - first;
        if (from < to) {
          gather_tiles_of_group(p, group, column_block(p.outputs, b), from, to);
        }
      }
    }
  });
}

struct WeightGradient {
  const GatherTable* table;         // the forward one
  Operands operands;                // (x, dy), (tx, tdy) in any pairing
  index_t images, inputs, outputs;  // inputs: rows of dw
  S* dw;
};

// Pixels of a chunk: rows of both sides stay within some 48 KiB.
constexpr index_t kMaxChunk = 256;

FM_INLINE index_t chunk_rows(index_t channels, index_t outputs) {
  const index_t rows = index_t(48 * 1024 / sizeof(S)) / (channels + outputs);
  return max_of<index_t>(16, min_of(rows, kMaxChunk));
}

// One chunk's products into the rows [begin, end) of dw.
inline void gradient_of_chunk(const WeightGradient& g, const PixelGroup& group, GradientTile tile,
                              index_t begin, index_t end) {
  const index_t blocks = (g.outputs + kTileColumns - 1) / kTileColumns;
  for (const TapRun& run : group.runs) {
    const index_t from = max_of(begin, run.weight), to = min_of(end, run.weight + run.length);
    for (index_t i = from; i < to; i += kTileRows) {
      const index_t count = min_of<index_t>(kTileRows, to - i);
      tile.input = run.src + i - run.weight;
      for (index_t b = 0; b < blocks; ++b) {
        const ColumnBlock block = column_block(g.outputs, b);
        tile.column = block.column;
        tile.tail = block.tail;
        const auto fn = kGradientTiles[block.vectors - 1][block.partial].rows[count - 1];
        fn(g.operands, tile, g.dw + i * g.outputs + block.column);
      }
    }
  }
}

// A lone group whose runs reach every weight: its first chunk writes all of dw.
inline bool covers_all(const WeightGradient& g) {
  index_t reached = 0;
  if (g.table->groups.size() != 1) return false;
  for (const TapRun& run : g.table->groups[0].runs) reached += run.length;
  return reached == g.inputs;
}

inline void weight_gradient(const WeightGradient& g, index_t channels, const Exec& exec) {
  const index_t step = chunk_rows(channels, g.outputs);
  const bool fresh = covers_all(g);
  index_t pixels = 0;
  for (const PixelGroup& group : g.table->groups) pixels += g.images * index_t(group.rows.size());
  const index_t row = pixels * g.outputs * g.operands.count;
  parallel(exec, g.inputs, kTileRows, row, [&](index_t begin, index_t end) {
    if (!fresh) std::memset(g.dw + begin * g.outputs, 0, (end - begin) * g.outputs * sizeof(S));
    index_t src[kMaxChunk], dst[kMaxChunk];
    for (const PixelGroup& group : g.table->groups) {
      if (group.runs.empty()) continue;
      const index_t pixels = g.images * index_t(group.rows.size());
      for (index_t first = 0; first < pixels; first += step) {
        const index_t rows = min_of(step, pixels - first);
        pixel_offsets(*g.table, group, first, rows, src, dst);
        const GradientTile tile{src, dst, rows, 0, 0, 0, g.outputs, fresh && first == 0};
        gradient_of_chunk(g, group, tile, begin, end);
      }
    }
  });
}

}  // namespace FM_KERNELS
