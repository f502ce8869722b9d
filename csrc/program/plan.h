// The memory of a call, worked out before it runs: C++ allocates none for data.
//
// A tape is what one pass over a network leaves behind for the next: outputs y, adjoints dx and
// what layers save. A tangent is the same for a direction. Offsets are in elements, every region
// starts on a cache line.
#pragma once

#include <vector>

#include "program/program.h"

namespace fm {

// Hands out regions of a workspace one after the other.
class Arena {
 public:
  index_t take(index_t elements) {
    const index_t offset = size_;
    size_ = align_up(size_ + elements, kAlignment / index_t(sizeof(float)));
    return offset;
  }
  index_t size() const { return size_; }

 private:
  index_t size_ = 0;
};

// Where parameters lie in a row of a task's. The weights of layers that are `apart` lie behind all
// others, so that rows without them are rows that end before them.
struct Places {
  std::vector<index_t> layer;      // a layer's slice, or its bias if its weights are apart
  std::vector<index_t> weights;    // of layers that are apart
  std::vector<index_t> parameter;  // each of Program::parameters()
  index_t row = 0;                 // elements but those apart
};

Places plan_places(const Program& program, const std::vector<std::uint8_t>& apart);

struct TapePlan {
  index_t samples = 0;
  std::vector<index_t> y, dx, saved;  // per layer; dx of a layer is the adjoint of its input
  std::vector<index_t> y_size, dx_size, saved_size;  // elements of one sample
  index_t dz = 0, dz_size = 0;                       // adjoint of the output
  index_t size = 0;
};

// `lean` tapes are not read after the backward pass: adjoints take turns in two regions.
TapePlan plan_tape(const Program& program, index_t samples, bool lean);

struct TangentPlan {
  std::vector<index_t> ty;
  index_t tdx[2] = {0, 0}, tdz = 0;
  index_t size = 0;
};

TangentPlan plan_tangent(const Program& program, index_t samples);

// Elements of scratch that the layers of a program ask for, and where behind a layer's own there is
// room for its parameters.
index_t scratch_before_update(const LayerDesc& layer, index_t samples);
index_t plan_scratch(const Program& program, index_t samples);

}  // namespace fm
