#include "program/plan.h"

namespace fm {
namespace {

// The largest input of a layer whose adjoint is wanted.
index_t largest_adjoint(const Program& program) {
  index_t largest = 0;
  const auto& layers = program.layers();
  for (size_t l = program.first_trainable() + 1; l < layers.size(); ++l) {
    largest = max_of(largest, layers[l].in.size());
  }
  return largest;
}

}  // namespace

TapePlan plan_tape(const Program& program, index_t samples, bool lean) {
  TapePlan plan;
  plan.samples = samples;
  Arena arena;
  const auto& layers = program.layers();
  index_t turns[2] = {0, 0};
  if (lean) {
    for (index_t& turn : turns) turn = arena.take(samples * largest_adjoint(program));
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    plan.y.push_back(arena.take(samples * layers[l].out.size()));
    plan.saved.push_back(arena.take(saved_count(layers[l], samples)));
    const bool wanted = index_t(l) > program.first_trainable();
    plan.dx.push_back(!wanted ? 0
                      : lean  ? turns[l % 2]
                              : arena.take(samples * layers[l].in.size()));
  }
  plan.dz = arena.take(samples * program.output().size());
  plan.size = arena.size();
  return plan;
}

TangentPlan plan_tangent(const Program& program, index_t samples) {
  TangentPlan plan;
  Arena arena;
  for (const LayerDesc& layer : program.layers()) {
    plan.ty.push_back(arena.take(samples * layer.out.size()));
  }
  for (index_t& turn : plan.tdx) turn = arena.take(samples * largest_adjoint(program));
  plan.tdz = arena.take(samples * program.output().size());
  plan.size = arena.size();
  return plan;
}

index_t plan_scratch(const Program& program, index_t samples) {
  index_t largest = 0;
  for (const LayerDesc& layer : program.layers()) {
    largest = max_of(largest, scratch_count(layer, samples));
  }
  return largest;
}

}  // namespace fm
