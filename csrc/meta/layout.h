// Between the caller's memory and the engine's: parameters, rates and samples of one task.
#pragma once

#include "common/error.h"
#include "meta/network.h"
#include "meta/options.h"

namespace fm {

// theta [P] of a task (or of all tasks, task = 0)
template <class S>
void load_parameters(const Program& program, const Backend<S>& backend,
                     const TensorList<const S>& list, index_t task, S* theta) {
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Parameter& p = program.parameters()[i];
    const S* src = list.tensors[i] + (list.per_task ? task * p.count : 0);
    backend.vector.gather(p.count, p.index.empty() ? nullptr : p.index.data(), src,
                          theta + p.offset);
  }
}

template <class S>
void store_parameters(const Program& program, const Backend<S>& backend, const S* theta,
                      const TensorList<S>& list, index_t task) {
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Parameter& p = program.parameters()[i];
    S* dst = list.tensors[i] + (list.per_task ? task * p.count : 0);
    backend.vector.scatter(p.count, p.index.empty() ? nullptr : p.index.data(), theta + p.offset,
                           dst);
  }
}

// Whether samples must be transposed to channels last, and the room that takes.
template <class S>
bool needs_staging(const Program& program, const Samples<S>& samples) {
  const Shape& in = program.input();
  return !samples.channels_last && in.channels > 1 && in.pixels() > 1;
}

template <class S>
index_t staging_size(const Program& program, const Samples<S>& samples) {
  return needs_staging(program, samples) ? samples.count * program.input().size() : 0;
}

// Labels and the actions of categorical policies index the outputs, so they are checked at the
// door.
template <class S>
void check_labels(const Program& program, const Samples<S>& samples, index_t tasks,
                  const char* name) {
  const LossKind loss = program.loss();
  const index_t ways = program.output().size();
  const auto check = [&](const auto& values, index_t stride, const char* what) {
    for (index_t i = 0; i < tasks * samples.count; ++i) {
      const auto value = values[i * stride];
      require(value >= 0 && value < ways && value == decltype(value)(index_t(value)), name,
              ": expected ", what, " from 0 to ", ways - 1, " (the model has ", ways,
              " outputs), got ", value, " for sample ", i % samples.count, " of task ",
              i / samples.count);
    }
  };
  if (!samples.y) return;
  if (loss == LossKind::cross_entropy) {
    check(static_cast<const std::int64_t*>(samples.y), 1, "labels");
  } else if (loss == LossKind::categorical_policy || loss == LossKind::categorical_ratio) {
    check(static_cast<const S*>(samples.y), program.target_size(), "actions");
  }
}

template <class S>
Batch<S> load_samples(const Program& program, const Backend<S>& backend, const Samples<S>& samples,
                      index_t task, S* staging) {
  const Shape& in = program.input();
  Batch<S> batch;
  batch.samples = batch.total = samples.count;
  batch.x = samples.x + task * samples.count * in.size();
  if (needs_staging(program, samples)) {
    backend.vector.to_channels_last(samples.count, in.channels, in.pixels(), batch.x, staging);
    batch.x = staging;
  }
  if (samples.y) {
    const index_t element =
        program.loss() == LossKind::cross_entropy ? sizeof(std::int64_t) : sizeof(S);
    batch.y = static_cast<const char*>(samples.y) +
              task * samples.count * program.target_size() * element;
  }
  return batch;
}

// The inner learning rates in the engine's layout, and back.
template <class S>
class RateTable {
 public:
  // Elements of one row, and of the whole table.
  static index_t width(const Program& program, const Rates<S>& rates) {
    return rates.layout == RateLayout::per_parameter ? program.param_count()
                                                     : index_t(program.segments().size());
  }
  static index_t size(const Program& program, const Rates<S>& rates) {
    return rates.steps * width(program, rates);
  }

  RateTable(const Program& program, const Backend<S>& backend, const Rates<S>& rates, S* memory)
      : program_(program), backend_(backend), rates_(rates), table_(memory) {
    for (index_t k = 0; k < rates.steps; ++k) fill(k);
  }

  index_t row(index_t step) const { return min_of(step, rates_.steps - 1); }

  // The one rate of a scalar layout.
  S number(index_t step) const { return rates_.values[row(step)]; }

  StepRates<S> at(index_t step) const {
    const S* values = table_ + row(step) * width(program_, rates_);
    const auto& segments = program_.segments();
    const bool each = rates_.layout == RateLayout::per_parameter;
    return {segments.data(), index_t(segments.size()), each ? nullptr : values,
            each ? values : nullptr};
  }

  // d loss / d a_k of one task: out [K', width] += -g (.) lambda, summed over segments when there
  // is one rate for each. `temporary` has room for one row.
  void accumulate(index_t step, const S* g, const S* lambda, S* temporary, S* out) const {
    const index_t n = width(program_, rates_);
    if (rates_.layout == RateLayout::per_parameter) {
      backend_.vector.negative_product(n, g, lambda, temporary);
    } else {
      backend_.vector.segment_dots(at(step), g, lambda, temporary);
    }
    backend_.vector.add(n, S(1), temporary, out + row(step) * n);
  }

  // From `mean` [K', width] to the caller's layout. Tensors that are not adapted have no rate.
  void store(const S* mean, S* out) const {
    for (index_t k = 0; k < rates_.steps; ++k, mean += width(program_, rates_)) {
      if (rates_.layout == RateLayout::scalar) *out = S(0);
      for (size_t i = 0; i < program_.parameters().size(); ++i) {
        const Parameter& p = program_.parameters()[i];
        const bool adapted = rates_.adapted[i];
        if (rates_.layout == RateLayout::scalar) {
          if (adapted) *out += mean[i];
        } else if (rates_.layout == RateLayout::per_tensor) {
          *out++ = adapted ? mean[i] : S(0);
        } else if (adapted) {
          backend_.vector.scatter(p.count, p.index.empty() ? nullptr : p.index.data(),
                                  mean + p.offset, out);
          out += p.count;
        } else {
          for (index_t j = 0; j < p.count; ++j) *out++ = S(0);
        }
      }
      if (rates_.layout == RateLayout::scalar) ++out;
    }
  }

 private:
  void fill(index_t k) {
    S* row = table_ + k * width(program_, rates_);
    const auto& parameters = program_.parameters();
    index_t model_count = 0;
    for (const Parameter& p : parameters) model_count += p.count;
    const S* each = rates_.values + k * model_count;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Parameter& p = parameters[i];
      const S mask = rates_.adapted[i] ? S(1) : S(0);
      if (rates_.layout == RateLayout::scalar) {
        row[i] = mask * rates_.values[k];
      } else if (rates_.layout == RateLayout::per_tensor) {
        row[i] = mask * rates_.values[k * index_t(parameters.size()) + index_t(i)];
      } else {
        backend_.vector.gather(p.count, p.index.empty() ? nullptr : p.index.data(), each,
                               row + p.offset);
        backend_.vector.scale(p.count, mask, row + p.offset, row + p.offset);
        each += p.count;
      }
    }
  }

  const Program& program_;
  const Backend<S>& backend_;
  const Rates<S>& rates_;
  S* table_;
};

}  // namespace fm
