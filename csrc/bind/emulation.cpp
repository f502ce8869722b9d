// What tests ask of emulated kernels; nothing in a build without them.
#include "bind/arguments.h"
#include "bind/module.h"

#if defined(FM_HAVE_CUDA_EMULATED)
#include "cuda/inspect.h"

namespace fm::bind {

void define_emulation(py::module_& m) {
  m.def("device_memory",
        [](index_t bytes) { return Address(cuda_emulated::device_memory(std::size_t(bytes))); });
}

}  // namespace fm::bind

#else

namespace fm::bind {

void define_emulation(py::module_&) {}

}  // namespace fm::bind

#endif
