// Vectors of parameters: the inner update, the chain and the mean over tasks.

namespace FM_KERNELS {

// Calls body(begin, end, rate) for every segment; rate(i) is the rate of parameter i.
template <class Body>
FM_INLINE void for_rates(const StepRates<S>& rates, Body&& body) {
  for (index_t s = 0; s < rates.segment_count; ++s) {
    const index_t begin = rates.segments[s].offset, end = begin + rates.segments[s].count;
    if (rates.per_parameter) {
      const S* FM_RESTRICT values = rates.per_parameter;
      body(begin, end, [=](index_t i) { return values[i]; });
    } else {
      const S value = rates.per_segment[s];
      body(begin, end, [=](index_t) { return value; });
    }
  }
}

inline void descend(const StepRates<S>& rates, const S* theta, const S* g, S* out) {
  for_rates(rates, [=](index_t begin, index_t end, auto rate) {
    for (index_t i = begin; i < end; ++i) out[i] = theta[i] - rate(i) * g[i];
  });
}

inline void scale_by_rates(const StepRates<S>& rates, const S* v, S* out) {
  for_rates(rates, [=](index_t begin, index_t end, auto rate) {
    for (index_t i = begin; i < end; ++i) out[i] = rate(i) * v[i];
  });
}

inline void segment_dots(const StepRates<S>& rates, const S* g, const S* v, S* out) {
  for (index_t s = 0; s < rates.segment_count; ++s) {
    const index_t begin = rates.segments[s].offset, end = begin + rates.segments[s].count;
    double sum = 0;
    for (index_t i = begin; i < end; ++i) sum += double(g[i]) * double(v[i]);
    out[s] = S(-sum);
  }
}

inline void negative_product(index_t n, const S* g, const S* v, S* out) {
  for (index_t i = 0; i < n; ++i) out[i] = -g[i] * v[i];
}

inline void update(index_t n, const S* base, S alpha, const S* v, S* out) {
  for (index_t i = 0; i < n; ++i) out[i] = (base ? base[i] : S(0)) + alpha * v[i];
}

inline void scale(index_t n, S alpha, const S* v, S* out) {
  for (index_t i = 0; i < n; ++i) out[i] = alpha * v[i];
}

inline void add(index_t n, S alpha, const S* v, S* out) {
  for (index_t i = 0; i < n; ++i) out[i] += alpha * v[i];
}

// Columns [begin, end) of the mean over rows: a block of columns at a time, rows in ascending
// order.
inline void mean_rows(index_t rows, index_t n, index_t begin, index_t end, const S* values,
                      S* out) {
  constexpr index_t kBlock = 32;  // sums that stay in registers
  index_t c = begin;
  for (; c + kBlock <= end; c += kBlock) {
    double sum[kBlock] = {};
    for (index_t t = 0; t < rows; ++t) {
      const S* row = values + t * n + c;
#pragma GCC unroll 32
      for (index_t i = 0; i < kBlock; ++i) sum[i] += double(row[i]);
    }
    for (index_t i = 0; i < kBlock; ++i) out[c + i] = S(sum[i] / double(rows));
  }
  for (; c < end; ++c) {
    double sum = 0;
    for (index_t t = 0; t < rows; ++t) sum += double(values[t * n + c]);
    out[c] = S(sum / double(rows));
  }
}

inline void gather(index_t n, const std::int32_t* index, const S* src, S* dst) {
  if (!index) {
    std::memcpy(dst, src, n * sizeof(S));
    return;
  }
  for (index_t i = 0; i < n; ++i) dst[i] = src[index[i]];
}

inline void scatter(index_t n, const std::int32_t* index, const S* src, S* dst) {
  if (!index) {
    std::memcpy(dst, src, n * sizeof(S));
    return;
  }
  for (index_t i = 0; i < n; ++i) dst[index[i]] = src[i];
}

inline void to_channels_last(index_t n, index_t channels, index_t pixels, const S* src, S* dst) {
  for (index_t i = 0; i < n; ++i) {
    const S* image = src + i * channels * pixels;
    S* out = dst + i * channels * pixels;
    for (index_t p = 0; p < pixels; ++p) {
      for (index_t c = 0; c < channels; ++c) out[p * channels + c] = image[c * pixels + p];
    }
  }
}

}  // namespace FM_KERNELS
