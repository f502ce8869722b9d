// Backends by name, and where a call runs.
#pragma once

#include <string>
#include <vector>

#include "bind/arguments.h"
#include "cuda/sampling.h"

namespace fm::bind {

// In the order of their names in `backend_names`; "cpu_lockstep" and "cuda_emulated" serve tests.
enum class BackendKind : int { cpu, cpu_lockstep, cuda, cuda_emulated, count };

const char* backend_name(BackendKind kind);
// Those that this module was built with.
std::vector<std::string> built_backends();
// Throws `Error` if it was not built.
template <class S>
const Backend<S>& backend(BackendKind kind);
// Its samplers of tasks, null where it has none.
template <class S>
tasks::SamplingOps<S> sampling_ops(BackendKind kind);

// The table that notes what is asked of the emulated CUDA backend; null unless a recording is on.
template <class S>
const Backend<S>* recording_backend();

// (backend, stream, precision, the program's tables, adapted flags); the last two are addresses in
// backend memory, 0 where that is the host's.
using PlaceTuple = std::tuple<int, Address, int, Address, Address>;

template <class S>
void place(Call<S>& call, const PlaceTuple& p) {
  call.backend = &backend<S>(BackendKind(std::get<0>(p)));
  call.exec.context = at<const void>(std::get<1>(p));
  call.exec.precision = Precision(std::get<2>(p));
  require(call.exec.precision == Precision::float32 || call.backend->tensor_cores,
          "precision: the backend ", call.backend->name, " computes in float32 alone");
  call.tables = at<const void>(std::get<3>(p));
  require(call.backend->host_memory || call.tables, "tables: expected an address, got none");
}

}  // namespace fm::bind
