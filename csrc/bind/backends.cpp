// Which backends there are in this build. One that is missing is refused by name.
#include "bind/backends.h"

#include <pybind11/stl.h>

#include "bind/module.h"
#include "cpu/backend_cpu.h"
#include "cuda/backend_cuda.h"

namespace fm::bind {
namespace {

constexpr const char* kNames[] = {"cpu", "cpu_lockstep", "cuda", "cuda_emulated"};
static_assert(sizeof(kNames) / sizeof(*kNames) == size_t(BackendKind::count), "a name a backend");

// Null if it was not built.
template <class S>
const Backend<S>* find(BackendKind kind) {
  switch (kind) {
    case BackendKind::cpu:
      return &cpu::backend<S>();
    case BackendKind::cpu_lockstep:
      return &cpu::lockstep_backend<S>();
#if defined(FM_HAVE_CUDA)
    case BackendKind::cuda:
      return &cuda::backend<S>();
#endif
#if defined(FM_HAVE_CUDA_EMULATED)
    case BackendKind::cuda_emulated:
      return &cuda_emulated::backend<S>();
#endif
    default:
      return nullptr;
  }
}

py::dict describe(BackendKind kind) {
  const Backend<float>& b = backend<float>(kind);
  py::dict d;
  d["kind"] = int(kind);
  d["lockstep"] = b.lockstep;
  d["host_memory"] = b.host_memory;
  d["tensor_cores"] = b.tensor_cores;
  d["samples"] = sampling_ops<float>(kind).sinusoids != nullptr;
  return d;
}

}  // namespace

const char* backend_name(BackendKind kind) { return kNames[int(kind)]; }

std::vector<std::string> built_backends() {
  std::vector<std::string> names;
  for (int k = 0; k < int(BackendKind::count); ++k) {
    if (find<float>(BackendKind(k))) names.push_back(kNames[k]);
  }
  return names;
}

template <class S>
const Backend<S>& backend(BackendKind kind) {
  require(int(kind) >= 0 && kind < BackendKind::count, "backend: expected 0 to ",
          int(BackendKind::count) - 1, ", got ", int(kind));
  if (kind == BackendKind::cuda_emulated && recording_backend<S>()) return *recording_backend<S>();
  const Backend<S>* found = find<S>(kind);
  require(found, "backend: this build of fastmaml has no ", backend_name(kind), " backend");
  return *found;
}

template <class S>
tasks::SamplingOps<S> sampling_ops(BackendKind kind) {
  switch (kind) {
#if defined(FM_HAVE_CUDA)
    case BackendKind::cuda:
      return cuda::sampling_ops<S>();
#endif
#if defined(FM_HAVE_CUDA_EMULATED)
    case BackendKind::cuda_emulated:
      return cuda_emulated::sampling_ops<S>();
#endif
    default:
      return {};
  }
}

template const Backend<float>& backend(BackendKind);
template const Backend<double>& backend(BackendKind);
template tasks::SamplingOps<float> sampling_ops(BackendKind);
template tasks::SamplingOps<double> sampling_ops(BackendKind);

// Name -> what a caller must know of it.
void define_backends(py::module_& m) {
  m.def("backends", [] {
    py::dict all;
    for (int k = 0; k < int(BackendKind::count); ++k) {
      if (find<float>(BackendKind(k))) all[kNames[k]] = describe(BackendKind(k));
    }
    return all;
  });
}

}  // namespace fm::bind
