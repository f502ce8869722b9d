"""003: what transposing the weights costs, against the product it serves.

Question:
    dx = dy w' reads the weights transposed; the engine transposes them in every
    backward pass, once per task and layer. What part of the pass is that for w
    [40, 40] with 10 samples, w [100, 100] with 4000, and the nine w [64, 64] of a
    convolution at 5 samples of 4 x 4 pixels with all taps inside?

Prediction:
    A transpose of 16 x 16 in registers takes 64 shuffles, one or two a cycle, so some
    50 cycles a block: 40 x 40 has 9 blocks, 450 cycles against 10 * 40 * 3 = 1200 of
    the product, 40%; 100 x 100 has 49 blocks, 2,500 cycles against 4000 * 100 * 7 =
    2.8 million, nothing; nine times 16 blocks are 7,200 cycles against 5 * 16 * 9 * 64
    * 4 = 184,000, 4%.

Outcome:
    AMD EPYC (Zen 4), one core, g++ 12, 2026-11-24; two processes: 259 to 289 ns
    against 386 to 448 of the product, 64 to 67%; 1.4 to 1.6 us against 0.91 to 0.92
    ms, 0.2%; 4.5 to 4.8 us against 57 to 58 us, 8%. Some twice the prediction where it
    matters: partial blocks are masked, and stores of 16 rows go to 16 cache lines.

Decision:
    Worth removing for small products: transpose once per task and step for both
    adjoint passes, or read w itself in a kernel that sums over outputs. Not worth a
    thought for the policy.
"""

from common import run

SOURCE = r"""
template <int Step, int... I>
inline void swap_quarters(V& a, V& b, std::integer_sequence<int, I...>) {
  const V upper = __builtin_shufflevector(a, b, (I & Step ? 16 + I - Step : I)...);
  b = __builtin_shufflevector(a, b, (I & Step ? 16 + I : I + Step)...);
  a = upper;
}

template <int Step>
inline void steps(V (&v)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (!(i & Step)) {
      swap_quarters<Step>(v[i], v[i + Step], std::make_integer_sequence<int, 16>{});
    }
  }
  if constexpr (Step > 1) steps<Step / 2>(v);
}

inline __mmask16 first(long n) { return n >= 16 ? 0xffff : (1u << n) - 1u; }

void transpose(const float* src, long rows, long columns, float* dst) {
  for (long r = 0; r < rows; r += 16) {
    for (long c = 0; c < columns; c += 16) {
      V v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const float* row = src + (r + i) * columns + c;
        const __mmask16 mask = first(columns - c);
        v[i] = r + i < rows ? V(_mm512_maskz_loadu_ps(mask, row)) : V{};
      }
      steps<8>(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (c + i < columns) {
          float* to = dst + (c + i) * rows + r;
          _mm512_mask_storeu_ps(to, first(rows - r), __m512(v[i]));
        }
      }
    }
  }
}

template <int M, int L>
void tile(const float* x, const float* w, float* y, long K, long C, __mmask16 mask) {
  V acc[M][L];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < L; ++n) {
      const __mmask16 part = n == L - 1 ? mask : 0xffff;
      acc[m][n] = V(_mm512_maskz_loadu_ps(part, y + m * C + n * 16));
    }
  }
  for (long k = 0; k < K; ++k) {
    V row[L];
#pragma GCC unroll 2
    for (int n = 0; n < L; ++n) {
      row[n] = V(_mm512_maskz_loadu_ps(n == L - 1 ? mask : 0xffff, w + k * C + n * 16));
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V value = x[m * K + k] - V{};
#pragma GCC unroll 2
      for (int n = 0; n < L; ++n) acc[m][n] += value * row[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < L; ++n) {
      float* to = y + m * C + n * 16;
      _mm512_mask_storeu_ps(to, n == L - 1 ? mask : 0xffff, __m512(acc[m][n]));
    }
  }
}

// y += x w, x [rows, K], w [K, C]
template <int M>
void product(const float* x, const float* w, float* y, long rows, long K, long C) {
  for (long r = 0; r + M <= rows; r += M) {
    for (long c = 0; c < C; c += 32) {
      const float* from = x + r * K;
      float* to = y + r * C + c;
      if (C - c > 16) tile<M, 2>(from, w + c, to, K, C, first(C - c - 16));
      else tile<M, 1>(from, w + c, to, K, C, first(C - c));
    }
  }
}

template <int M>
void show(const char* name, long rows, long n, int taps, int repeats) {
  Floats x(rows * n), w(taps * n * n), t(taps * n * n), y(rows * n);
  const double turn = best(repeats, [&] {
    for (int i = 0; i < taps; ++i) transpose(w.p + i * n * n, n, n, t.p + i * n * n);
  });
  const double multiply = best(repeats, [&] {
    for (int i = 0; i < taps; ++i) product<M>(x, t.p + i * n * n, y, rows, n, n);
  });
  std::printf("%-26s transpose %9.0f ns, product %9.0f ns: %5.1f%%\n", name, 1e9 * turn,
              1e9 * multiply, 100 * turn / multiply);
}

int main() {
  show<10>("40 x 40, 10 rows", 10, 40, 1, 20000);
  show<10>("100 x 100, 4000 rows", 4000, 100, 1, 20);
  show<10>("9 times 64 x 64, 80 rows", 80, 64, 9, 500);
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
