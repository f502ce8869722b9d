"""007: what is left of a row of 100 columns, four rows to a register.

Question:
    The policy's layers are 100 wide: 6.25 vectors of 16. The tiles behind Linear take
    the last 4 columns in a half vector of its own per row, a multiply-add like any
    other. Vector multiply-adds for each sample, in a register's lanes needed, and
    issued so far:

    | product                                   | needed | issued |
    | ----------------------------------------- | ------ | ------ |
    | 100 -> 100: outputs, adjoints, weights    |  625   |  700   |
    | 20 -> 100: outputs, weights               |  125   |  140   |
    | 100 -> 3: outputs                         |   18.75 | 100   |
    | 100 -> 3: adjoints, weights (transposed)  |   18.75 |  21   |

    Three quarters of a meta-gradient's time are the first line. What does it gain if
    the tails of four rows share a register, whose factors are blended from the
    broadcasts that the whole vectors use anyway?

Prediction:
    An eighth less where multiply-adds bind (12%), for outputs and weights alike: the
    blends go to the two vector units that don't multiply. Little for 100 -> 3, which
    reads a broadcast for every multiply-add: it would need sums over inputs instead.

Outcome:
    AMD EPYC (Zen 5, 288 GFLOP/s of multiply-adds a core), g++ 12, 2026-11-24. This
    file: 16.0 us with half vectors, 14.6 with quarters, 192 samples. The engine's
    own functions, epilogues and tile tables included, in one process each, one
    after the other: outputs 17.5 us and 15.4, with two operand pairs 33.9 and 29.3;
    weights 17.9 and 15.8, 34.1 and 30.1; 20 -> 100 4.75 and 4.30; 100 -> 3 2.95 and
    2.75. All bits are the same. Whole meta-gradient of the policy workload, two
    threads, alternated: 133.8 ms and 126.0, 7%.

Decision:
    Tails of up to a quarter of a vector share a register (csrc/cpu/dense.inl.h). Not
    done: sums over inputs for the outputs of 100 -> 3, whose forward passes are some 4%
    of the kernels' time.
"""

from common import run

SOURCE = r"""
constexpr int N = 192, C = 100, K = 100;

inline V load(const float* p) { return *(const V*)p; }

// M rows by two vectors
template <int M>
__attribute__((noinline)) void plain(const float* x, const float* w, float* y) {
  V a[M][2] = {};
  for (int k = 0; k < K; ++k, ++x, w += C) {
    const V b0 = load(w), b1 = load(w + 16);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V v = x[m * K] - V{};
      a[m][0] += v * b0;
      a[m][1] += v * b1;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    *(V*)(y + m * C) = a[m][0];
    *(V*)(y + m * C + 16) = a[m][1];
  }
}

// 8 rows by two vectors and 4 columns: in half vectors, or four rows to a register
template <bool Quarters>
__attribute__((noinline)) void tailed(const float* x, const float* w, float* y) {
  V a[8][2] = {}, shared[2] = {};
  H last[8] = {};
  for (int k = 0; k < K; ++k, ++x, w += C) {
    const V b0 = load(w), b1 = load(w + 16);
    const __m128 four = _mm_loadu_ps(w + 32);
    const V b2 = V(_mm512_broadcast_f32x4(four));
    V factor{};
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) {
      const V v = x[m * K] - V{};
      a[m][0] += v * b0;
      a[m][1] += v * b1;
      if (Quarters) {
        const __mmask16 place = __mmask16(0xf << (m % 4 * 4));
        factor = m % 4 ? V(_mm512_mask_blend_ps(place, __m512(factor), __m512(v))) : v;
        if (m % 4 == 3) shared[m / 4] += factor * b2;
      } else {
        const H half = H(_mm256_zextps128_ps256(four));
        last[m] += H(_mm512_castps512_ps256(__m512(v))) * half;
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < 8; ++m) {
    float* row = y + m * C;
    *(V*)row = a[m][0];
    *(V*)(row + 16) = a[m][1];
    if (Quarters) {
      for (int i = 0; i < 4; ++i) row[32 + i] = shared[m / 4][m % 4 * 4 + i];
    } else {
      _mm_storeu_ps(row + 32, _mm256_castps256_ps128(__m256(last[m])));
    }
  }
}

template <bool Quarters>
void product(const float* x, const float* w, float* y) {
  for (int c = 0; c < 64; c += 32) {
    for (int n = 0; n < N; n += 12) plain<12>(x + n * K, w + c, y + n * C + c);
  }
  for (int n = 0; n < N; n += 8) tailed<Quarters>(x + n * K, w + 64, y + n * C + 64);
}

int main() {
  Floats x(N * K), w(K * C), y(N * C);
  const double a = best(2000, [&] { product<false>(x, w, y); });
  const double b = best(2000, [&] { product<true>(x, w, y); });
  std::printf("tails in half vectors:          %.2f us\n", 1e6 * a);
  std::printf("tails of four rows, a register: %.2f us\n", 1e6 * b);
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
