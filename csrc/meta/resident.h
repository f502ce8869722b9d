// Which calls a backend may do task by task, each in one piece, and how it sees them.
//
// Such a backend does everything the driver does for a task (meta_gradient.cpp has the formulas),
// and the sum over tasks. It is asked whether it takes the program and the numbers of samples; what
// it is never asked stands in `plan_resident`.
#pragma once

#include "meta/options.h"

namespace fm {

// Whether a chain step is lambda -= a (H lambda) with one number a, lambda being zero on layers
// that stand still.
template <class S>
bool has_one_rate(const MetaCall<S>& call) {
  if (call.rates.layout != RateLayout::scalar) return false;
  for (const LayerDesc& d : call.program->layers()) {
    for (index_t i = 1; i < d.segments(); ++i) {
      if (call.rates.adapted[d.segment] != call.rates.adapted[d.segment + i]) return false;
    }
  }
  return true;
}

// The call as a backend that does whole tasks would see it; without rates, which are nowhere yet.
template <class S>
ResidentCall<S> resident_call(const MetaCall<S>& call) {
  ResidentCall<S> r;
  r.program = call.program;
  r.tasks = call.tasks;
  r.steps = call.steps;
  r.support = call.support.count;
  r.query = call.query.count;
  r.first_order = call.first_order;
  r.loss_weights = call.loss_weights.data();
  r.rate_rows = call.rates.steps;
  r.one_rate = has_one_rate(call) ? call.rates.values : nullptr;
  r.adapted = call.rates.adapted.data();
  return r;
}

// What the backend is not asked: a say about memory, gradients of rates, rates of single
// parameters, parameters of a task's own, images.
template <class S>
ResidentSizes plan_resident(const MetaCall<S>& call) {
  if (!call.backend->resident.plan || call.memory != Memory::automatic || call.rate_gradient ||
      call.rates.layout == RateLayout::per_parameter || call.params.per_task ||
      call.program->input().pixels() > 1) {
    return {};
  }
  return call.backend->resident.plan(resident_call(call));
}

}  // namespace fm
