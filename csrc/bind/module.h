// The parts of the Python module, one for each file of this folder.
#pragma once

#include <pybind11/pybind11.h>

namespace fm::bind {

// Meta-gradients of which everything but the samples stays the same from call to call.
void define_prepared(pybind11::module_& m);
// Steps of outer optimizers over a list of parameters.
void define_optimizers(pybind11::module_& m);
// What was built.
void define_backends(pybind11::module_& m);
// Operations and launches of calls, noted and not run; in builds with emulated CUDA.
void define_launches(pybind11::module_& m);
// Batches of tasks.
void define_sampling(pybind11::module_& m);
// Batches of tasks made by backends in lockstep, in their own memory.
void define_device_sampling(pybind11::module_& m);
// What tests ask of emulated kernels, where there are any.
void define_emulation(pybind11::module_& m);
// Notices changes of objects that prepared calls rely on.
void define_watch(pybind11::module_& m);

}  // namespace fm::bind
