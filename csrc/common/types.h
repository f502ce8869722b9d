// Integers and small helpers used everywhere. `index_t` counts elements, never bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"

namespace fm {

using index_t = std::int64_t;

// Workspace regions start on a cache line; so do the parameter tensors inside the engine.
constexpr index_t kAlignment = 64;

FM_INLINE index_t align_up(index_t value, index_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class T>
FM_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}

template <class T>
FM_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace fm
