// What benches call beside the engine's own entries.
#pragma once

namespace pybind11 {
class module_;
}

namespace fm {

void define_bench(pybind11::module_& m);
void define_ceilings(pybind11::module_& m);

}  // namespace fm
