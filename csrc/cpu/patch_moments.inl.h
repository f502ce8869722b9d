// First and second moments of a convolution's patches: what every sum over its outputs is made of.
//
// A patch P of x is what one output sees, [27] for a 3 x 3 kernel and three channels. Then over all
// n outputs
//
//   s = sum P,  G = sum (P - s / n) (P - s / n)'
//   mean(y) = w' s / n + b,  sum P (y - mean(y))' = G w,  sum (y - mean(y)) (ty - mean(ty)) = w' G
//   tw
//
// and a sum over the pixels of y needs no pixel of y. Kernels of 3 x 3, stride 1.
//
// Patches overlap: with R_d(a) [i, i'] = sum over q of row_a[q C + i] row_{a + d}[q C + i'], of the
// padded rows a of an image, block (k, k + d) of G before its centring is the sum of R_d(a) over
// the rows a = k ... k + height - 1. Rows that all k share are added up once, the few others apart.

namespace FM_KERNELS {

// Vectors hold a patch's row and more; what is in their other lanes is never looked at.
template <int C>
struct PatchSums {
  static constexpr index_t kRun = 3 * C, kPatch = 9 * C, kBlock = (kRun + 1) * kLanes;
  // blocks R_d, d = 0 ... 2, of the shared rows, then those of the others by (k, d)
  static constexpr index_t kBlocks = 9;

  double* sums;  // [kBlocks, run + 1, kLanes], the last row for s
  S* moving;     // [2, 3, run + 1, kLanes]

  explicit PatchSums(S* memory)
      : sums(reinterpret_cast<double*>(memory)), moving(memory + 2 * kBlocks * kBlock) {}

  static constexpr index_t edge(index_t k, index_t d) {
    return 3 + (k == 0 ? d : k == 1 ? 3 + d : 5);
  }

  void clear() const { std::memset(sums, 0, kBlocks * kBlock * sizeof(double)); }

  void flush(const S* from, index_t block) const {
    for (index_t i = 0; i < kBlock; i += kLanes)
      add_wide(sums + block * kBlock + i, load(from + i));
  }

  // The rows of a strip whose first padded row is `band`, of an image of `height` rows of outputs.
  void add_strip(const S* band, index_t row, index_t pixels, index_t begin, index_t end,
                 index_t height) const {
    S *shared = moving, *other = moving + 3 * kBlock;
    std::memset(shared, 0, 3 * kBlock * sizeof(S));
    const index_t stop = end < height ? end : end + 2;
    for (index_t a = begin; a < stop; ++a) {
      const bool inside = a >= 2 && a < height;
      const S* x = band + (a - begin) * row;
      if (!inside) std::memset(other, 0, 3 * kBlock * sizeof(S));
      add_row(x, row, pixels, min_of<index_t>(3, height + 2 - a), inside ? shared : other);
      if (inside) continue;
      for (index_t k = max_of<index_t>(0, a - height + 1); k <= min_of<index_t>(2, a); ++k) {
        for (index_t d = 0; k + d <= 2; ++d) flush(other + d * kBlock, edge(k, d));
      }
    }
    for (index_t d = 0; d < 3; ++d) flush(shared + d * kBlock, d);
  }

  static void add_row(const S* x, index_t row, index_t pixels, index_t rows, S* blocks) {
    if (rows == 3) return add_products<3>(x, row, pixels, blocks);
    if (rows == 2) return add_products<2>(x, row, pixels, blocks);
    return add_products<1>(x, row, pixels, blocks);
  }

  // R_0 ... R_{D - 1} of a row.
  template <int D>
  static void add_products(const S* x, index_t row, index_t pixels, S* blocks) {
    V acc[D][kRun];
#pragma GCC unroll 3
    for (int d = 0; d < D; ++d) {
#pragma GCC unroll 9
      for (int i = 0; i < kRun; ++i) acc[d][i] = load(blocks + d * kBlock + i * kLanes);
    }
    for (index_t q = 0; q < pixels; ++q) {
      V other[D];
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d) other[d] = load(x + d * row + q * C);
#pragma GCC unroll 9
      for (int i = 0; i < kRun; ++i) {
        const V value = splat(x[q * C + i]);
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) acc[d][i] += value * other[d];
      }
    }
#pragma GCC unroll 3
    for (int d = 0; d < D; ++d) {
#pragma GCC unroll 9
      for (int i = 0; i < kRun; ++i) store(blocks + d * kBlock + i * kLanes, acc[d][i]);
    }
    V sum[4] = {};
    index_t q = 0;
    for (; q + 4 <= pixels; q += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] += load(x + (q + j) * C);
    }
    for (; q < pixels; ++q) sum[0] += load(x + q * C);
    S* own = blocks + kRun * kLanes;
    store(own, load(own) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
};

// What a convolution keeps of its patches from the forward pass on: G [patch, patch], s [patch].
struct PatchMoments {
  S *gram, *sums;
  index_t patch;
  PatchMoments(S* saved, index_t inputs)
      : gram(saved), sums(saved + inputs * inputs), patch(inputs) {}

  // From the sums of all parts, `size` elements apart, of `count` patches.
  template <int C>
  void store(S* memory, index_t size, index_t parts, index_t count) const {
    using P = PatchSums<C>;
    double* total = P(memory).sums;
    for (index_t part = 1; part < parts; ++part) {
      const double* other = P(memory + part * size).sums;
      for (index_t i = 0; i < P::kBlocks * P::kBlock; ++i) total[i] += other[i];
    }
    double own[P::kPatch];
    const auto at = [&](index_t k, index_t d, index_t i, index_t j) {
      const index_t place = i * kLanes + j;
      return total[d * P::kBlock + place] + total[P::edge(k, d) * P::kBlock + place];
    };
    for (index_t i = 0; i < P::kPatch; ++i) {
      own[i] = at(i / P::kRun, 0, P::kRun, i % P::kRun);
      sums[i] = S(own[i]);
    }
    for (index_t i = 0; i < P::kPatch; ++i) {
      for (index_t j = 0; j < P::kPatch; ++j) {
        const index_t k = i / P::kRun, l = j / P::kRun;
        const double raw = k <= l ? at(k, l - k, i % P::kRun, j % P::kRun)
                                  : at(l, k - l, j % P::kRun, i % P::kRun);
        gram[i * patch + j] = S(raw - own[i] * own[j] / double(count));
      }
    }
  }

  // out = G w, both [patch, width]
  void multiply(const S* w, index_t width, S* out) const {
    for (index_t c = 0; c < width; c += kLanes) {
      for (index_t i = 0; i < patch; i += 3) {
        V acc[3] = {};
        for (index_t j = 0; j < patch; ++j) {
          const V row = load(w + j * width + c);
#pragma GCC unroll 3
          for (int m = 0; m < 3; ++m) acc[m] += splat(gram[(i + m) * patch + j]) * row;
        }
#pragma GCC unroll 3
        for (int m = 0; m < 3; ++m) FM_KERNELS::store(out + (i + m) * width + c, acc[m]);
      }
    }
  }
};

}  // namespace FM_KERNELS
