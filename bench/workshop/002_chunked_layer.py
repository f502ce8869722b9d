"""002: a 4,000-sample policy layer through the cache in chunks.

Question:
    Activations of the policy's hidden layers are [4000, 100], 1.6 MB each: more than a
    second-level cache of 1 MB. A forward pass of two layers with a ReLU behind each
    writes four of them and reads three back. How much faster is it if all four steps
    take 250, 500 or 1000 samples at a time?

Prediction:
    The two products are 160 million operations, 1.5 ms at 107 GFLOP/s. Seven times
    1.6 MB come from the third-level cache or memory if taken whole: at 20 GB/s a core
    0.56 ms, half of it hidden behind the products. So chunks of 250 and 500 (0.1 and
    0.2 MB an array) gain some 15%, 1000 (0.4 MB an array) less.

Outcome:
    AMD EPYC (Zen 4, 32 MB third-level cache), one core alone, g++ 12, 2026-11-24; two
    processes, milliseconds: chunks of 240 2.46 and 2.46, of 504 2.40 and 2.51, of 996
    2.30 and 2.41, of 2004 2.34 and 2.44, all at once 2.39 and 2.20. No gain; the
    prediction is wrong. The third-level cache gives a core 80 to 100 GB/s here, not
    20, so the arrays cost 0.1 ms and hide behind the products.

Decision:
    Don't cut a layer's samples into chunks for the forward pass while one task's
    arrays fit the third-level cache. Not answered: both cores at once, and the tangent
    passes, which hold twice the arrays.
"""

from common import run

SOURCE = r"""
constexpr long N = 4000, C = 100;

// y [rows, 100] = x [rows, 100] w [100, 100] in tiles of 12 x 2 vectors, then masked
template <int M, int L>
void tile(const float* x, const float* w, float* y, __mmask16 mask) {
  V acc[M][L] = {};
  for (long k = 0; k < C; ++k) {
    V row[L];
#pragma GCC unroll 2
    for (int n = 0; n < L - 1; ++n) {
      row[n] = *reinterpret_cast<const V*>(w + k * C + n * 16);
    }
    row[L - 1] = V(_mm512_maskz_loadu_ps(mask, w + k * C + (L - 1) * 16));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V value = x[m * C + k] - V{};
#pragma GCC unroll 2
      for (int n = 0; n < L; ++n) acc[m][n] += value * row[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < L - 1; ++n) {
      *reinterpret_cast<V*>(y + m * C + n * 16) = acc[m][n];
    }
    _mm512_mask_storeu_ps(y + m * C + (L - 1) * 16, mask, __m512(acc[m][L - 1]));
  }
}

template <int M>
void rows_of(const float* x, const float* w, float* y) {
  for (long c = 0; c + 32 <= C; c += 32) tile<M, 2>(x, w + c, y + c, 0xffff);
  tile<M, 1>(x, w + 96, y + 96, 0xf);
}

void product(const float* x, const float* w, float* y, long rows) {
  long r = 0;
  for (; r + 12 <= rows; r += 12) rows_of<12>(x + r * C, w, y + r * C);
  for (; r < rows; ++r) rows_of<1>(x + r * C, w, y + r * C);
}

void relu(const float* x, float* y, long n) {
  for (long i = 0; i < n; i += 16) {
    const V v = *reinterpret_cast<const V*>(x + i);
    *reinterpret_cast<V*>(y + i) = v > 0.0f ? v : V{};
  }
}

int main() {
  Floats w1(C * C, 0.01f), w2(C * C, 0.01f);
  Floats x(N * C), a(N * C), b(N * C), c(N * C), d(N * C);
  // multiples of a tile's 12 rows, so that chunks differ in nothing else
  for (long chunk : {240L, 504L, 996L, 2004L, 4000L}) {
    const double s = best(20, [&] {
      for (long at = 0; at < N; at += chunk) {
        const long o = at * C, rows = std::min(chunk, N - at);
        product(x.p + o, w1, a.p + o, rows);
        relu(a.p + o, b.p + o, rows * C);
        product(b.p + o, w2, c.p + o, rows);
        relu(c.p + o, d.p + o, rows * C);
      }
    });
    std::printf("chunks of %4ld: %6.3f ms, %6.1f GFLOP/s\n", chunk, 1e3 * s,
                4.0 * N * C * C / s / 1e9);
  }
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
