"""005: padded rows and paired tails for the small products of a resident task.

Question:
    A task of the sinusoid's network is 14 products of 10 samples with 40 x 40 weights.
    The tiles behind Linear mask what is left of a row behind its last whole vector, in
    a half vector of its own per row. If rows are padded to half vectors, nothing is
    masked, and the half vectors of two rows can share a register: 2.5 multiply-adds a
    row and input instead of 3. What do the two products gain, y [10, 40] = x w and
    dw [40, 40] = base + s x' dy? (001 found no gain in paired tails where 512 bits take
    two halves; does it hold where they take one?)

Prediction:
    Where two 512-bit multiply-adds start each cycle, 2.5 against 3 is a sixth of the
    time, and one tile of 10 rows loads w once instead of twice: 127 ns become 105 for
    y. For dw, half of the difference again, since stores weigh more. Blending two
    broadcasts costs a slot of the other two vector units, which are idle.

Outcome:
    AMD EPYC (Zen 5, 285 GFLOP/s of multiply-adds a core), g++ 12, 2026-11-24, one
    process of this file: 143 ns masked, 120 ns paired, 114 if nothing but the
    multiply-adds took time. The engine's own functions, epilogues and tile tables
    included: y 166 ns masked and 127 paired, dw 228 and 150. Some more than predicted.
    Whole meta-gradient, 25 tasks, one thread: 107 us before, 69 with these products,
    transposes that are updated instead of made, and no passes in between; for K = 5
    385 and 281.

Decision:
    Tasks that fit run in one call over padded rows (csrc/cpu/resident.inl.h); others
    keep the dense tiles. This experiment repeats the tile alone, paired and masked.
"""

from common import run

SOURCE = r"""
constexpr int R = 10, C = 40, K = 40;

inline H first8(const float* p) { return H(_mm256_maskz_loadu_ps(0xff, p)); }
inline void put8(float* p, H v) { _mm256_mask_storeu_ps(p, 0xff, __m256(v)); }
inline V twice(const float* p) {
  return V(_mm512_broadcast_f64x4(_mm256_loadu_pd((const double*)p)));
}
inline V halves(V low, V high) {
  return V(_mm512_mask_blend_pd(0xf0, __m512d(low), __m512d(high)));
}
inline V load(const float* p) { return *(const V*)p; }

// M rows by 2 vectors and a masked half vector, as the tiles behind Linear
template <int M>
__attribute__((noinline)) void masked(const float* x, const float* w, float* y) {
  V a[M][2] = {};
  H last[M] = {};
  for (int k = 0; k < K; ++k, ++x, w += C) {
    const V b0 = load(w), b1 = load(w + 16);
    const H b2 = first8(w + 32);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V v = x[m * K] - V{};
      a[m][0] += v * b0;
      a[m][1] += v * b1;
      last[m] += H(_mm512_castps512_ps256(__m512(v))) * b2;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m, y += C) {
    *(V*)y = a[m][0];
    *(V*)(y + 16) = a[m][1];
    put8(y + 32, last[m]);
  }
}

// M rows by 2 vectors, the half vectors of two rows in one register
template <int M>
__attribute__((noinline)) void paired(const float* x, const float* w, float* y) {
  V a[M][2] = {}, last[M / 2] = {};
  for (int k = 0; k < K; ++k, ++x, w += C) {
    const V b0 = load(w), b1 = load(w + 16), b2 = twice(w + 32);
    V before{};
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V v = x[m * K] - V{};
      a[m][0] += v * b0;
      a[m][1] += v * b1;
      if (m % 2) last[m / 2] += halves(before, v) * b2;
      before = v;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    float* row = y + m * C;
    *(V*)row = a[m][0];
    *(V*)(row + 16) = a[m][1];
    const __m512d tail = __m512d(last[m / 2]);
    const __m256d high = _mm512_extractf64x4_pd(tail, 1);
    _mm256_storeu_pd((double*)(row + 32), m % 2 ? high : _mm512_castpd512_pd256(tail));
  }
}

int main() {
  Floats x(R * K), w(K * C), y(R * C);
  const double a = best(100000, [&] {
    masked<5>(x, w, y);
    masked<5>(x + 5 * K, w, y + 5 * C);
  });
  const double b = best(100000, [&] { paired<10>(x, w, y); });
  std::printf("two tiles of 5 rows, masked: %.0f ns\n", 1e9 * a);
  std::printf("one tile of 10 rows, paired: %.0f ns\n", 1e9 * b);
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
