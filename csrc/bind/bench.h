// What benches call beside the engine's own entries.
#pragma once

#include "program/layer.h"

namespace pybind11 {
class module_;
}

namespace fm {

const char* kind_name(LayerKind kind);
void define_bench(pybind11::module_& m);
void define_ceilings(pybind11::module_& m);

}  // namespace fm
