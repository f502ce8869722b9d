// Products of patches with one adjoint per pooling window: that of the window's winner.
//
// Pooling lets through one pixel of four, another one in each channel. The patches that the four
// see lie in four rows of a few elements, and a permutation of two such rows takes from them, for
// each channel, one element of its own winner's patch:
//
//   outputs    t[c]          = bias[c] + sum over ky and i of patch_c[ky, i] w[ky, i, c]
//   gradient   dw[ky, i, c] += patch_c[ky, i] h[c]
//
// with patch_c[ky, i] = row_{ky + dy}[i + dx C] for the winner (dy, dx) of channel c. What is saved
// of a winner is its place dy kLanes + dx C, a byte. Windows of 2 x 2, kernels of 3 x 3.

namespace FM_KERNELS {

// Whether this target has such permutations, of rows of four pixels.
#if defined(__AVX512F__)
constexpr bool kPermutes = sizeof(S) == 4;
#else
constexpr bool kPermutes = false;
#endif

#if defined(__AVX512F__)
// Lane l is element at[l] of the two vectors behind each other.
FM_INLINE V permute_pair(V first, VI at, V second) {
  if constexpr (sizeof(S) == 4) {
    return V(_mm512_permutex2var_ps(__m512(first), __m512i(at), __m512(second)));
  } else {
    return V(_mm512_permutex2var_pd(__m512d(first), __m512i(at), __m512d(second)));
  }
}
FM_INLINE VI load_places(const std::uint8_t* p) {
  return VI(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FM_INLINE void store_places(std::uint8_t* p, VI at) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(at)));
}
#else
FM_INLINE V permute_pair(V first, VI, V) { return first; }
FM_INLINE VI load_places(const std::uint8_t*) { return VI{}; }
FM_INLINE void store_places(std::uint8_t*, VI) {}
#endif

// A strip: windows side by side, 2 C elements of x apart; places `outputs` apart.
struct WinnerStrip {
  const S* x;  // first of four rows
  index_t row, windows, outputs, width;
  const std::uint8_t* places;
};

// kWide windows from the w-th on: t [.., outputs]
template <int C, int kWide>
FM_INLINE void winner_outputs(const WinnerStrip& s, index_t w, const S* panel, S* t) {
  V rows[kWide][4], acc[kWide][3];
  VI at[kWide];
#pragma GCC unroll 4
  for (int v = 0; v < kWide; ++v) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) rows[v][r] = load(s.x + r * s.row + (w + v) * 2 * C);
    at[v] = load_places(s.places + (w + v) * s.outputs);
    acc[v][0] = load(panel + 9 * C * s.width);
    acc[v][1] = acc[v][2] = V{};
  }
#pragma GCC unroll 9
  for (int i = 0; i < 3 * C; ++i) {
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const V weight = load(panel + (k * 3 * C + i) * s.width);
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) {
        acc[v][k] += permute_pair(rows[v][k], at[v], rows[v][k + 1]) * weight;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) at[v] += 1;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kWide; ++v) {
    store(t + (w + v) * s.outputs, acc[v][0] + (acc[v][1] + acc[v][2]));
  }
}

// Adds kernel rows kFirst ... kFirst + kRows - 1 of dw [.., width]; h [windows, width].
template <int C, int kFirst, int kRows>
void winner_gradient(const WinnerStrip& s, const S* h, S* dw) {
  constexpr int kRun = 3 * C;
  V acc[kRows][kRun];
  S* out = dw + kFirst * kRun * s.width;
#pragma GCC unroll 3
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 9
    for (int i = 0; i < kRun; ++i) acc[k][i] = load(out + (k * kRun + i) * s.width);
  }
  const S* x = s.x + kFirst * s.row;
  for (index_t w = 0; w < s.windows; ++w, x += 2 * C) {
    V rows[kRows + 1];
#pragma GCC unroll 4
    for (int r = 0; r <= kRows; ++r) rows[r] = load(x + r * s.row);
    const V value = load(h + w * s.width);
    VI at = load_places(s.places + w * s.outputs);
#pragma GCC unroll 9
    for (int i = 0; i < kRun; ++i) {
#pragma GCC unroll 3
      for (int k = 0; k < kRows; ++k) acc[k][i] += permute_pair(rows[k], at, rows[k + 1]) * value;
      at += 1;
    }
  }
#pragma GCC unroll 3
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 9
    for (int i = 0; i < kRun; ++i) store(out + (k * kRun + i) * s.width, acc[k][i]);
  }
}

}  // namespace FM_KERNELS
