// Between the caller's memory and the engine's: parameters, rates and samples of tasks that pass
// together.
#pragma once

#include "common/error.h"
#include "meta/network.h"
#include "meta/options.h"

namespace fm {

// The tables of a program where a call's backend finds them.
template <class S>
struct Tables {
  const Program* program;
  const char* base;  // null: the host's will do
  explicit Tables(const Call<S>& call)
      : program(call.program), base(static_cast<const char*>(call.tables)) {}
  const Segment* segments() const {
    return base ? reinterpret_cast<const Segment*>(base) : program->segments().data();
  }
  const std::int32_t* index(const Parameter& p) const {
    if (p.index.empty()) return nullptr;
    return base ? reinterpret_cast<const std::int32_t*>(base + p.table) : p.index.data();
  }
};

// Collects moves of tensors, and runs as many of them at once as a backend takes.
template <class S,
          class Run = void (*)(const Move<S>* moves, index_t count, index_t tasks, const Exec&)>
class Mover {
 public:
  Mover(Run run, index_t tasks, const Exec& exec) : run_(run), tasks_(tasks), exec_(exec) {}
  void add(const Move<S>& move) {
    moves_[count_++] = move;
    if (count_ == kMovesAtOnce) finish();
  }
  void finish() {
    if (count_ > 0) run_(moves_, count_, tasks_, exec_);
    count_ = 0;
  }

 private:
  Run run_;
  index_t tasks_, count_ = 0;
  const Exec& exec_;
  Move<S> moves_[kMovesAtOnce];
};

// theta [P] of `count` tasks from the first one on (or once for all tasks: first = 0, count = 1),
// its parameters where `places` says, or else the program.
template <class S>
void load_parameters(const Call<S>& call, const TensorList<const S>& list, index_t first,
                     index_t count, Rows<S> theta, const Exec& exec,
                     const Places* places = nullptr) {
  const Tables<S> tables(call);
  Mover<S> mover(call.backend->vector.gather, count, exec);
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Parameter& p = call.program->parameters()[i];
    const index_t stride = list.per_task ? p.count : 0;
    mover.add({p.count,
               tables.index(p),
               {list.tensors[i] + first * stride, stride},
               {theta.data + (places ? places->parameter[i] : p.offset), theta.stride}});
  }
  mover.finish();
}

template <class S>
void store_parameters(const Call<S>& call, Rows<const S> theta, const TensorList<S>& list,
                      index_t first, index_t count, const Exec& exec,
                      const Places* places = nullptr) {
  const Tables<S> tables(call);
  Mover<S> mover(call.backend->vector.scatter, count, exec);
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Parameter& p = call.program->parameters()[i];
    const index_t stride = list.per_task ? p.count : 0;
    mover.add({p.count,
               tables.index(p),
               {theta.data + (places ? places->parameter[i] : p.offset), theta.stride},
               {list.tensors[i] + first * stride, stride}});
  }
  mover.finish();
}

// Means over tasks of rows in the engine's layout, into the caller's tensors, where a backend does
// it in one; what losses come to goes beside the first.
template <class S>
void mean_parameters(const Call<S>& call, Rows<const S> rows, const TensorList<S>& list,
                     TaskLosses<S> losses) {
  const Tables<S> tables(call);
  const auto run = [&](const Move<S>* moves, index_t count, index_t tasks, const Exec& exec) {
    call.backend->vector.mean_tensors(moves, count, tasks, losses, exec);
    losses = {};
  };
  Mover<S, decltype(run)> mover(run, call.tasks, call.exec);
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Parameter& p = call.program->parameters()[i];
    mover.add(
        {p.count, tables.index(p), {rows.data + p.offset, rows.stride}, {list.tensors[i], 0}});
  }
  mover.finish();
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

// Labels and the actions of categorical policies index the outputs, so they are checked at the door
// where the host can read them. Elsewhere the loss is NaN for a label out of range.
template <class S>
void check_labels(const Call<S>& call, const Samples<S>& samples, const char* name) {
  if (!samples.y || !call.backend->host_memory) return;
  const LossKind loss = call.program->loss();
  const index_t ways = call.program->output().size(), tasks = call.tasks;
  const auto check = [&](const auto& values, index_t stride, const char* what) {
    for (index_t i = 0; i < tasks * samples.count; ++i) {
      const auto value = values[i * stride];
      require(value >= 0 && value < ways && value == decltype(value)(index_t(value)), name,
              ": expected ", what, " from 0 to ", ways - 1, " (the model has ", ways,
              " outputs), got ", value, " for sample ", i % samples.count, " of task ",
              i / samples.count);
    }
  };
  if (loss == LossKind::cross_entropy) {
    check(static_cast<const std::int64_t*>(samples.y), 1, "labels");
  } else if (loss == LossKind::categorical_policy || loss == LossKind::categorical_ratio) {
    check(static_cast<const S*>(samples.y), call.program->target_size(), "actions");
  }
}

template <class S>
Batch<S> load_samples(const Call<S>& call, const Samples<S>& samples, index_t first, index_t count,
                      S* staging, const Exec& exec) {
  const Program& program = *call.program;
  const Shape& in = program.input();
  Batch<S> batch;
  batch.samples = batch.total = samples.count;
  batch.tasks = count;
  batch.x = samples.x + first * samples.count * in.size();
  if (needs_staging(program, samples)) {
    call.backend->vector.to_channels_last(count * samples.count, in.channels, in.pixels(), batch.x,
                                          staging, exec);
    batch.x = staging;
  }
  if (samples.y) {
    const index_t element =
        program.loss() == LossKind::cross_entropy ? sizeof(std::int64_t) : sizeof(S);
    batch.y = static_cast<const char*>(samples.y) +
              first * samples.count * program.target_size() * element;
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

  RateTable(const Call<S>& call, const Rates<S>& rates, S* memory)
      : call_(call),
        program_(*call.program),
        vector_(call.backend->vector),
        tables_(call),
        rates_(rates),
        table_(memory),
        width_(width(program_, rates)),
        each_(rates.layout == RateLayout::per_parameter) {}

  // Fills the table; nothing else may be asked for before.
  void load() const {
    if (!each_) {
      vector_.spread_rates(rates_.steps, width_, adapted(), rates_.values,
                           rates_.layout == RateLayout::per_tensor, table_, call_.exec);
      return;
    }
    const index_t count = model_count();
    Mover<S> mover(vector_.gather, rates_.steps, call_.exec);
    const S* values = rates_.values;
    for (size_t i = 0; i < program_.parameters().size(); ++i) {
      const Parameter& p = program_.parameters()[i];
      const Rows<S> to{table_ + p.offset, width_};
      if (rates_.adapted[i]) {
        mover.add({p.count, tables_.index(p), {values, count}, to});
      } else {
        vector_.fill(rates_.steps, p.count, S(0), to, call_.exec);
      }
      values += p.count;
    }
    mover.finish();
  }

  index_t row(index_t step) const { return min_of(step, rates_.steps - 1); }

  // Where the one rate of a scalar layout is.
  const S* number(index_t step) const { return rates_.values + row(step); }

  StepRates<S> at(index_t step) const {
    const S* values = table_ + row(step) * width_;
    return {tables_.segments(), index_t(program_.segments().size()), each_ ? nullptr : values,
            each_ ? values : nullptr};
  }

  // d loss / d a_k of `tasks` tasks: out [K', width] += -g (.) lambda, summed over segments when
  // there is one rate for each. `temporary` has room for one row per task.
  void accumulate(index_t step, index_t tasks, Rows<const S> g, Rows<const S> lambda, S* temporary,
                  Rows<S> out, const Exec& exec) const {
    const Rows<S> rows{temporary, width_};
    if (each_) {
      vector_.negative_product(tasks, width_, g, lambda, rows, exec);
    } else {
      vector_.segment_dots(at(step), tasks, g, lambda, rows, exec);
    }
    vector_.add(tasks, width_, {temporary, width_}, {out.data + row(step) * width_, out.stride},
                exec);
  }

  // From `mean` [K', width] to the caller's layout. Tensors that are not adapted have no rate.
  void store(const S* mean, S* out) const {
    if (!each_) {
      vector_.collect_rates(rates_.steps, width_, adapted(), mean,
                            rates_.layout == RateLayout::per_tensor, out, call_.exec);
      return;
    }
    const index_t count = model_count();
    Mover<S> mover(vector_.scatter, rates_.steps, call_.exec);
    for (size_t i = 0; i < program_.parameters().size(); ++i) {
      const Parameter& p = program_.parameters()[i];
      if (rates_.adapted[i]) {
        mover.add({p.count, tables_.index(p), {mean + p.offset, width_}, {out, count}});
      } else {
        vector_.fill(rates_.steps, p.count, S(0), {out, count}, call_.exec);
      }
      out += p.count;
    }
    mover.finish();
  }

 private:
  const std::uint8_t* adapted() const {
    return rates_.adapted_there ? rates_.adapted_there : rates_.adapted.data();
  }
  index_t model_count() const {
    index_t count = 0;
    for (const Parameter& p : program_.parameters()) count += p.count;
    return count;
  }

  const Call<S>& call_;
  const Program& program_;
  const VectorOps<S>& vector_;
  Tables<S> tables_;
  const Rates<S>& rates_;
  S* table_;
  index_t width_;
  bool each_;
};

// What a caller is told of a plan's sizes, which are in elements: of shared memory, and of one task
// in a slot.
template <class S, class Call>
CallPlan told_sizes(const Call& call, index_t slots, index_t slot, index_t shared, index_t tape) {
  const index_t size = sizeof(S);
  CallPlan result;
  result.slots = slots;
  result.slot_bytes = call.together() * slot * size;
  result.shared_bytes = shared * size;
  result.tape_bytes = call.together() * tape * size;
  result.bytes = result.shared_bytes + slots * result.slot_bytes;
  return result;
}

}  // namespace fm
