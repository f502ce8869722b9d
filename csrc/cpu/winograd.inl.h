// Winograd's minimal filtering F(2x2, 3x3) for convolutions of stride 1: y, ty, dx and tdx.
//
//   U = G w G'    [4, 4, C, K]  of the 3 x 3 kernel of each pair of input and output channel
//   D = B' d B    [4, 4, t, C]  of each tile's 4 x 4 inputs d, which overlap by two
//   M = D U       [4, 4, t, K]  16 products of matrices, summed over operand pairs
//   y = A' M A    [t, 2, 2, K]
//
//        1   0   0           1  0 -1  0
//   G = 1/2 1/2 1/2    B' =  0  1  1  0    A' = 1  1  1  0
//       1/2 -1/2 1/2         0 -1  1  0         0  1 -1  1
//        0   0   1           0 -1  0  1
//
// 16 multiply-adds a channel pair instead of 36 (Winograd's algorithm as in Lavin and Gray,
// arXiv:1509.09308). M's position (1, 1) goes into all four outputs with +1, so the bias starts its
// sums. dx is the same with dy for d, the weights transposed and turned by half a circle, and
// padding 2 - p. Borders and odd sizes: what lies outside of an image is zero, or is not stored.
//
// Tiles go by in blocks whose D and M stay cached, image by image and row by row; every output
// takes the same operations in whichever block or thread its tile is.
//
// Rounding: dw of 32 -> 32 channels and 5 images in float32 is off by 8.5, 4.9 and 2.7 eps
// (relative norm; 42, 21 and 10 pixels wide); by the direct algorithm, whose chains are longer, by
// 16, 9.1 and 4.1.

namespace FM_KERNELS {

constexpr index_t kPositions = WinogradSizes::kPositions;

// The tiles of some images of a shape.
struct TileGrid {
  Shape image;
  index_t rows, columns;
  explicit TileGrid(const Shape& of)
      : image(of), rows((of.height + 1) / 2), columns((of.width + 1) / 2) {}
  index_t tiles() const { return rows * columns; }
};

// Neighbours in a row of tiles, the first of them at place `at` of a block.
struct TileRun {
  index_t image, row, column, count, at;
};

// Calls body(run) for the tiles [begin, end).
template <class Body>
FM_INLINE void for_runs(const TileGrid& grid, index_t begin, index_t end, Body&& body) {
  for (index_t tile = begin; tile < end;) {
    const index_t image = tile / grid.tiles(), rest = tile - image * grid.tiles();
    const index_t row = rest / grid.columns, column = rest - row * grid.columns;
    const index_t count = min_of(grid.columns - column, end - tile);
    body(TileRun{image, row, column, count, tile - begin});
    tile += count;
  }
}

// Transformed tiles of a block: [16, block, channels], a place apart from position to position.
struct TileBlock {
  S* data;
  index_t channels, position;
  TileBlock(S* at, index_t block, index_t channels)
      : data(at), channels(channels), position(block * channels + WinogradSizes::kPad) {}
  S* end() const { return data + kPositions * position; }
};

// The four rows of inputs that a row of tiles sees.
struct InputRows {
  const S* row[4];  // null: outside of the image
  index_t width, channels, left;
};

FM_INLINE void transform_inputs(const V (&d)[4], V (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[3] - d[1];
}

// B' times a column of inputs.
template <bool Inside, class L>
FM_INLINE void input_column(L lanes, const InputRows& in, index_t w, index_t c, V (&t)[4]) {
  V d[4] = {};
  if (w >= 0 && w < in.width) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (Inside || in.row[r]) d[r] = lanes.get(in.row[r] + w * in.channels + c);
    }
  }
  transform_inputs(d, t);
}

template <bool Inside>
void input_run(const InputRows& in, index_t count, const TileBlock& block, S* at) {
  for_columns(in.channels, [&](auto lanes, index_t c) {
    V x[4][4];
    input_column<Inside>(lanes, in, in.left, c, x[0]);
    input_column<Inside>(lanes, in, in.left + 1, c, x[1]);
    S* to = at + c;
    index_t w = in.left + 2;
    for (index_t tile = 0; tile < count; ++tile, w += 2, to += in.channels) {
      input_column<Inside>(lanes, in, w, c, x[2]);
      input_column<Inside>(lanes, in, w + 1, c, x[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V d[4] = {x[0][i], x[1][i], x[2][i], x[3][i]};
        V t[4];
        transform_inputs(d, t);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) lanes.put(to + (4 * i + j) * block.position, t[j]);
        x[0][i] = x[2][i];
        x[1][i] = x[3][i];
      }
    }
  });
}

// D of the tiles [begin, end) of a grid of outputs; padding is in pixels, [vertical, horizontal].
inline void transform_input_tiles(const S* x, const Shape& image, const index_t (&padding)[2],
                                  const TileGrid& grid, index_t begin, index_t end,
                                  const TileBlock& block) {
  const index_t row_size = image.width * image.channels;
  for_runs(grid, begin, end, [&](const TileRun& run) {
    InputRows in{{}, image.width, image.channels, 2 * run.column - padding[1]};
    bool inside = true;
    for (index_t r = 0; r < 4; ++r) {
      const index_t h = 2 * run.row - padding[0] + r;
      const bool there = h >= 0 && h < image.height;
      in.row[r] = there ? x + (run.image * image.height + h) * row_size : nullptr;
      inside = inside && there;
    }
    S* at = block.data + run.at * image.channels;
    if (inside) {
      input_run<true>(in, run.count, block, at);
    } else {
      input_run<false>(in, run.count, block, at);
    }
  });
}

// T m T' of a square m [In, In] for a transform T of its columns: get(row, column) reads m,
// put(row, column, v) takes the result [Out, Out].
template <int In, int Out, class Transform, class Get, class Put>
FM_INLINE void transform_square(Transform transform, Get get, Put put) {
  V rows[Out][In];
#pragma GCC unroll 4
  for (int x = 0; x < In; ++x) {
    V column[In], t[Out];
#pragma GCC unroll 4
    for (int y = 0; y < In; ++y) column[y] = get(y, x);
    transform(column, t);
#pragma GCC unroll 4
    for (int r = 0; r < Out; ++r) rows[r][x] = t[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < Out; ++r) {
    V t[Out];
    transform(rows[r], t);
#pragma GCC unroll 4
    for (int x = 0; x < Out; ++x) put(r, x, t[x]);
  }
}

FM_INLINE void transform_weights(const V (&g)[3], V (&u)[4]) {
  const V half = splat(S(0.5)), ends = half * (g[0] + g[2]), middle = half * g[1];
  u[0] = g[0];
  u[1] = ends + middle;
  u[2] = ends - middle;
  u[3] = g[2];
}

// U [16, inputs, outputs] of weights [9, inputs, outputs], `turned` by half a circle or not.
inline void transform_kernel(const S* w, index_t inputs, index_t outputs, bool turned, S* u) {
  const index_t matrix = inputs * outputs;
  for_columns(matrix, [&](auto lanes, index_t i) {
    transform_square<3, 4>(
        transform_weights,
        [&](int y, int x) {
          const index_t tap = 3 * y + x;
          return lanes.get(w + (turned ? 8 - tap : tap) * matrix + i);
        },
        [&](int r, int x, V v) { lanes.put(u + (4 * r + x) * matrix + i, v); });
  });
}

FM_INLINE void transform_outputs(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] + m[3];
}

// A' M A of the tiles [begin, end) into the images they are of.
inline void transform_output_tiles(const TileBlock& block, const TileGrid& grid, index_t begin,
                                   index_t end, S* y) {
  const index_t channels = block.channels, row_size = grid.image.width * channels;
  for_runs(grid, begin, end, [&](const TileRun& run) {
    const bool two_rows = 2 * run.row + 1 < grid.image.height;
    S* first = y + (run.image * grid.image.height + 2 * run.row) * row_size;
    for_columns(channels, [&](auto lanes, index_t c) {
      const S* from = block.data + run.at * channels + c;
      for (index_t tile = 0; tile < run.count; ++tile, from += channels) {
        V column[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          V m[4], t[2];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) m[i] = lanes.get(from + (4 * i + j) * block.position);
          transform_outputs(m, t);
          column[0][j] = t[0];
          column[1][j] = t[1];
        }
        const index_t w = 2 * (run.column + tile);
        const bool two_columns = w + 1 < grid.image.width;
        S* to = first + w * channels + c;
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          if (r == 1 && !two_rows) break;
          V t[2];
          transform_outputs(column[r], t);
          lanes.put(to + r * row_size, t[0]);
          if (two_columns) lanes.put(to + r * row_size + channels, t[1]);
        }
      }
    });
  });
}

// One of the convolutions above.
struct WinogradProduct {
  Operands operands;  // (x, weights [9, inputs, outputs])
  Shape src, dst;
  index_t images;
  index_t padding[2];
  bool turned;
  const S* bias;
  S* y;
};

// M = D U of `tiles` tiles.
inline void multiply_tiles(const TileBlock* d, int pairs, const S* u, index_t panel, const S* bias,
                           index_t tiles, const TileBlock& m) {
  const index_t inputs = d->channels, outputs = m.channels;
  for (index_t position = 0; position < kPositions; ++position) {
    Operands operands;
    for (int pair = 0; pair < pairs; ++pair) {
      operands.add(d[pair].data + position * d[pair].position,
                   u + pair * panel + position * inputs * outputs);
    }
    position_product<false>({tiles, outputs, inputs, operands, inputs,
                             position == 5 ? bias : nullptr, false,
                             m.data + position * m.position});
  }
}

inline void winograd_product(const WinogradProduct& p, const WinogradSizes& size,
                             const Exec& exec) {
  const TileGrid grid(p.dst);
  const index_t inputs = p.src.channels, outputs = p.dst.channels;
  const int pairs = p.operands.count;
  S* u = static_cast<S*>(exec.scratch) + size.direct;
  S* memory = u + max_of<index_t>(2, size.sums) * size.panel;
  for (int pair = 0; pair < pairs; ++pair) {
    transform_kernel(p.operands.pair[pair].other, inputs, outputs, p.turned, u + pair * size.panel);
  }
  const index_t tiles = p.images * grid.tiles(), parts = min_of(size.parts, tiles);
  const index_t work = tiles / parts * size.panel * pairs;
  parallel(exec, parts, 1, work, [&](index_t first, index_t last) {
    TileBlock d[2] = {{memory + first * size.work, size.block, inputs}, {nullptr, 0, 0}};
    d[1] = TileBlock(d[0].end(), size.block, inputs);
    const TileBlock m(d[1].end(), size.block, outputs);
    const index_t stop = tiles * last / parts;
    for (index_t begin = tiles * first / parts; begin < stop; begin += size.block) {
      const index_t end = min_of(stop, begin + size.block);
      for (int pair = 0; pair < pairs; ++pair) {
        transform_input_tiles(p.operands.pair[pair].src, p.src, p.padding, grid, begin, end,
                              d[pair]);
      }
      multiply_tiles(d, pairs, u, size.panel, p.bias, end - begin, m);
      transform_output_tiles(m, grid, begin, end, p.y);
    }
  });
}

}  // namespace FM_KERNELS
