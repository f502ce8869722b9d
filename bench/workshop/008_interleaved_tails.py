"""008: half vectors of two rows, or of two steps, lane by lane.

Question:
    005 puts the half vectors of two rows into the halves of one register, which takes a
    blend of two broadcasts for every two rows and step. On Intel's processors 512-bit
    blends start on the two ports of the multiply-adds. What is gained if the two take
    turns lane by lane? Then a broadcast of two neighbouring elements, which is a load
    and nothing else, multiplies both: of two rows where rows of the left factor are
    adjacent (dw = base + s x' dy), of two steps where steps are (y = x w, in tiles of
    5 rows, since every row then needs a tail of its own). The right factor's tail is
    shuffled once a step, or once in two.

Prediction:
    Ten rows and a step of 40 columns take 25 multiply-adds and 5 blends, 15 cycles.
    Lane by lane dw takes 26 slots, 13 cycles, and y 27 of 30 or, with one shuffle of
    two loads, 26: both some 13% less, on Intel. On Zen 5, where blends start elsewhere,
    nothing.

Outcome:
    Intel Xeon (Emerald Rapids, 171 GFLOP/s of multiply-adds a core), g++ 12,
    2026-11-28, on a busy machine; three processes: y 234, 435 and 277 ns in halves and
    203, 212 and 235 in turn; dw 266, 266 and 264, and 225, 216 and 235. Without the
    435, which others' work must have stretched, 13 to 15% and 11 to 19%, as predicted.
    Not run on Zen 5.

Decision:
    Lane by lane in csrc/cpu/rows.inl.h.
"""

from common import run

SOURCE = r"""
constexpr int C = 40;

inline V load(const float* p) { return *(const V*)p; }
inline V twice(const float* p) {
  return V(_mm512_broadcast_f64x4(_mm256_loadu_pd((const double*)p)));
}
inline V half(const float* p) {
  return V(_mm512_zextpd256_pd512(_mm256_loadu_pd((const double*)p)));
}
inline V halves(V low, V high) {
  return V(_mm512_mask_blend_pd(0xf0, __m512d(low), __m512d(high)));
}
inline V two(const float* p) {
  typedef double Pair __attribute__((aligned(4), may_alias));
  return V(_mm512_set1_pd(*(const Pair*)p));
}
inline V each_twice(V v) {
  return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}
inline V in_turn(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                 7, 23);
}
inline V apart(V v) {
  return __builtin_shufflevector(v, v, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13,
                                 15);
}
inline void put_halves(float* low, float* high, V v) {
  _mm256_storeu_pd((double*)low, _mm512_castpd512_pd256(__m512d(v)));
  _mm256_storeu_pd((double*)high, _mm512_extractf64x4_pd(__m512d(v), 1));
}

// 10 rows; element (m, k) of the left factor is a[m * row + k * step]
template <bool InTurn>
__attribute__((noinline)) void rows(const float* a, long row, long step, long K,
                                    const float* b, float* c) {
  V main[10][2] = {}, last[5] = {};
  for (long k = 0; k < K; ++k, a += step, b += C) {
    const V b0 = load(b), b1 = load(b + 16), tail = twice(b + 32);
    const V b2 = InTurn ? each_twice(tail) : tail;
    V before{};
#pragma GCC unroll 10
    for (int m = 0; m < 10; ++m) {
      const V v = a[m * row] - V{};
      main[m][0] += v * b0;
      main[m][1] += v * b1;
      if (m % 2) last[m / 2] += (InTurn ? two(a + m - 1) : halves(before, v)) * b2;
      before = v;
    }
  }
#pragma GCC unroll 10
  for (int m = 0; m < 10; ++m) {
    *(V*)(c + m * C) = main[m][0];
    *(V*)(c + m * C + 16) = main[m][1];
    const V v = InTurn ? apart(last[m / 2]) : last[m / 2];
    if (m % 2) put_halves(c + (m - 1) * C + 32, c + m * C + 32, v);
  }
}

// 5 rows, steps adjacent
__attribute__((noinline)) void two_steps(const float* a, long row, long K,
                                         const float* b, float* c) {
  V main[5][2] = {}, last[5] = {};
  for (long k = 0; k < K; k += 2, a += 2, b += 2 * C) {
    const V b0 = load(b), b1 = load(b + 16), d0 = load(b + C), d1 = load(b + C + 16);
    const V b2 = in_turn(half(b + 32), half(b + C + 32));
#pragma GCC unroll 5
    for (int m = 0; m < 5; ++m) {
      const V v = a[m * row] - V{}, u = a[m * row + 1] - V{};
      main[m][0] += v * b0;
      main[m][1] += v * b1;
      main[m][0] += u * d0;
      main[m][1] += u * d1;
      last[m] += two(a + m * row) * b2;
    }
  }
#pragma GCC unroll 5
  for (int m = 0; m < 5; ++m) {
    *(V*)(c + m * C) = main[m][0];
    *(V*)(c + m * C + 16) = main[m][1];
    const V v = apart(last[m]);
    const __m256 odd = _mm512_extractf32x8_ps(__m512(v), 1);
    _mm256_storeu_ps(c + m * C + 32, _mm512_castps512_ps256(__m512(v)) + odd);
  }
}

int main() {
  Floats x(10 * C), w(C * C), y(10 * C), dw(C * C);
  const auto show = [](const char* name, double s) {
    std::printf("%-40s %6.0f ns\n", name, 1e9 * s);
  };
  show("y, tails in halves, 10 rows",
       best(5000, [&] { rows<false>(x, C, 1, C, w, y); }));
  show("y, tails of two steps in turn, 5 rows", best(5000, [&] {
    two_steps(x, C, C, w, y);
    two_steps(x + 5 * C, C, C, w, y + 5 * C);
  }));
  show("dw, tails in halves", best(5000, [&] {
    for (int r = 0; r < C; r += 10) rows<false>(x + r, 1, C, 10, y, dw + r * C);
  }));
  show("dw, tails of two rows in turn", best(5000, [&] {
    for (int r = 0; r < C; r += 10) rows<true>(x + r, 1, C, 10, y, dw + r * C);
  }));
}
"""

if __name__ == "__main__":
    print(run(SOURCE), end="")
