// Weight gradients of the convolutions in winograd.inl.h: dw and tdw.
//
// y is linear in U, and M in D, so that the gradient is the transpose of what is there:
//
//   E  = A dy A'            [4, 4, t, K]  of each tile's 2 x 2 adjoints dy
//   dU = sum over t of D'E  [4, 4, C, K]  16 products of matrices
//   dw = G' dU G            [3, 3, C, K]
//
// which is the minimal filtering F(3x3, 2x2). Adjoints outside of an image are zero.
//
// The tiles of a task are summed in parts whose number depends on shapes alone, each in blocks of
// tiles in order, and the parts are added in order: threads change no bit.

namespace FM_KERNELS {

FM_INLINE void transform_adjoints(const V (&d)[2], V (&t)[4]) {
  t[0] = d[0];
  t[1] = d[0] + d[1];
  t[2] = d[0] - d[1];
  t[3] = d[1];
}

// E of the tiles [begin, end) of a grid.
inline void transform_adjoint_tiles(const S* dy, const TileGrid& grid, index_t begin, index_t end,
                                    const TileBlock& block) {
  const index_t channels = block.channels, row_size = grid.image.width * channels;
  for_runs(grid, begin, end, [&](const TileRun& run) {
    const bool two_rows = 2 * run.row + 1 < grid.image.height;
    const S* first = dy + (run.image * grid.image.height + 2 * run.row) * row_size;
    for_columns(channels, [&](auto lanes, index_t c) {
      S* to = block.data + run.at * channels + c;
      for (index_t tile = 0; tile < run.count; ++tile, to += channels) {
        const index_t w = 2 * (run.column + tile);
        const bool two_columns = w + 1 < grid.image.width;
        const S* from = first + w * channels + c;
        V column[2][4];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          V d[2] = {};
          if (j == 0 || two_columns) {
            d[0] = lanes.get(from + j * channels);
            if (two_rows) d[1] = lanes.get(from + row_size + j * channels);
          }
          transform_adjoints(d, column[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const V d[2] = {column[0][i], column[1][i]};
          V t[4];
          transform_adjoints(d, t);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) lanes.put(to + (4 * i + j) * block.position, t[j]);
        }
      }
    });
  });
}

FM_INLINE void transform_sums(const V (&u)[4], V (&g)[3]) {
  const V half = splat(S(0.5)), sum = half * (u[1] + u[2]);
  g[0] = u[0] + sum;
  g[1] = half * (u[1] - u[2]);
  g[2] = sum + u[3];
}

// dw [9, matrix] of `parts` sums dU [16, matrix], `panel` apart.
inline void finish_gradient(const S* sums, index_t parts, index_t panel, index_t matrix, S* dw) {
  for_columns(matrix, [&](auto lanes, index_t i) {
    transform_square<4, 3>(
        transform_sums,
        [&](int y, int x) {
          const S* at = sums + (4 * y + x) * matrix + i;
          V sum = lanes.get(at);
          for (index_t part = 1; part < parts; ++part) sum += lanes.get(at + part * panel);
          return sum;
        },
        [&](int r, int x, V v) { lanes.put(dw + (3 * r + x) * matrix + i, v); });
  });
}

// dU, plus what it is already unless `fresh`, of `tiles` tiles.
inline void sum_tiles(const TileBlock& d, const TileBlock& e, index_t tiles, bool fresh, S* du) {
  const index_t inputs = d.channels, outputs = e.channels;
  for (index_t position = 0; position < kPositions; ++position) {
    Operands operands;
    operands.add(d.data + position * d.position, e.data + position * e.position);
    position_product<true>({inputs, outputs, tiles, operands, inputs, nullptr, !fresh,
                            du + position * inputs * outputs});
  }
}

// operands: (x, dy)
inline void winograd_gradient(const LayerDesc& desc, const Operands& operands, index_t images,
                              const WinogradSizes& size, S* dw, const Exec& exec) {
  const TileGrid grid(desc.out);
  const index_t inputs = desc.in.channels, outputs = desc.out.channels;
  const index_t tiles = images * grid.tiles(), parts = size.sums;
  if (operands.count == 0) {
    std::memset(dw, 0, 9 * inputs * outputs * sizeof(S));
    return;
  }
  S* sums = static_cast<S*>(exec.scratch) + size.direct;
  S* memory = sums + max_of<index_t>(2, size.sums) * size.panel;
  const index_t work = tiles / parts * size.panel * operands.count;
  parallel(exec, parts, 1, work, [&](index_t first, index_t last) {
    const TileBlock d(memory + first * size.work, size.gradient_block, inputs);
    const TileBlock e(d.end(), size.gradient_block, outputs);
    for (index_t part = first; part < last; ++part) {
      const index_t start = tiles * part / parts, stop = tiles * (part + 1) / parts;
      for (index_t begin = start; begin < stop; begin += size.gradient_block) {
        const index_t end = min_of(stop, begin + size.gradient_block);
        for (int pair = 0; pair < operands.count; ++pair) {
          const Operand& operand = operands.pair[pair];
          transform_input_tiles(operand.src, desc.in, desc.window.padding, grid, begin, end, d);
          transform_adjoint_tiles(operand.other, grid, begin, end, e);
          sum_tiles(d, e, end - begin, begin == start && pair == 0, sums + part * size.panel);
        }
      }
    }
  });
  finish_gradient(sums, parts, size.panel, inputs * outputs, dw);
}

}  // namespace FM_KERNELS
