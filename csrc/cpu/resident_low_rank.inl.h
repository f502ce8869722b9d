// The last inner step of a stage with few samples, whose product is never formed. With its x and d
// of support and query (q), at theta = theta_{K-1} and a its rate,
//
//   theta_K  = theta - a x^T d      xq w_K   = xq w - a G d        dq w_K^T = dq w^T - a D x
//   lambda_K = xq^T dq              x lambda = G^T dq              d lambda^T = D^T xq
//
// where G = xq x^T and D = dq d^T have as many rows and columns as there are samples. The chain
// step adds xq^T dq to what it stores, so that lambda_K is not formed either.

namespace FM_KERNELS {

struct LowRank {
  index_t support, query;          // samples
  index_t support_row, query_row;  // the same, in whole vectors

  LowRank(index_t support, index_t query)
      : support(support),
        query(query),
        support_row(align_up(support, kLanes)),
        query_row(align_up(query, kLanes)) {}

  // Elements of a Gram matrix and of its transpose, and of the scratch that making them takes.
  index_t gram() const { return query * support_row; }
  index_t transposed() const { return align_up(support, 4) * query_row; }
  index_t scratch(index_t columns) const { return align_up(columns, 4) * support_row; }

  // gram [Q, S] = q x^T of rows of `columns` elements, `row` apart, and its transpose
  void grams(const S* q, const S* x, index_t columns, index_t row, S* scratch, S* gram,
             S* transposed) const {
    transpose_rows(x, row, support, columns, scratch, support_row);
    RowsProduct product{query, support_row, columns, {}, row, 1, gram, {}, {}};
    product.operands.add(q, scratch);
    rows_product<false>(product);
    if (transposed) transpose_rows(gram, support_row, query, support, transposed, query_row);
  }

  ScaledOperands of_query(const S* gram, const S* other, S scale) const {
    return scaled(gram, other, support, support_row, scale);
  }
  ScaledOperands of_support(const S* transposed, const S* other, S scale) const {
    return scaled(transposed, other, query, query_row, scale);
  }

 private:
  static ScaledOperands scaled(const S* a, const S* b, index_t depth, index_t row, S scale) {
    ScaledOperands first;
    first.operands.add(a, b);
    first.depth = depth;
    first.stride = row;
    first.scale = scale;
    return first;
  }

  // dst[c, r] = src[r, c]; rows of dst are written in whole vectors, up to three more of them, and
  // rows of src are read in whole quarters of a vector.
  static void transpose_rows(const S* src, index_t src_row, index_t rows, index_t columns, S* dst,
                             index_t dst_row) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) {
      for (index_t r = 0; r < rows; r += kLanes) {
        const index_t height = min_of(kLanes, rows - r);
        for (index_t c = 0; c < columns; c += 4) {
          transpose_quarters(src + r * src_row + c, src_row, height, dst + c * dst_row + r,
                             dst_row);
        }
      }
      return;
    }
#endif
    for (index_t r = 0; r < rows; r += kLanes) {
      for (index_t c = 0; c < columns; c += kLanes) {
        const index_t height = min_of(kLanes, rows - r), width = min_of(kLanes, columns - c);
        V v[kLanes];
#pragma GCC unroll 16
        for (index_t i = 0; i < kLanes; ++i) {
          const S* from = src + (r + i) * src_row + c;
          v[i] = i >= height ? V{} : width < kLanes ? load_first(from, width) : load(from);
        }
        transpose_steps<int(kLanes) / 2>(v);
#pragma GCC unroll 16
        for (index_t i = 0; i < kLanes; ++i) {
          if (i < width) store(dst + (c + i) * dst_row + r, v[i]);
        }
      }
    }
  }

#if defined(__AVX512F__)
  // Four columns: quarter q of v[i] is row 4 q + i, so that nothing has to cross quarters.
  static void transpose_quarters(const S* src, index_t src_row, index_t rows, S* dst,
                                 index_t dst_row) {
    __m512 v[4] = {};
#pragma GCC unroll 16
    for (index_t r = 0; r < kLanes; ++r) {
      if (r >= rows) break;
      const __m128 four = _mm_loadu_ps(reinterpret_cast<const float*>(src + r * src_row));
      v[r % 4] = _mm512_mask_broadcast_f32x4(v[r % 4], __mmask16(0xf << (r / 4 * 4)), four);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    store(dst, V(_mm512_unpacklo_pd(a, c)));
    store(dst + dst_row, V(_mm512_unpackhi_pd(a, c)));
    store(dst + 2 * dst_row, V(_mm512_unpacklo_pd(b, d)));
    store(dst + 3 * dst_row, V(_mm512_unpackhi_pd(b, d)));
  }
#endif
};

}  // namespace FM_KERNELS
