// A backend is a table: four passes per layer, losses, vector operations, and a way to run tasks.
// The driver in meta/ knows nothing else, so it is written once.
//
// Every operation takes all tasks that it is given at once. The CPU is given one at a time, each on
// a thread of its own; a backend in lockstep (a GPU) all of them. Backend memory is what its
// operations read and write, and what the driver only reads or writes through them unless the
// backend says `host_memory`. Operations are asynchronous there: a stream puts them in order.
#pragma once

#include "common/types.h"
#include "math/optimizer.h"
#include "program/layer.h"

namespace fm {

// How a backend with tensor cores multiplies matrices of float32. float32 is as accurate as scalar
// arithmetic; the others round the factors to 10 or 7 bits of fraction, and sum in float32.
enum class Precision : int { float32, tf32, bfloat16 };

// Where a pass runs: a team of threads or a stream (`context`, null: this thread alone, or the
// default stream), and the scratch memory it may use: [T, scratch_count] elements.
struct Exec {
  const void* context = nullptr;
  void* scratch = nullptr;
  Precision precision = Precision::float32;
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
// (a tensor) of the parameters. All pointers are to backend memory.
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

// One vector per task, `stride` elements apart (0: all tasks share it).
template <class S>
struct Rows {
  S* data = nullptr;
  index_t stride = 0;
  FM_INLINE S* of(index_t task) const { return data + task * stride; }
};

// One tensor to be copied between the model's layout and the engine's, for every task: element
// index[e] of the model's (null: e) is element e of the engine's. Strides are from task to task.
template <class S>
struct Move {
  index_t n = 0;
  const std::int32_t* index = nullptr;  // backend memory
  Rows<const S> src;
  Rows<S> dst;
};

// The query losses [T, n] of all tasks, and the meta-loss:
//
//   out = sum_k w_k (mean over t of loss[t, k])
//
// and NaN in the columns of loss and accuracy whose weight is zero.
template <class S>
struct TaskLosses {
  index_t n = 0;
  const double* weights = nullptr;  // [n], host memory
  double *loss = nullptr, *accuracy = nullptr;
  S* out = nullptr;  // null: nothing is wanted
};

// Tensors that one call of `gather` or `scatter` moves at most.
constexpr index_t kMovesAtOnce = 16;

template <class S>
struct VectorOps {
  // Each for t = 0 .. tasks - 1; `out` may be one of the inputs.

  // out = theta - a (.) g, in the segments
  void (*descend)(const StepRates<S>&, index_t tasks, Rows<const S> theta, Rows<const S> g,
                  Rows<S> out, const Exec&);
  // out = a (.) v, in the segments
  void (*scale_by_rates)(const StepRates<S>&, index_t tasks, Rows<const S> v, Rows<S> out,
                         const Exec&);
  // per segment: out[segment] = -<g, v>
  void (*segment_dots)(const StepRates<S>&, index_t tasks, Rows<const S> g, Rows<const S> v,
                       Rows<S> out, const Exec&);
  // out = -g (.) v
  void (*negative_product)(index_t tasks, index_t n, Rows<const S> g, Rows<const S> v, Rows<S> out,
                           const Exec&);
  // out = base + alpha (*rate) v, where a null base is zero and a null rate (backend memory) one
  void (*update)(index_t tasks, index_t n, Rows<const S> base, S alpha, const S* rate,
                 Rows<const S> v, Rows<S> out, const Exec&);
  // out = value, out = v, out += v
  void (*fill)(index_t tasks, index_t n, S value, Rows<S> out, const Exec&);
  void (*copy)(index_t tasks, index_t n, Rows<const S> v, Rows<S> out, const Exec&);
  void (*add)(index_t tasks, index_t n, Rows<const S> v, Rows<S> out, const Exec&);
  // out[j] = mean over t of values[t, j], for begin <= j < end; in an order that hangs on the
  // number of rows alone
  void (*mean_rows)(index_t rows, index_t n, index_t begin, index_t end, const S* values, S* out,
                    const Exec&);
  // As mean_rows, of rows that come a few at a time: sums[j], which starts at zero if `begins`,
  // plus those rows; then out = sums / total unless `out` is null. Backends in lockstep have none.
  void (*add_rows)(index_t rows, index_t n, index_t begin, index_t end, const S* values,
                   bool begins, double* sums, index_t total, S* out, const Exec&);
  // In lockstep: dst[index[e]] = mean over tasks of src[t, e], as mean_rows, of `count` <=
  // kMovesAtOnce tensors (`moves` is host memory); and beside them what losses come to
  void (*mean_tensors)(const Move<S>* moves, index_t count, index_t tasks, const TaskLosses<S>&,
                       const Exec&);
  // dst[e] = src[index[e]] and dst[index[e]] = src[e] of `count` <= kMovesAtOnce tensors (`moves`
  // is host memory)
  void (*gather)(const Move<S>* moves, index_t count, index_t tasks, const Exec&);
  void (*scatter)(const Move<S>* moves, index_t count, index_t tasks, const Exec&);
  // [n, channels, pixels] -> [n, pixels, channels]
  void (*to_channels_last)(index_t n, index_t channels, index_t pixels, const S* src, S* dst,
                           const Exec&);
  // Rates of `rows` steps and n tensors, and their gradient; tensors that are not adapted
  // (adapted[i] == 0; backend memory) have none:
  // out[k, i] = adapted[i] ? values[k, i] : 0, where values is [rows, 1] unless `per_tensor`
  void (*spread_rates)(index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                       bool per_tensor, S* out, const Exec&);
  // out[k, i] = adapted[i] ? values[k, i] : 0 if `per_tensor`, else the sum over i, ascending:
  // out[k]
  void (*collect_rates)(index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                        bool per_tensor, S* out, const Exec&);
  // Where memory is not the host's, the losses alone; null if mean_tensors is there
  void (*mean_loss)(index_t tasks, const TaskLosses<S>&, const Exec&);
};

// Outer optimizers, a list of parameters (host memory) at a call. All pointers in it are to backend
// memory; `largest` and `buffer` may be null. `lr` is backend memory; null: that of the options.
// `arrivals` too, a number of Adam's own that is 0 between steps; null where `host_memory`.
template <class S>
struct AdamTensor {
  index_t n = 0;
  const S* g = nullptr;
  S *p = nullptr, *m = nullptr, *v = nullptr, *largest = nullptr;
  float* step = nullptr;  // counts the steps: incremented before use
};

template <class S>
struct SgdTensor {
  index_t n = 0;
  const S* g = nullptr;
  S *p = nullptr, *buffer = nullptr;
  bool first = false;  // the buffer holds nothing yet
};

template <class S>
struct OptimizerOps {
  void (*adam)(const math::AdamOptions&, const double* lr, unsigned* arrivals, const AdamTensor<S>*,
               index_t count, const Exec&);
  // `first` of the rule is not read
  void (*sgd)(const math::SgdRule<S>&, const double* lr, const SgdTensor<S>*, index_t count,
              const Exec&);
};

class Program;

// A call whose tasks the backend may do in one piece each, for networks so small that going from
// layer to layer costs as much as the arithmetic. A backend in lockstep is given all tasks at once.
template <class S>
struct ResidentCall {
  const Program* program = nullptr;
  index_t steps = 0, support = 0, query = 0;  // K, samples
  bool first_order = false;
  const double* loss_weights = nullptr;  // [K + 1]
  const S* rates = nullptr;              // [rate_rows, segments]; later steps reuse the last row.
                                         // Null in lockstep
  index_t rate_rows = 1;
  // One rate a step for all layers but those that stand still; null: rates differ.
  const S* one_rate = nullptr;            // [rate_rows]
  const std::uint8_t* adapted = nullptr;  // [segments] whether a tensor moves
  index_t tasks = 0;
  // [T, P]; when all tasks are done, the first row is the sum over them, or whatever in lockstep.
  S* lambdas = nullptr;
};

template <class S>
struct ResidentTask {
  index_t task;
  const S *support_x, *query_x;  // [N, in]
  const void *support_y, *query_y;
  double *loss, *accuracy;  // [K + 1] of the query samples
};

// All tasks in lockstep, from the caller's tensors to their gradients, in the model's layout. The
// two lists are host memory, in the order of Program::parameters(); all else is backend memory.
template <class S>
struct ResidentBatch {
  const S* const* params;  // shared by all tasks
  S* const* gradients;     // mean over tasks
  const S* rates;          // [rate_rows, segments] if rate_per_tensor, else [rate_rows]
  bool rate_per_tensor;
  const std::uint8_t* adapted;   // [segments] whether a tensor moves
  const S *support_x, *query_x;  // [T, N, in]
  const void *support_y, *query_y;
  double *loss, *accuracy;  // [T, K + 1] of the query samples
  S* mean_loss;             // as TaskLosses::out
};

struct ResidentSizes {
  bool taken = false;                      // whether the backend takes the call
  index_t shared = 0, slot = 0, tape = 0;  // elements; in lockstep, only the tape is read
};

template <class S>
struct ResidentOps {
  ResidentSizes (*plan)(const ResidentCall<S>&);
  // Task by task. Before any: the parameters theta [P] that all start from, as they read them.
  void (*share)(const ResidentCall<S>&, const S* theta, S* shared);
  void (*task)(const ResidentCall<S>&, S* shared, S* slot, const ResidentTask<S>&);
  // In lockstep.
  void (*all)(const ResidentCall<S>&, const ResidentBatch<S>&, const Exec&);
};

// Tasks' factors of one layer on their way into the mean: rows of a and b are [in] and [out].
template <class S>
struct FactorSum {
  index_t in = 0, out = 0, tasks = 0, rows = 0;
  Rows<const S> a, b;  // [T, rows, in], [T, rows, out]
  bool begins = true;  // the sum starts at zero
  S scale = 1;         // of the sum when these are in it
  S* sum = nullptr;    // [in, out]
};

// Dense layers whose weights are Factors; meta/factored.h has the formulas.
template <class S>
struct FactoredOps {
  LayerOps<S> layer;  // null: the backend has none of this
  // dst [columns, rows] = src [rows, columns]'
  void (*transpose)(index_t rows, index_t columns, const S* src, S* dst, const Exec&);
  // sum[i, :] = scale * (sum[i, :] + a[t, r, i] b[t, r, :], added up over t and r, ascending), for
  // begin <= i < end
  void (*add_products)(const FactorSum<S>&, index_t begin, index_t end, const Exec&);
};

template <class S>
struct Backend {
  const char* name;
  LayerOps<S> layers[int(LayerKind::count)];
  LossOps<S> losses[int(LossKind::count)];
  VectorOps<S> vector;
  OptimizerOps<S> optimizer;
  ResidentOps<S> resident;
  FactoredOps<S> factored;
  bool lockstep;      // takes all tasks at once, in one slot
  bool host_memory;   // its memory is the host's, and operations are done when they return
  bool tensor_cores;  // knows precisions other than float32
  bool updates;       // all layers take LayerArgs::dw_base and what belongs to it, not dense alone
  bool strips;    // sweeps a batch norm's pixels in the convolution below, LayerDesc::strip_rows
  bool folds;     // maps the adjoint of its input in the convolution below, LayerDesc::folds_norm
  bool averages;  // does a mean over images in the batch norm below it
  // Tasks that are in work at the same time at most, each in a workspace slot of its own; a backend
  // in lockstep has one slot for all.
  index_t (*slots)(index_t tasks);
  // Calls body(state, slot, first, count, exec) for ranges of tasks that cover all, slot < slots;
  // count is 1, or all tasks in lockstep. `exec.context` is set when the passes of a task may find
  // others to share their loops, and to the stream of `exec` in lockstep; `scratch` is left to the
  // body.
  using Body = void (*)(void* state, index_t slot, index_t first, index_t count, const Exec& exec);
  void (*for_each_task)(index_t tasks, index_t slots, const Exec& exec, Body body, void* state);
  // Calls body(state, begin, end) for disjoint ranges that cover [0, n).
  using Range = void (*)(void* state, index_t begin, index_t end);
  void (*for_each_range)(index_t n, index_t grain, Range body, void* state);
};

}  // namespace fm
