"""009: the last 4 of 100 columns, with lanes along the inputs.

Question:
    Intel's processors have two 512-bit units that do all vector arithmetic, blends
    included. 007's quarter tails issue 1 multiply-add and 3 blends for four rows: as
    much as four masked vectors. An operation of 16 lanes has room for 4 columns times
    4 inputs. Then a sample's inputs are read as they lie, 4 at a time and repeated for
    each column; the 4 x 4 block of weights is turned once for 12 rows, and the lanes of
    a column are added up at the end. What is gained?

Prediction:
    For each row and 4 inputs 1 multiply-add and a third of a shuffle, instead of 4: a
    product 100 wide takes 6.33 operations a row and input and not 7, so 10% less on
    Intel. Nothing on Zen 5, whose other two units do the blends; nor a loss there.

Outcome:
    Intel Xeon (Emerald Rapids, 171 GFLOP/s of multiply-adds a core), g++ 12,
    2026-11-28, on a busy machine, the best of 3,000 short tries, two processes: half
    vectors 26.5 and 24.7 us, quarters 25.0 and 24.8, along the inputs 23.1 and 23.2:
    7% less than either. Of the table's other way, half vectors, 001 measures here what
    it did not on Zen 4: beside whole vectors they run at 60% (391 ns against 238 masked
    and 223 in pairs), and 007's quarters gain nothing over them. Not run on Zen 5.

Decision:
    Outputs' tails of any width take lanes along the inputs, and weight gradients' lanes
    along the rows, which lie side by side (csrc/cpu/dense_tail.inl.h). No half vectors
    and no blends. A column of a tail is then four chains added up.
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

// 12 rows of the last 4 columns: lanes are 4 inputs of each column
__attribute__((noinline)) void along_inputs(const float* x, const float* w, float* y) {
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  V a[12] = {};
  for (int k = 0; k < K; k += 4, x += 4, w += 4 * C) {
    const auto two = [&](int i) {
      return _mm256_set_m128(_mm_loadu_ps(w + (i + 1) * C), _mm_loadu_ps(w + i * C));
    };
    const __m512 rows = _mm512_insertf32x8(_mm512_castps256_ps512(two(0)), two(2), 1);
    const V columns = V(_mm512_permutexvar_ps(order, rows));
#pragma GCC unroll 12
    for (int m = 0; m < 12; ++m) {
      a[m] += V(_mm512_broadcast_f32x4(_mm_loadu_ps(x + m * K))) * columns;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < 12; ++m) {
    const __m512 v = _mm512_add_ps(__m512(a[m]), _mm512_permute_ps(__m512(a[m]), 0x4e));
    const __m512 sums = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
    _mm_storeu_ps(y + m * C,
                  _mm512_castps512_ps128(_mm512_permutexvar_ps(order, sums)));
  }
}

void product_along(const float* x, const float* w, float* y) {
  for (int c = 0; c < 96; c += 32) {
    for (int n = 0; n < N; n += 12) plain<12>(x + n * K, w + c, y + n * C + c);
  }
  for (int n = 0; n < N; n += 12) along_inputs(x + n * K, w + 96, y + n * C + 96);
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
  const double c = best(2000, [&] { product_along(x, w, y); });
  std::printf("tails along the inputs:         %.2f us\n", 1e6 * c);
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
