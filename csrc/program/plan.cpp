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

Places plan_places(const Program& program, const std::vector<std::uint8_t>& apart) {
  const auto& layers = program.layers();
  Places places;
  places.weights.assign(layers.size(), 0);
  places.parameter.assign(program.parameters().size(), 0);
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerDesc& d = layers[l];
    const index_t before = apart[l] ? d.bias_offset : 0;
    places.layer.push_back(places.row);
    if (d.has_weight) places.parameter[d.segment] = places.row;
    if (d.has_bias) {
      places.parameter[d.segment + d.segments() - 1] = places.row + d.bias_offset - before;
    }
    places.row += d.param_count - before;
  }
  index_t end = places.row;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (!apart[l]) continue;
    places.weights[l] = places.parameter[layers[l].segment] = end;
    end += layers[l].bias_offset;
  }
  return places;
}

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
    plan.y_size.push_back(layers[l].out.size());
    plan.dx_size.push_back(layers[l].in.size());
    plan.saved_size.push_back(saved_count(layers[l], 1));
    plan.saved.push_back(arena.take(saved_count(layers[l], samples)));
    const bool wanted = index_t(l) > program.first_trainable();
    plan.dx.push_back(!wanted ? 0
                      : lean  ? turns[l % 2]
                              : arena.take(samples * layers[l].in.size()));
  }
  plan.dz = arena.take(samples * program.output().size());
  plan.dz_size = program.output().size();
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

index_t scratch_before_update(const LayerDesc& layer, index_t samples) {
  return align_up(scratch_count(layer, samples), kAlignment / index_t(sizeof(float)));
}

index_t plan_scratch(const Program& program, index_t samples) {
  index_t largest = loss_scratch_count(samples);
  for (const LayerDesc& layer : program.layers()) {
    largest = max_of(largest, scratch_before_update(layer, samples) + layer.param_count);
  }
  return largest;
}

}  // namespace fm
