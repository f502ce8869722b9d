// Losses: one sample after the other, formulas in math/loss.h and math/policy.h. Values are summed
// in double in the order of the samples.

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

}  // namespace FM_KERNELS
