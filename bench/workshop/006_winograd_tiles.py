"""The products of Winograd's filtering: which tile, and how many tiles at a time?

Question:
F(2x2, 3x3) takes 16 multiply-adds for the direct algorithm's 36. How much of that is
left when 16 products of matrices 32 deep and the transforms are paid, and in which
blocks?

Prediction:
with 32 channels a tile's products take 1024 vector operations, 512 cycles, and the
transforms about 100: 1.7 to 1.9 times as fast as direct. Dense layers' tiles will do.

Outcome:
(AMD EPYC, one core, AVX-512, float32, 2026-11-24; -march=native) A tile of 2 x 2
outputs and 32 channels, 42 x 42 images, nanoseconds; 122 are the multiply-adds:

    direct 261-272, weight gradient 263-280
    dense layers' tiles: products 176, forward 219, weight gradient 200
    tiles without an epilogue: products 128, forward 173, weight gradient 167
    input transform 22, output transform 17, adjoint's transform 18
    blocks of 12, 24, 48 tiles: forward 180, 173, 172; weight gradient 192, 167, 167

64 channels: direct 1028, forward 579. So 1.5 to 1.8, not 1.7 to 1.9: the epilogue of
dense layers' tiles, asked about at run time, cost 40% of a product so short. The whole
MiniImagenet meta-gradient gained less, 274 to 222 ms on two cores.

Decision:
tiles of their own (cpu/winograd_product.inl.h), blocks of 24 tiles.

The code times products of 24 x 32 x 32 with such a tile, bare and with flags that are
asked about for each vector, as dense layers' tiles do.

    python bench/workshop/006_winograd_tiles.py
"""

from __future__ import annotations

import common

SOURCE = r"""
struct Options { bool relu; const float *mask, *base; float scale; };

template <bool Asks>
__attribute__((noinline)) void tile(const float* a, long row, const float* b, float* c,
                                    const Options& o) {
  V acc[12][2] = {};
  for (long k = 0; k < 32; ++k, ++a, b += 32) {
    const V r0 = *(const V*)b, r1 = *(const V*)(b + 16);
#pragma GCC unroll 12
    for (int m = 0; m < 12; ++m) {
      const V v = a[m * row] - V{};
      acc[m][0] += v * r0;
      acc[m][1] += v * r1;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < 12; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      V v = acc[m][n];
      const long at = 32 * m + 16 * n;
      if (Asks) {
        if (o.relu) v = v < V{} ? V{} : v;
        if (o.mask) v = *(const V*)(o.mask + at) > V{} ? v : V{};
        if (o.base) v = *(const V*)(o.base + at) + o.scale * v;
        else if (o.scale != 1.0f) v = o.scale * v;
      }
      *(V*)(c + at) = v;
    }
  }
}

int main() {
  Floats a(16 * 24 * 32), b(16 * 32 * 32), c(16 * 24 * 32);
  const Options o{false, nullptr, nullptr, 1.0f};
  const auto all = [&](auto fn) {
    return best(200, [&] {
      for (long p = 0; p < 16; ++p)
        for (long t = 0; t < 24; t += 12)
          fn(a + (p * 24 + t) * 32, 32, b + p * 1024, c + (p * 24 + t) * 32, o);
    }) / 24 * 1e9;
  };
  std::printf("bare %.0f ns a tile, asking %.0f\n", all(tile<false>), all(tile<true>));
}
"""

if __name__ == "__main__":
    print(common.run(SOURCE), end="")
