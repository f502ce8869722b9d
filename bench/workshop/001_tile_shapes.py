"""001: register tiles for a product 40 columns wide.

Question:
    The hidden layer of the sinusoid's network is y [10, 40] = x [10, 40] w [40, 40]:
    40 columns are two and a half vectors of 16. Which way of taking the half is the
    fastest on AVX-512? (a) As the engine does, tiles of up to 12 rows by 2 vectors,
    then by 1 masked vector. (b) Tiles of 5 rows by 3 vectors, the third masked, so
    that x is broadcast once for all columns; and of 10 rows, which spills. (c) 5 rows
    by 2 vectors and a half vector of 8 lanes. (d) 10 rows by 2 vectors, then 5 tails
    of two rows each, both rows in one vector.

Prediction:
    Multiply-adds of 512 bits start once a cycle: (a) and (b) take 3 for each row and
    input, so 10 * 40 * 3 = 1200 cycles of multiply-adds; (c) the same slots unless two
    256-bit ones start together, which would make 2.5, 1000 cycles; (d) 2.5 as well, but
    its shuffled operands cost loads. So (c) is the fastest, some 15% before (b), and
    (a) is last for reading x twice.

Outcome:
    AMD EPYC (Zen 4, 118 GFLOP/s of multiply-adds a core), g++ 12, 2026-11-24; five
    processes, nanoseconds: (a) 355 to 359, (b) 332 to 353, (b', 10 rows) 342 to 358,
    (c) 310 to 362, (d) 354 to 379. Useful work of (a) is 90 GFLOP/s, with the masked
    lanes counted 108: it already runs at 92% of what its multiply-adds allow. (c) wins
    in two processes of five and loses in the others: the 256-bit ones pair up only
    sometimes. (d) is never better. The prediction holds for the order of (b) and (a),
    at half the difference, and not for (c).

Decision:
    A narrower tail is not worth kernels of its own; 3 vectors wide with 5 rows, some
    3% better, may come for free with a wider tile. What is lost at 40 columns is the
    masked half vector, a sixth, and no tile shape got it back reliably.
"""

from common import run

SOURCE = r"""
constexpr int R = 10, C = 40, K = 40;

inline V first8(const float* p) { return V(_mm512_maskz_loadu_ps(0xff, p)); }
inline void put8(float* p, V v) { _mm512_mask_storeu_ps(p, 0xff, __m512(v)); }

// M rows by N vectors, the last of them masked to 8 lanes if Tail.
template <int M, int N, bool Tail>
void tile(const float* x, const float* w, float* y) {
  V acc[M][N] = {};
  for (int k = 0; k < K; ++k) {
    V row[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      const float* p = w + k * C + n * 16;
      row[n] = Tail && n == N - 1 ? first8(p) : *reinterpret_cast<const V*>(p);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V value = x[m * K + k] - V{};
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      float* p = y + m * C + n * 16;
      if (Tail && n == N - 1) put8(p, acc[m][n]);
      else *reinterpret_cast<V*>(p) = acc[m][n];
    }
  }
}

// M rows by two vectors and a half one.
template <int M>
void half_tile(const float* x, const float* w, float* y) {
  V acc[M][2] = {};
  H tail[M] = {};
  for (int k = 0; k < K; ++k) {
    const V a = *reinterpret_cast<const V*>(w + k * C);
    const V b = *reinterpret_cast<const V*>(w + k * C + 16);
    const H c = *reinterpret_cast<const H*>(w + k * C + 32);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V value = x[m * K + k] - V{};
      acc[m][0] += value * a;
      acc[m][1] += value * b;
      tail[m] += (x[m * K + k] - H{}) * c;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    *reinterpret_cast<V*>(y + m * C) = acc[m][0];
    *reinterpret_cast<V*>(y + m * C + 16) = acc[m][1];
    *reinterpret_cast<H*>(y + m * C + 32) = tail[m];
  }
}

// Tails of P pairs of rows: the lower half of a vector is one row, the upper the next.
template <int P>
void paired_tails(const float* x, const float* w, float* y) {
  V acc[P] = {};
  for (int k = 0; k < K; ++k) {
    const V row = V(_mm512_broadcast_f32x8(_mm256_loadu_ps(w + k * C + 32)));
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512 lower = _mm512_set1_ps(x[2 * p * K + k]);
      const __m512 both = _mm512_mask_broadcastss_ps(
          lower, 0xff00, _mm_load_ss(x + (2 * p + 1) * K + k));
      acc[p] += V(both) * row;
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    _mm256_storeu_ps(y + 2 * p * C + 32, _mm512_castps512_ps256(__m512(acc[p])));
    const __m256 upper = _mm512_extractf32x8_ps(__m512(acc[p]), 1);
    _mm256_storeu_ps(y + (2 * p + 1) * C + 32, upper);
  }
}

int main() {
  Floats x(R * K), w(K * C), y(R * C);
  const double operations = 2.0 * R * C * K;
  const auto show = [&](const char* name, double s) {
    std::printf("%-34s %7.1f ns %6.1f GFLOP/s\n", name, 1e9 * s, operations / s / 1e9);
  };
  show("(a) 10 x 2, then 10 x 1 masked", best(20000, [&] {
    tile<10, 2, false>(x, w, y);
    tile<10, 1, true>(x, w.p + 32, y.p + 32);
  }));
  show("(b) 5 x 3, third masked", best(20000, [&] {
    for (int r = 0; r < R; r += 5) tile<5, 3, true>(x.p + r * K, w, y.p + r * C);
  }));
  show("(b') 10 x 3, third masked", best(20000, [&] { tile<10, 3, true>(x, w, y); }));
  show("(c) 5 x 2 and half vectors", best(20000, [&] {
    for (int r = 0; r < R; r += 5) half_tile<5>(x.p + r * K, w, y.p + r * C);
  }));
  show("(d) 10 x 2, tails in pairs", best(20000, [&] {
    tile<10, 2, false>(x, w, y);
    paired_tails<5>(x, w, y);
  }));
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
