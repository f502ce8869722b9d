// A backend is a table: four passes per layer, losses, vector operations, and a way to run tasks.
// The driver in meta/ knows nothing else, so it is written once.
#pragma once

#include "common/types.h"
#include "math/optimizer.h"
#include "program/layer.h"

namespace fm {

// Where a pass runs: a team of threads or a stream (`context`, null: this thread alone), and the
// scratch memory it may use.
struct Exec {
  const void* context = nullptr;
  void* scratch = nullptr;
};

template <class S>
struct LayerOps {
  using Pass = void (*)(const LayerArgs<S>&, const Exec&);
  Pass forward = nullptr, backward = nullptr, tangent_forward = nullptr, tangent_backward = nullptr;
};

template <class S>
struct LossOps {
  using Pass = void (*)(const LossArgs<S>&, const Exec&);
  Pass value = nullptr;    // value, accuracy and dz
  Pass hessian = nullptr;  // tdz
};

// Inner learning rates of one step, in the engine's layout: one per parameter, or one per segment
// (a tensor) of the parameters.
struct Segment {
  index_t offset, count;
};

template <class S>
struct StepRates {
  const Segment* segments = nullptr;
  index_t segment_count = 0;
  const S* per_segment = nullptr;    // [segments], or
  const S* per_parameter = nullptr;  // [P]
};

template <class S>
struct VectorOps {
  // out = theta - a (.) g
  void (*descend)(const StepRates<S>&, const S* theta, const S* g, S* out);
  // out = a (.) v
  void (*scale_by_rates)(const StepRates<S>&, const S* v, S* out);
  // per segment: out[segment] = -<g, v>
  void (*segment_dots)(const StepRates<S>&, const S* g, const S* v, S* out);
  // out = -g (.) v
  void (*negative_product)(index_t n, const S* g, const S* v, S* out);
  // out = base + alpha v (a null base is zero), where base may be out
  void (*update)(index_t n, const S* base, S alpha, const S* v, S* out);
  // out = alpha v, out += alpha v
  void (*scale)(index_t n, S alpha, const S* v, S* out);
  void (*add)(index_t n, S alpha, const S* v, S* out);
  // out[j] = mean over t of values[t, j], t in ascending order, for begin <= j < end
  void (*mean_rows)(index_t rows, index_t n, index_t begin, index_t end, const S* values, S* out);
  // dst[e] = src[index[e]] and dst[index[e]] = src[e]; a null index copies
  void (*gather)(index_t n, const std::int32_t* index, const S* src, S* dst);
  void (*scatter)(index_t n, const std::int32_t* index, const S* src, S* dst);
  // [N, channels, pixels] -> [N, pixels, channels]
  void (*to_channels_last)(index_t n, index_t channels, index_t pixels, const S* src, S* dst);
};

// Outer optimizers, one parameter of n elements a call; `largest` and `buffer` may be null.
template <class S>
struct OptimizerOps {
  void (*adam)(const math::AdamRule<S>&, index_t n, const S* g, S* p, S* m, S* v, S* largest);
  void (*sgd)(const math::SgdRule<S>&, index_t n, const S* g, S* p, S* buffer);
};

class Program;

// A call whose tasks may each be done by one call of the backend, for networks so small that going
// from layer to layer costs as much as the arithmetic.
template <class S>
struct ResidentCall {
  const Program* program = nullptr;
  index_t steps = 0, support = 0, query = 0;  // K, samples
  bool first_order = false;
  const double* loss_weights = nullptr;  // [K + 1]
  const S* rates = nullptr;              // [rate_rows, segments]; later steps reuse the last row
  index_t rate_rows = 1;
  // One rate a step for all layers but those that stand still; null: rates differ.
  const S* one_rate = nullptr;            // [rate_rows]
  const std::uint8_t* adapted = nullptr;  // [segments] whether a tensor moves
  index_t tasks = 0;
  S* lambdas = nullptr;  // [T, P]; when all tasks are done, the first row is the sum over them
};

template <class S>
struct ResidentTask {
  index_t task;
  const S *support_x, *query_x;  // [N, in]
  const void *support_y, *query_y;
  double *loss, *accuracy;  // [K + 1] of the query samples
};

struct ResidentSizes {
  index_t shared = 0, slot = 0, tape = 0;  // elements; no slot: not this call
};

template <class S>
struct ResidentOps {
  ResidentSizes (*plan)(const ResidentCall<S>&);
  // Before any task: the parameters theta [P] that all start from, as they read them.
  void (*share)(const ResidentCall<S>&, const S* theta, S* shared);
  void (*task)(const ResidentCall<S>&, S* shared, S* slot, const ResidentTask<S>&);
};

template <class S>
struct Backend {
  const char* name;
  LayerOps<S> layers[int(LayerKind::count)];
  LossOps<S> losses[int(LossKind::count)];
  VectorOps<S> vector;
  OptimizerOps<S> optimizer;
  ResidentOps<S> resident;
  // Tasks that are in work at the same time at most, each in a workspace slot of its own.
  index_t (*slots)(index_t tasks);
  // Calls body(state, slot, task, exec) for every task, slot < slots. `exec.context` is set when
  // the passes of a task may find others to share their loops; `scratch` is left to the body.
  using Body = void (*)(void* state, index_t slot, index_t task, const Exec& exec);
  void (*for_each_task)(index_t tasks, index_t slots, Body body, void* state);
  // Calls body(state, begin, end) for disjoint ranges that cover [0, n).
  using Range = void (*)(void* state, index_t begin, index_t end);
  void (*for_each_range)(index_t n, index_t grain, Range body, void* state);
};

}  // namespace fm
