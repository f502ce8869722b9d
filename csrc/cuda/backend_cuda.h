// The table of the CUDA backend, as the binding sees it: the one that runs on a GPU, and the one
// that runs its kernels on the CPU (host_emulation.h). A build holds at most one of them.
#pragma once

#include "program/backend.h"

#if defined(FM_HAVE_CUDA)
namespace fm::cuda {
template <class S>
const Backend<S>& backend();
}  // namespace fm::cuda
#endif

#if defined(FM_HAVE_CUDA_EMULATED)
namespace fm::cuda_emulated {
template <class S>
const Backend<S>& backend();
}  // namespace fm::cuda_emulated
#endif
