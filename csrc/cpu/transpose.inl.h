// Transposes and sums of lanes, in registers.

namespace FM_KERNELS {

// One step of a transpose in registers: swaps the off-diagonal quarters of every block of 2 Step
// rows and columns. After steps L/2, ..., 2, 1 the vectors hold the transpose.
template <int Step, int... I>
FM_INLINE void swap_quarters(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int L = int(kLanes);
  const V upper = __builtin_shufflevector(a, b, (I & Step ? L + I - Step : I)...);
  b = __builtin_shufflevector(a, b, (I & Step ? L + I : I + Step)...);
  a = upper;
}

template <int Step>
FM_INLINE void transpose_steps(V (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < int(kLanes); ++i) {
    if (!(i & Step)) {
      swap_quarters<Step>(v[i], v[i + Step], std::make_integer_sequence<int, int(kLanes)>{});
    }
  }
  if constexpr (Step > 1) transpose_steps<Step / 2>(v);
}

// A block of up to kLanes x kLanes; both sides have rows of the given strides.
template <bool Partial>
FM_INLINE void transpose_block(const S* src, index_t src_stride, index_t rows, index_t columns,
                               S* dst, index_t dst_stride) {
  V v[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < int(kLanes); ++r) {
    v[r] = !Partial           ? load(src + r * src_stride)
           : r >= rows        ? V{}
           : columns < kLanes ? load_first(src + r * src_stride, columns)
                              : load(src + r * src_stride);
  }
  transpose_steps<int(kLanes) / 2>(v);
#pragma GCC unroll 16
  for (int c = 0; c < int(kLanes); ++c) {
    if (!Partial) {
      store(dst + c * dst_stride, v[c]);
    } else if (c < columns) {
      if (rows < kLanes) {
        store_first(dst + c * dst_stride, v[c], rows);
      } else {
        store(dst + c * dst_stride, v[c]);
      }
    }
  }
}

// Lane i of v[0] becomes the sum of the lanes of v[i], added in halves.
template <int Step>
FM_INLINE void sum_each(V (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < Step; ++i) {
    swap_quarters<Step>(v[i], v[i + Step], std::make_integer_sequence<int, int(kLanes)>{});
    v[i] += v[i + Step];
  }
  if constexpr (Step > 1) sum_each<Step / 2>(v);
}

// dst[c, r] = src[r, c], whose rows are `dst_row` and `src_row` apart
inline void transpose(const S* FM_RESTRICT src, index_t src_row, index_t rows, index_t columns,
                      S* FM_RESTRICT dst, index_t dst_row) {
  for (index_t r = 0; r < rows; r += kLanes) {
    for (index_t c = 0; c < columns; c += kLanes) {
      const index_t height = min_of(kLanes, rows - r), width = min_of(kLanes, columns - c);
      const S* from = src + r * src_row + c;
      S* to = dst + c * dst_row + r;
      if (height == kLanes && width == kLanes) {
        transpose_block<false>(from, src_row, height, width, to, dst_row);
      } else {
        transpose_block<true>(from, src_row, height, width, to, dst_row);
      }
    }
  }
}

inline void transpose(const S* FM_RESTRICT src, index_t rows, index_t columns, S* FM_RESTRICT dst,
                      index_t dst_row) {
  transpose(src, columns, rows, columns, dst, dst_row);
}

}  // namespace FM_KERNELS
