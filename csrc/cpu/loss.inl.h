// Losses: one sample after the other, formulas in math/loss.h and math/policy.h. Values are summed
// in double in the order of the samples. The policy gradient of a Gaussian, which inner loops take
// over thousands of samples, goes by blocks: one action of all samples in lone columns, so that the
// compiler vectorises the exponentials.

namespace FM_KERNELS {

FM_INLINE void put_metrics(const LossArgs<S>& a, double value, double accuracy) {
  if (!a.value) return;
  *a.value = value;
  *a.accuracy = accuracy;
}

inline void squared_error_value(const LossArgs<S>& a, const Exec&) {
  const S* y = static_cast<const S*>(a.target);
  double value = 0;
  for (index_t n = 0; n < a.samples; ++n) {
    const index_t row = n * a.outputs;
    value +=
        math::squared_error(a.z + row, y + row, a.outputs, a.scale, a.dz ? a.dz + row : nullptr);
  }
  put_metrics(a, value, std::numeric_limits<double>::quiet_NaN());
}

inline void squared_error_hessian(const LossArgs<S>& a, const Exec&) {
  for (index_t i = 0; i < a.samples * a.outputs; ++i) a.tdz[i] = S(2) * a.scale * a.tz[i];
}

inline void cross_entropy_value(const LossArgs<S>& a, const Exec&) {
  const std::int64_t* labels = static_cast<const std::int64_t*>(a.target);
  double value = 0;
  index_t hits = 0;
  for (index_t n = 0; n < a.samples; ++n) {
    const index_t row = n * a.outputs;
    bool correct = false;
    if (labels[n] < 0 || labels[n] >= a.outputs) {  // where nobody could look at the door
      value = std::numeric_limits<double>::quiet_NaN();
      for (index_t o = 0; a.dz && o < a.outputs; ++o) a.dz[row + o] = S(value);
      continue;
    }
    value += math::cross_entropy(a.z + row, labels[n], a.outputs, a.scale,
                                 a.dz ? a.dz + row : nullptr, &correct);
    hits += correct;
  }
  put_metrics(a, value, double(hits) / double(a.samples));
}

inline void cross_entropy_hessian(const LossArgs<S>& a, const Exec&) {
  for (index_t n = 0; n < a.samples; ++n) {
    const index_t row = n * a.outputs;
    math::cross_entropy_hessian(a.z + row, a.tz + row, a.outputs, a.scale, a.tdz + row);
  }
}

// The policy losses of math/policy.h
template <class Loss>
inline void policy_value(const LossArgs<S>& a, const Exec&) {
  const S* target = static_cast<const S*>(a.target);
  const index_t size = Loss::target_size(a.outputs);
  double value = 0;
  for (index_t n = 0; n < a.samples; ++n) {
    const index_t row = n * a.outputs;
    value +=
        Loss::value(a.z + row, target + n * size, a.outputs, a.scale, a.dz ? a.dz + row : nullptr);
  }
  put_metrics(a, value, std::numeric_limits<double>::quiet_NaN());
}

template <class Loss>
inline void policy_hessian(const LossArgs<S>& a, const Exec&) {
  const S* target = static_cast<const S*>(a.target);
  const index_t size = Loss::target_size(a.outputs);
  for (index_t n = 0; n < a.samples; ++n) {
    const index_t row = n * a.outputs;
    Loss::hessian(a.z + row, target + n * size, a.tz + row, a.outputs, a.scale, a.tdz + row);
  }
}

// A column of a block of samples: element j is that of sample j.
struct PolicyColumn {
  static constexpr index_t kMost = 128;
  alignas(64) S of[kMost];

  FM_INLINE void load(const S* p, index_t stride, index_t count) {
    for (index_t j = 0; j < count; ++j) of[j] = p[j * stride];
  }
  FM_INLINE void store(S* p, index_t stride, index_t count) const {
    for (index_t j = 0; j < count; ++j) p[j * stride] = of[j];
  }
};

// The samples from `first` on, and of one of their actions what the network put out.
struct PolicyBlock {
  index_t first, count, outputs, actions;
  const S *z, *target;
  PolicyColumn mean, log_std, taken, factor;

  PolicyBlock(const LossArgs<S>& a, index_t at)
      : first(at),
        count(min_of(a.samples - at, PolicyColumn::kMost)),
        outputs(a.outputs),
        actions(a.outputs / 2),
        z(a.z + at * outputs),
        target(static_cast<const S*>(a.target) + at * (actions + 1)) {
    factor.load(target + actions, actions + 1, count);
    for (index_t j = 0; j < count; ++j) factor.of[j] *= -a.scale;
  }
  FM_INLINE void load(index_t action) {
    mean.load(z + action, outputs, count);
    log_std.load(z + actions + action, outputs, count);
    taken.load(target + action, actions + 1, count);
  }
  FM_INLINE math::GaussianAction<S> at(index_t j) const {
    return {mean.of[j], log_std.of[j], taken.of[j]};
  }
};

inline void gaussian_policy_value(const LossArgs<S>& a, const Exec&) {
  double value = 0;
  PolicyColumn dmean, dlog_std;
  for (index_t first = 0; first < a.samples; first += PolicyColumn::kMost) {
    PolicyBlock b(a, first);
    double log_probability[PolicyColumn::kMost] = {};
    for (index_t i = 0; i < b.actions; ++i) {
      b.load(i);
      for (index_t j = 0; j < b.count; ++j) {
        const auto g = b.at(j);
        log_probability[j] += g.log_probability();
        dmean.of[j] = g.mean_score(b.factor.of[j]);
        dlog_std.of[j] = g.log_std_score(b.factor.of[j]);
      }
      if (!a.dz) continue;
      S* dz = a.dz + first * a.outputs + i;
      dmean.store(dz, a.outputs, b.count);
      dlog_std.store(dz + b.actions, a.outputs, b.count);
    }
    for (index_t j = 0; j < b.count; ++j) value += double(b.factor.of[j]) * log_probability[j];
  }
  put_metrics(a, value, std::numeric_limits<double>::quiet_NaN());
}

inline void gaussian_policy_hessian(const LossArgs<S>& a, const Exec&) {
  PolicyColumn tmean, tlog_std, tdmean, tdlog_std;
  for (index_t first = 0; first < a.samples; first += PolicyColumn::kMost) {
    PolicyBlock b(a, first);
    for (index_t i = 0; i < b.actions; ++i) {
      const index_t offset = first * a.outputs + i;
      b.load(i);
      tmean.load(a.tz + offset, a.outputs, b.count);
      tlog_std.load(a.tz + offset + b.actions, a.outputs, b.count);
      for (index_t j = 0; j < b.count; ++j) {
        const auto g = b.at(j);
        const S tm = tmean.of[j], ts = tlog_std.of[j], c = b.factor.of[j];
        tdmean.of[j] = g.mean_tangent(tm, ts, c, S(0));
        tdlog_std.of[j] = g.log_std_tangent(tm, ts, c, S(0));
      }
      tdmean.store(a.tdz + offset, a.outputs, b.count);
      tdlog_std.store(a.tdz + offset + b.actions, a.outputs, b.count);
    }
  }
}

}  // namespace FM_KERNELS
