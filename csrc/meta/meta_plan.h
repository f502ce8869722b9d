// The plan of a meta-gradient: which way it goes, and where everything is.
//
// Five choices are made here, from sizes and settings alone. Small networks may be left to a
// backend that does a whole task in one call. Weights of large dense layers with few samples may
// stay factored (factored.h), and are then in no row of theta or lambda. Activations of all inner
// steps are kept where they fit, else those of the last step alone. A chain step goes in place
// (in lockstep, to and fro) where all layers that move share one rate, else it takes a direction
// beside lambda. Tasks come in waves whose lambdas stay in the last cache until they are added
// up: those of all tasks would have to come back from memory.
#pragma once

#include "meta/factored.h"
#include "meta/layout.h"
#include "meta/resident.h"

namespace fm {

// Where everything is, in elements from the start of the workspace (shared) or, for one task, of a
// slot: see network.h for tasks that share one.
struct MetaPlan {
  TapePlan support, query;
  TangentPlan tangent;
  index_t theta0 = 0, rates = 0, lambdas = 0, rate_rows = 0, mean = 0, shared = 0;
  std::vector<index_t> thetas, gradients, tapes;  // thetas[k] for k >= 1
  index_t own_theta0 = 0, gradient = 0, direction = 0, rate_row = 0, support_x = 0, query_x = 0,
          late = 0, scratch = 0, slot = 0;
  index_t slots = 0;
  index_t wave = 0;  // tasks at a time, which have a row of lambda each
  index_t sums = 0;  // of lambda over the waves before, double
  bool kept = false;
  ResidentSizes resident;
  index_t resident_theta = 0;
  FactoredPlan factored;
  index_t transposed = 0, factor_rows = 0, updates = 0;
  index_t row() const { return factored.places.row; }  // of theta and lambda
};

// Per layer: none of its parameters is adapted.
template <class S>
std::vector<std::uint8_t> still_layers(const MetaCall<S>& call) {
  std::vector<std::uint8_t> still;
  for (const LayerDesc& d : call.program->layers()) {
    bool any = false;
    for (index_t i = 0; i < d.segments(); ++i) any |= call.rates.adapted[d.segment + i] != 0;
    still.push_back(!any);
  }
  return still;
}

// Whether a chain step needs no direction beside lambda.
template <class S>
bool moves_in_place(const MetaCall<S>& call) {
  return has_one_rate(call) &&
         chunk_of(*call.program, *call.backend, call.support.count) == call.support.count;
}

// Whether lambda goes to and fro between two places instead: a backend in lockstep does both
// adjoints of a layer in one launch if the one doesn't overwrite what the other reads.
template <class S>
bool alternates(const MetaCall<S>& call) {
  return moves_in_place(call) && call.backend->lockstep && !call.first_order;
}

// Bytes of lambda that the last cache keeps beside parameters and activations of the threads.
constexpr index_t kWaveBytes = index_t(4) << 20;

// The sum over tasks is in their order, however they are split. All slots are busy in all waves but
// the last.
template <class S>
index_t tasks_at_a_time(const MetaCall<S>& call, const MetaPlan& plan) {
  const index_t row = (plan.row() + plan.factored.row) * index_t(sizeof(S));
  if (!call.backend->vector.add_rows || call.backend->lockstep || plan.resident.slot > 0 ||
      call.tasks * row <= kWaveBytes) {
    return call.tasks;
  }
  return min_of(call.tasks, align_up(max_of<index_t>(kWaveBytes / row, 1), plan.slots));
}

template <class S>
void plan_shared(const MetaCall<S>& call, MetaPlan& plan) {
  const Program& program = *call.program;
  const index_t P = program.param_count(), R = RateTable<S>::size(program, call.rates);
  Arena shared;
  plan.theta0 = shared.take(call.params.per_task ? 0 : P);
  plan.rates = shared.take(R);
  plan.wave = tasks_at_a_time(call, plan);
  plan.lambdas = shared.take(plan.wave * plan.row());
  plan.sums =
      shared.take(plan.wave < call.tasks ? plan.row() * index_t(sizeof(double) / sizeof(S)) : 0);
  plan.transposed = shared.take(plan.factored.transposed);
  plan.factor_rows = shared.take(plan.wave * plan.factored.row);
  plan.rate_rows = shared.take(call.rate_gradient ? call.tasks * R : 0);
  plan.mean = shared.take(call.backend->vector.mean_tensors ? R : max_of(P, R));
  plan.resident_theta = shared.take(plan.resident.shared);
  plan.shared = shared.size();
}

template <class S>
index_t plan_slot(const MetaCall<S>& call, index_t tapes, MetaPlan& plan) {
  const Program& program = *call.program;
  const index_t P = program.param_count(), K = call.steps;
  Arena slot;
  plan.own_theta0 = slot.take(call.params.per_task ? P : 0);
  plan.thetas.assign(K + 1, 0);
  for (index_t k = 1; k <= K; ++k) plan.thetas[k] = slot.take(plan.row());
  plan.updates = slot.take(plan.factored.updates);
  plan.gradient = slot.take(call.rates.layout == RateLayout::per_parameter ? P : 0);
  plan.gradients.assign(K, plan.gradient);
  if (call.rate_gradient) {
    for (index_t k = 0; k < K; ++k) plan.gradients[k] = slot.take(P);
    plan.rate_row = slot.take(RateTable<S>::width(program, call.rates));
  }
  const bool alone = call.first_order || (moves_in_place(call) && !alternates(call));
  plan.direction = slot.take(alone ? 0 : plan.row());
  plan.support_x = slot.take(staging_size(program, call.support));
  plan.query_x = slot.take(staging_size(program, call.query));
  plan.tapes.assign(K, 0);
  for (index_t k = 0; k < K; ++k) {
    plan.tapes[k] = k < tapes ? slot.take(plan.support.size) : plan.tapes[0];
  }
  // the query's tape and the tangents are never alive together
  plan.late = slot.take(max_of(plan.query.size, call.first_order ? 0 : plan.tangent.size));
  const index_t most = max_of(call.support.count, call.query.count);
  plan.scratch = slot.take(plan_scratch(program, chunk_of(program, *call.backend, most)));
  return slot.size();
}

template <class S>
MetaPlan make_plan(const MetaCall<S>& call) {
  const Program& program = *call.program;
  MetaPlan plan;
  plan.slots = call.slots;
  plan.resident = plan_resident(call);
  plan.factored = plan_factored(call, !plan.resident.taken);
  if (plan.resident.taken) {
    plan_shared(call, plan);
    plan.kept = !call.first_order && call.steps > 0;
    plan.slot = call.backend->lockstep ? 0 : align_up(plan.resident.slot, kAlignment);
    plan.support.size = plan.resident.tape;
    return plan;
  }
  plan.support = plan_tape(program, call.support.count, call.first_order);
  plan.query = plan_tape(program, chunk_of(program, *call.backend, call.query.count), true);
  plan.tangent = plan_tangent(program, chunk_of(program, *call.backend, call.support.count));
  plan_shared(call, plan);
  const index_t works = plan.slots * call.together();
  const index_t kept_bytes = works * call.steps * plan.support.size * index_t(sizeof(S));
  plan.kept = !call.first_order && call.steps > 0 &&
              (call.memory == Memory::keep ||
               (call.memory == Memory::automatic && kept_bytes <= kKeepBytes));
  plan.slot = plan_slot(call, plan.kept ? call.steps : min_of<index_t>(call.steps, 1), plan);
  return plan;
}

}  // namespace fm
