// A convolution with few inputs and stride 1, a strip of rows at a time: outputs that the layer
// above reads while the cache still holds them, and a weight gradient whose dy never leaves it.
//
//   y[r, q, :]     = bias + sum over ky and i of band[r + ky, q C + i] w[ky, i, :]
//   dw[ky, i, :]   = sum over r and q of band[r + ky, q C + i] dy[r, q, :]
//
// band: the rows of x that a strip sees, copied with their padding, so that neither product knows a
// border; i runs over the kernel's width times the channels, which lie side by side in a row.
// Weights are copied with whole vectors of outputs [inputs + 1, width], the bias behind them; sums
// for dw have the same shape, one for each part of the strips.
//
// A tile of outputs is up to kBandTile pixels of a row by two vectors; the last tiles of a row
// overlap rather than come in every size. Every output is one chain of multiply-adds.

namespace FM_KERNELS {

#if defined(__AVX512F__)
constexpr int kBandTile = 14;
#else
constexpr int kBandTile = 6;
#endif

// What the scratch memory of a fused convolution holds, see StripSizes.
struct ConvBand {
  const LayerDesc* d;
  index_t channels, outputs, width;         // width: outputs in whole vectors of up to 16
  index_t run, row, inputs;                 // kernel width * C, padded row of x, kernel pixels * C
  S *panel, *moments;                       // [inputs + 1, width]; two such
  S *bands, *adjoints, *sums, *patch_sums;  // a part each
  index_t band_size, adjoint_size, sum_size, patch_size;

  ConvBand(const LayerDesc& desc, const Exec& exec) : d(&desc) {
    const StripSizes size(desc);
    channels = desc.in.channels;
    outputs = desc.out.channels;
    width = size.width;
    run = desc.window.kernel[1] * channels;
    row = size.row;
    inputs = size.inputs;
    band_size = size.band;
    adjoint_size = size.adjoint;
    sum_size = size.panel;
    panel = static_cast<S*>(exec.scratch) + size.norm;
    patch_size = size.patch;
    moments = panel + size.panel;
    bands = moments + 2 * size.panel;
    adjoints = bands + kStatisticParts * band_size;
    sums = adjoints + kStatisticParts * adjoint_size;
    patch_sums = sums + kStatisticParts * sum_size;
  }

  S* band(index_t part) const { return bands + part * band_size; }
  S* adjoint(index_t part) const { return adjoints + part * adjoint_size; }
  S* sum(index_t part) const { return sums + part * sum_size; }
  S* patch_sum(index_t part) const { return patch_sums + part * patch_size; }

  // weights (null: zero) and bias
  void load_weights(const S* w) const {
    std::memset(panel, 0, sum_size * sizeof(S));
    if (!w) return;
    for (index_t i = 0; i < inputs; ++i) {
      std::memcpy(panel + i * width, w + i * outputs, outputs * sizeof(S));
    }
    if (d->has_bias) {
      std::memcpy(panel + inputs * width, w + d->bias_offset, outputs * sizeof(S));
    }
  }

  // The rows of image n that the output rows [begin, end) see.
  void load_band(const S* x, index_t n, index_t begin, index_t end, S* to) const {
    const index_t pad = d->window.padding[1] * channels, inside = d->in.width * channels;
    for (index_t r = begin; r < end + d->window.kernel[0] - 1; ++r, to += row) {
      const index_t h = r - d->window.padding[0];
      if (h < 0 || h >= d->in.height) {
        std::memset(to, 0, row * sizeof(S));
        continue;
      }
      std::memset(to, 0, pad * sizeof(S));
      std::memcpy(to + pad, x + (n * d->in.height + h) * inside, inside * sizeof(S));
      std::memset(to + pad + inside, 0, pad * sizeof(S));
    }
  }
};

// Memory that the next strip will read or write, fetched into the second-level cache a few lines at
// a time between the products of this one: they rarely wait for memory.
struct Ahead {
  static constexpr index_t kLine = kAlignment / sizeof(S);
  const S* stream[2] = {nullptr, nullptr};
  index_t at = 0, end = 0;  // elements

  // The same share of what is left, as often as a strip calls it.
  FM_INLINE void fetch(index_t elements) {
    const index_t stop = min_of(end, at + elements);
    for (; at < stop; at += kLine) {
      for (const S* s : stream) {
        if (s) __builtin_prefetch(s + at, 0, 2);
      }
    }
  }
};

// last: outputs of the last vector
struct BandTile {
  index_t kernel_rows, run, row, channels, width, outputs, last;
};

FM_INLINE void store_outputs(S* p, V v, index_t n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

// Hides where a pointer comes from: what one round of a loop loads would else be carried to the
// next, which meets it again a pixel further, through the stack.
FM_INLINE void keep_loads_apart(const S*& p) { asm volatile("" : "+r"(p)); }

// C: channels, 0 if the compiler doesn't know them
template <int M, int N, int C>
void band_outputs(const BandTile& t, const S* x, const S* w, const S* bias, S* y) {
  const index_t step = C ? C : t.channels;
  V acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = load(bias + n * kLanes);
  }
  for (index_t k = 0; k < t.kernel_rows; ++k, x += t.row) {
    const S* at = x;
    for (index_t i = 0; i < t.run; ++i, ++at, w += t.width) {
      keep_loads_apart(at);
      V row[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) row[n] = load(w + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V value = splat(at[m * step]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N - 1; ++n) store(y + m * t.outputs + n * kLanes, acc[m][n]);
    store_outputs(y + m * t.outputs + (N - 1) * kLanes, acc[m][N - 1], t.last);
  }
}

// Adds M rows of dw over the pixels of a strip; dy has whole vectors to read.
template <int M, int N>
void band_gradient(const BandTile& t, index_t rows, index_t pixels, const S* x, const S* dy,
                   S* dw) {
  V acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = load(dw + m * t.width + n * kLanes);
  }
  for (index_t r = 0; r < rows; ++r, x += t.row) {
    const S* at = x;
    for (index_t q = 0; q < pixels; ++q, at += t.channels, dy += t.outputs) {
      V row[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) row[n] = load(dy + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V value = splat(at[m]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(dw + m * t.width + n * kLanes, acc[m][n]);
  }
}

using BandOutputs = void (*)(const BandTile&, const S*, const S*, const S*, S*);
using BandGradient = void (*)(const BandTile&, index_t, index_t, const S*, const S*, S*);

template <class Fn>
struct BandKernel {
  index_t rows;
  Fn fn[2];  // [vectors - 1]
};

// From large to small, down to one.
template <int C>
constexpr BandKernel<BandOutputs> kBandOutputs[] = {
#if defined(__AVX512F__)
    {14, {band_outputs<14, 1, C>, band_outputs<14, 2, C>}},
    {12, {band_outputs<12, 1, C>, band_outputs<12, 2, C>}},
    {10, {band_outputs<10, 1, C>, band_outputs<10, 2, C>}},
    {8, {band_outputs<8, 1, C>, band_outputs<8, 2, C>}},
#endif
    {6, {band_outputs<6, 1, C>, band_outputs<6, 2, C>}},
    {4, {band_outputs<4, 1, C>, band_outputs<4, 2, C>}},
    {2, {band_outputs<2, 1, C>, band_outputs<2, 2, C>}},
    {1, {band_outputs<1, 1, C>, band_outputs<1, 2, C>}}};

constexpr BandKernel<BandGradient> kBandGradients[] = {
#if defined(__AVX512F__)
    {12, {band_gradient<12, 1>, band_gradient<12, 2>}},
    {9, {band_gradient<9, 1>, band_gradient<9, 2>}},
#endif
    {6, {band_gradient<6, 1>, band_gradient<6, 2>}},
    {4, {band_gradient<4, 1>, band_gradient<4, 2>}},
    {3, {band_gradient<3, 1>, band_gradient<3, 2>}},
    {2, {band_gradient<2, 1>, band_gradient<2, 2>}},
    {1, {band_gradient<1, 1>, band_gradient<1, 2>}}};

// The kernel for tiles of a row of so many pixels: the smallest that needs no more tiles than the
// largest does, and fits.
FM_INLINE const BandKernel<BandOutputs>* outputs_kernel(const BandKernel<BandOutputs>* kernel,
                                                        index_t pixels) {
  const index_t tiles = (pixels + kBandTile - 1) / kBandTile;
  const index_t least = (pixels + tiles - 1) / tiles;
  while (kernel->rows > pixels || (kernel->rows > 1 && kernel[1].rows >= least)) ++kernel;
  return kernel;
}

// Calls body(column, vectors, outputs in the last vector) for blocks of up to two vectors.
template <class Body>
FM_INLINE void for_output_blocks(const ConvBand& b, Body&& body) {
  for (index_t c = 0; c < b.outputs; c += kTileColumns) {
    const index_t left = min_of(b.outputs - c, kTileColumns);
    const index_t vectors = (left + kLanes - 1) / kLanes;
    body(c, vectors, left - (vectors - 1) * kLanes);
  }
}

// The outputs of a strip of `rows` rows into y, whose first is the strip's.
inline void band_convolve(const ConvBand& b, const S* band, index_t rows, S* y, Ahead ahead = {}) {
  const index_t pixels = b.d->out.width;
  const auto* kernel = outputs_kernel(b.channels == 3 ? kBandOutputs<3> : kBandOutputs<0>, pixels);
  for_output_blocks(b, [&](index_t c, index_t vectors, index_t last) {
    const BandTile tile{b.d->window.kernel[0], b.run, b.row, b.channels, b.width, b.outputs, last};
    for (index_t r = 0; r < rows; ++r) {
      for (index_t q = 0; q < pixels; q += kernel->rows) {
        const index_t at = min_of(q, pixels - kernel->rows);
        ahead.fetch(kernel->rows * vectors * kLanes);
        kernel->fn[vectors - 1](tile, band + r * b.row + at * b.channels, b.panel + c,
                                b.panel + b.inputs * b.width + c,
                                y + (r * pixels + at) * b.outputs + c);
      }
    }
  });
}

// Adds what a strip of `rows` rows gives to the sums of dw and of the bias.
inline void band_weight_gradient(const ConvBand& b, const S* band, index_t rows, const S* dy, S* dw,
                                 Ahead ahead = {}) {
  const index_t pixels = b.d->out.width;
  for_output_blocks(b, [&](index_t c, index_t vectors, index_t last) {
    const BandTile tile{b.d->window.kernel[0], b.run, b.row, b.channels, b.width, b.outputs, last};
    for (index_t k = 0; k < tile.kernel_rows; ++k) {
      const auto* kernel = kBandGradients;
      for (index_t i = 0; i < b.run; i += kernel->rows) {
        while (kernel->rows > b.run - i) ++kernel;
        for (index_t r = 0; r < rows; ++r) {
          ahead.fetch(pixels * kernel->rows * b.outputs / b.inputs * 2);
          kernel->fn[vectors - 1](tile, 1, pixels, band + (r + k) * b.row + i,
                                  dy + r * pixels * b.outputs + c,
                                  dw + (k * b.run + i) * b.width + c);
        }
      }
    }
  });
  if (!b.d->has_bias) return;
  S* bias = dw + b.inputs * b.width;
  sum_rows(dy, rows * pixels, b.outputs, bias, S(1), bias);
}

}  // namespace FM_KERNELS
