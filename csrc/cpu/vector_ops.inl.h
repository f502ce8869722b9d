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

// body(t) for all tasks
template <class Body>
FM_INLINE void for_tasks(index_t tasks, Body&& body) {
  for (index_t t = 0; t < tasks; ++t) body(t);
}

inline void descend(const StepRates<S>& rates, index_t tasks, Rows<const S> theta, Rows<const S> g,
                    Rows<S> out, const Exec&) {
  for_tasks(tasks, [&](index_t task) {
    const S *t = theta.of(task), *slope = g.of(task);
    S* o = out.of(task);
    for_rates(rates, [=](index_t begin, index_t end, auto rate) {
      for (index_t i = begin; i < end; ++i) o[i] = t[i] - rate(i) * slope[i];
    });
  });
}

inline void scale_by_rates(const StepRates<S>& rates, index_t tasks, Rows<const S> v, Rows<S> out,
                           const Exec&) {
  for_tasks(tasks, [&](index_t task) {
    const S* x = v.of(task);
    S* o = out.of(task);
    for_rates(rates, [=](index_t begin, index_t end, auto rate) {
      for (index_t i = begin; i < end; ++i) o[i] = rate(i) * x[i];
    });
  });
}

inline void segment_dots(const StepRates<S>& rates, index_t tasks, Rows<const S> g, Rows<const S> v,
                         Rows<S> out, const Exec&) {
  for_tasks(tasks, [&](index_t task) {
    const S *a = g.of(task), *b = v.of(task);
    for (index_t s = 0; s < rates.segment_count; ++s) {
      const index_t begin = rates.segments[s].offset, end = begin + rates.segments[s].count;
      double sum = 0;
      for (index_t i = begin; i < end; ++i) sum += double(a[i]) * double(b[i]);
      out.of(task)[s] = S(-sum);
    }
  });
}

inline void negative_product(index_t tasks, index_t n, Rows<const S> g, Rows<const S> v,
                             Rows<S> out, const Exec&) {
  for_tasks(tasks, [&](index_t task) {
    const S *a = g.of(task), *b = v.of(task);
    S* o = out.of(task);
    for (index_t i = 0; i < n; ++i) o[i] = -a[i] * b[i];
  });
}

inline void update(index_t tasks, index_t n, Rows<const S> base, S alpha, const S* rate,
                   Rows<const S> v, Rows<S> out, const Exec&) {
  const S scale = scale_of(alpha, rate);
  for_tasks(tasks, [&](index_t task) {
    const S *b = base.data ? base.of(task) : nullptr, *x = v.of(task);
    S* o = out.of(task);
    for (index_t i = 0; i < n; ++i) o[i] = (b ? b[i] : S(0)) + scale * x[i];
  });
}

inline void fill(index_t tasks, index_t n, S value, Rows<S> out, const Exec&) {
  for_tasks(tasks, [&](index_t task) {
    S* o = out.of(task);
    for (index_t i = 0; i < n; ++i) o[i] = value;
  });
}

inline void copy(index_t tasks, index_t n, Rows<const S> v, Rows<S> out, const Exec&) {
  for_tasks(tasks, [&](index_t task) { std::memcpy(out.of(task), v.of(task), n * sizeof(S)); });
}

inline void add(index_t tasks, index_t n, Rows<const S> v, Rows<S> out, const Exec&) {
  for_tasks(tasks, [&](index_t task) {
    const S* x = v.of(task);
    S* o = out.of(task);
    for (index_t i = 0; i < n; ++i) o[i] += x[i];
  });
}

// Columns [begin, end) of a sum over rows: a block of columns at a time, rows in ascending order.
// It starts at `carried` (null: zero) and goes to finish(column, sum).
template <class Finish>
FM_INLINE void sum_columns(index_t rows, index_t n, index_t begin, index_t end, const S* values,
                           const double* carried, Finish&& finish) {
  constexpr index_t kBlock = 32;  // sums that stay in registers
  index_t c = begin;
  for (; c + kBlock <= end; c += kBlock) {
    double sum[kBlock] = {};
    if (carried) std::memcpy(sum, carried + c, sizeof(sum));
    for (index_t t = 0; t < rows; ++t) {
      const S* row = values + t * n + c;
#pragma GCC unroll 32
      for (index_t i = 0; i < kBlock; ++i) sum[i] += double(row[i]);
    }
    for (index_t i = 0; i < kBlock; ++i) finish(c + i, sum[i]);
  }
  for (; c < end; ++c) {
    double sum = carried ? carried[c] : 0;
    for (index_t t = 0; t < rows; ++t) sum += double(values[t * n + c]);
    finish(c, sum);
  }
}

inline void mean_rows(index_t rows, index_t n, index_t begin, index_t end, const S* values, S* out,
                      const Exec&) {
  sum_columns(rows, n, begin, end, values, nullptr,
              [=](index_t c, double sum) { out[c] = S(sum / double(rows)); });
}

inline void mean_loss(index_t tasks, const TaskLosses<S>& all, const Exec&) {
  double total = 0;
  for (index_t k = 0; k < all.n; ++k) {
    const double weight = all.weights[k];
    double sum = 0;
    for (index_t i = k; i < tasks * all.n; i += all.n) {
      if (weight != 0) {
        sum += all.loss[i];
      } else {
        all.loss[i] = all.accuracy[i] = std::numeric_limits<double>::quiet_NaN();
      }
    }
    if (weight != 0) total += weight * sum;
  }
  *all.out = S(total / double(tasks));
}

inline void add_rows(index_t rows, index_t n, index_t begin, index_t end, const S* values,
                     bool begins, double* sums, index_t total, S* out, const Exec&) {
  const double* carried = begins ? nullptr : sums;
  if (out) {
    sum_columns(rows, n, begin, end, values, carried,
                [=](index_t c, double sum) { out[c] = S(sum / double(total)); });
  } else {
    sum_columns(rows, n, begin, end, values, carried,
                [=](index_t c, double sum) { sums[c] = sum; });
  }
}

// Calls body(n, index, src, dst) for every tensor of every task.
template <class Body>
FM_INLINE void for_moves(const Move<S>* moves, index_t count, index_t tasks, Body&& body) {
  for (index_t m = 0; m < count; ++m) {
    for (index_t t = 0; t < tasks; ++t) {
      const S* src = moves[m].src.of(t);
      S* dst = moves[m].dst.of(t);
      if (moves[m].index) {
        body(moves[m].n, moves[m].index, src, dst);
      } else {
        std::memcpy(dst, src, moves[m].n * sizeof(S));
      }
    }
  }
}

// An index in rows of `columns` elements, `stride` apart in the model: weights lie transposed
// there.
struct IndexRows {
  index_t columns = 1, stride = 1;

  IndexRows(const std::int32_t* index, index_t n) {
    if (n < 2) return;
    stride = index[1] - index[0];
    for (columns = 2; columns < n && index[columns] - index[columns - 1] == stride;) ++columns;
  }

  // Whether kLanes rows from element e on start side by side, and each reaches as far as the first.
  bool side_by_side(const std::int32_t* index, index_t e, index_t n) const {
    if (stride < kLanes || e + kLanes * columns > n) return false;
    for (index_t r = 0; r < kLanes; ++r) {
      const std::int32_t* row = index + e + r * columns;
      if (row[0] != index[e] + r || row[columns - 1] != row[0] + (columns - 1) * stride)
        return false;
    }
    return true;
  }
};

// Calls transposed(rows, e) for kLanes rows that lie side by side in the model, and lone(i) for
// elements elsewhere.
template <class Transposed, class Lone>
FM_INLINE void for_index(const std::int32_t* index, index_t n, Transposed&& transposed,
                         Lone&& lone) {
  const IndexRows rows(index, n);
  for (index_t e = 0; e < n;) {
    if (rows.side_by_side(index, e, n)) {
      transposed(rows, e);
      e += kLanes * rows.columns;
    } else {
      const index_t end = min_of(n, e + rows.columns);
      for (; e < end; ++e) lone(e);
    }
  }
}

inline void gather(const Move<S>* moves, index_t count, index_t tasks, const Exec&) {
  for_moves(moves, count, tasks, [](index_t n, const std::int32_t* index, const S* src, S* dst) {
    for_index(
        index, n,
        [=](const IndexRows& rows, index_t e) {
          transpose(src + index[e], rows.stride, rows.columns, kLanes, dst + e, rows.columns);
        },
        [=](index_t i) { dst[i] = src[index[i]]; });
  });
}

inline void scatter(const Move<S>* moves, index_t count, index_t tasks, const Exec&) {
  for_moves(moves, count, tasks, [](index_t n, const std::int32_t* index, const S* src, S* dst) {
    for_index(
        index, n,
        [=](const IndexRows& rows, index_t e) {
          transpose(src + e, rows.columns, kLanes, rows.columns, dst + index[e], rows.stride);
        },
        [=](index_t i) { dst[index[i]] = src[i]; });
  });
}

inline void to_channels_last(index_t n, index_t channels, index_t pixels, const S* src, S* dst,
                             const Exec&) {
  for (index_t i = 0; i < n; ++i) {
    const S* image = src + i * channels * pixels;
    S* out = dst + i * channels * pixels;
    for (index_t p = 0; p < pixels; ++p) {
      for (index_t c = 0; c < channels; ++c) out[p * channels + c] = image[c * pixels + p];
    }
  }
}

inline void spread_rates(index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                         bool per_tensor, S* out, const Exec&) {
  for (index_t k = 0; k < rows; ++k) {
    for (index_t i = 0; i < n; ++i) {
      out[k * n + i] = adapted[i] ? values[per_tensor ? k * n + i : k] : S(0);
    }
  }
}

inline void collect_rates(index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                          bool per_tensor, S* out, const Exec&) {
  for (index_t k = 0; k < rows; ++k) {
    S sum = 0;
    for (index_t i = 0; i < n; ++i) {
      const S value = adapted[i] ? values[k * n + i] : S(0);
      if (per_tensor) out[k * n + i] = value;
      sum += value;
    }
    if (!per_tensor) out[k] = sum;
  }
}

}  // namespace FM_KERNELS
