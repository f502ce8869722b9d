// What a call of the driver is given. Pointers are to the caller's memory, which is the backend's,
// in the model's layout (channels first, PyTorch's weights), tasks first.
#pragma once

#include <memory>
#include <vector>

#include "program/backend.h"
#include "program/program.h"

namespace fm {

// Parameters, one pointer per tensor of Program::parameters(), shared by all tasks ([...]) or one
// set per task ([T, ...]).
template <class P>
struct TensorList {
  std::vector<P*> tensors;
  bool per_task = false;
};

template <class S>
struct Samples {
  const S* x = nullptr;     // [T, N, ...]
  const void* y = nullptr;  // [T, N] int64 labels or [T, N, .] of S
  index_t count = 0;        // N
  bool channels_last = false;
};

enum class RateLayout : int { scalar, per_tensor, per_parameter };

// a_k [K', R]: K' = K with per_step, else 1; R = 1, tensors, or parameters in the model's layout.
template <class S>
struct Rates {
  const S* values = nullptr;
  RateLayout layout = RateLayout::scalar;
  index_t steps = 1;                  // K'; later steps reuse the last row
  std::vector<std::uint8_t> adapted;  // per tensor: does the inner loop change it
  // The same in backend memory; null where the host's will do.
  const std::uint8_t* adapted_there = nullptr;
};

// Keep every support step's activations for the chain, or compute them again there.
enum class Memory : int { automatic, keep, recompute };

// `automatic` keeps while all that is kept takes no more than this.
constexpr index_t kKeepBytes = index_t(512) << 20;

// What all calls have in common.
template <class S>
struct Call {
  const Program* program = nullptr;
  const Backend<S>* backend = nullptr;
  Exec exec;                     // the stream and the precision of a backend that has those
  const void* tables = nullptr;  // Program::tables in backend memory, where that isn't the host's
  index_t tasks = 0;
  index_t slots = 1;  // tasks in work at once: Backend::slots, asked once per call
  // Tasks that pass through a slot together.
  index_t together() const { return backend->lockstep ? tasks : 1; }
};

template <class S>
struct MetaCall : Call<S> {
  index_t steps = 0;
  bool first_order = false;
  Memory memory = Memory::automatic;
  std::vector<double> loss_weights;  // [K + 1]
  TensorList<const S> params;
  Rates<S> rates;
  Samples<S> support, query;
  TensorList<S> gradients;     // [...], mean over tasks
  S* rate_gradient = nullptr;  // as rates.values, mean over tasks, or null
  // [T, K + 1]. Where the weight is zero they are NaN, or left as they are unless the backend's
  // memory is the host's.
  double* query_loss = nullptr;
  double* query_accuracy = nullptr;  // [T, K + 1]
  // Unless the backend's memory is the host's: the weighted query loss, mean over tasks, and then
  // the others are NaN where the weight is zero. Null: not wanted.
  S* loss = nullptr;
};

// Adapts every task; evaluates on the query samples after each step when there are any.
template <class S>
struct AdaptCall : Call<S> {
  index_t steps = 0;
  TensorList<const S> params;
  Rates<S> rates;
  Samples<S> support, query;
  TensorList<S> adapted;             // [T, ...], or empty
  double* query_loss = nullptr;      // [T, K + 1], or null
  double* query_accuracy = nullptr;  // [T, K + 1], or null
};

enum class Product : int { forward, gradient, hessian, gauss_newton };

// One pass or product per task.
template <class S>
struct ProductCall : Call<S> {
  Product product = Product::forward;
  TensorList<const S> params, vector;
  Samples<S> samples;
  S* output = nullptr;                          // forward: [T, N, outputs]
  double *loss = nullptr, *accuracy = nullptr;  // gradient: [T]
  TensorList<S> result;                         // the others: [T, ...]
  // Tapes of all tasks, kept_tape_size(program, samples) each, for products with many vectors at
  // one point; null: one of a chunk serves all. `filled`: an earlier call of the same product left
  // them.
  S* kept = nullptr;
  bool filled = false;
};

struct MetaPlan;  // meta_plan.h

// Bytes of workspace a call needs, and how they are made up.
struct CallPlan {
  index_t bytes = 0;                     // the whole workspace
  index_t slots = 0;                     // tasks in work at once, or 1 for all of them in lockstep
  index_t slot_bytes = 0;                // per slot
  index_t shared_bytes = 0;              // parameters, rates and per-task results
  index_t tape_bytes = 0;                // one support step's activations and adjoints
  bool kept = false;                     // activations kept over the steps
  bool resident = false;                 // each task done by one call of the backend
  index_t factored = 0;                  // layers whose adapted weights are never formed
  double loss = 0;                       // meta-gradient: sum_k w_k query loss, mean over tasks
  std::shared_ptr<const MetaPlan> meta;  // meta-gradient: where everything is
};

template <class S>
CallPlan plan_meta_gradient(const MetaCall<S>& call);
// Returns the weighted query loss, mean over tasks; NaN where the host can't read the losses. The
// plan is of this call, or of one that differs in addresses alone.
template <class S>
double meta_gradient(const MetaCall<S>& call, const CallPlan& plan, void* workspace);

template <class S>
CallPlan plan_adapt(const AdaptCall<S>& call);
template <class S>
void adapt(const AdaptCall<S>& call, void* workspace);

// Elements of a task.
index_t kept_tape_size(const Program& program, index_t samples);
template <class S>
CallPlan plan_product(const ProductCall<S>& call);
template <class S>
void product(const ProductCall<S>& call, void* workspace);

}  // namespace fm
