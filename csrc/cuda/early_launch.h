// Programmatic dependent launch: a kernel's blocks take their places while the kernel before it in
// the stream still runs, so that most of launching is over when they may begin. For GPUs of compute
// capability 9.0 and later; elsewhere kernels are launched as ever.
//
// Every kernel begins with await_previous_kernels(), in all threads, before it touches global
// memory. It waits until the kernels before it have ended with all that they wrote, then lets the
// next kernel's blocks come. Nothing else about memory or order changes:
//
//   ours, ours     B waits for the end of A, and A doesn't end before its own wait does: what was
//                  before A has ended too. The blocks of B come when all blocks of A have their
//                  places and are past their wait. So B takes no place from A, nothing waits for a
//                  block that has no place, and never more than one kernel's blocks wait.
//   torch's, ours  A kernel that lets nobody come early is overtaken only as its last blocks exit,
//                  and ours waits for its end. One that does (torch compiles such) must itself wait
//                  before it ends, as ours do, or its own results would be wrong.
//   ours, torch's  Launched without the attribute, theirs starts when ours has ended, and so all
//                  before. With it, theirs waits as ours would.
//   others         Copies, events, other streams and the host wait for the end of a kernel, and a
//                  kernel behind them begins behind them: the attribute is about the edge from a
//                  kernel to the next one in its stream.
//   graphs         Capture makes such edges programmatic, from CUDA 12.3 on. A graph's first kernel
//                  has none, and a graph ends when all its kernels have.
//
// What it may cost: blocks are placed while those before still hold their places, so that a grid
// smaller than the GPU may lie on it less evenly. They are let come behind the wait, not before, so
// that this concerns one kernel, not a chain of them. No GPU has told yet; bench/gpu.sh asks it.
//
// Machine code from PTX for older GPUs has no wait, and must not begin early on newer ones. And
// kernels read nothing by __restrict__ or __ldg: such loads go around the memory model, and
// compilers have moved them before the wait (github.com/ggml-org/llama.cpp, pull request 24030).
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "cuda/settings.h"

namespace fm::cuda {

__device__ __forceinline__ void await_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

constexpr int kEarlyCuda = 12030, kEarlyCode = 90;  // versions of CUDA, of PTX's architecture

// Whether the current device may begin this kernel early. An error says no, and is left to the
// launch to find.
inline bool asks_for_early(const void* kernel) {
  int driver = 0;
  cudaFuncAttributes code{};
  return CUDART_VERSION >= kEarlyCuda && cudaDriverGetVersion(&driver) == cudaSuccess &&
         driver >= kEarlyCuda && cudaFuncGetAttributes(&code, kernel) == cudaSuccess &&
         code.ptxVersion >= kEarlyCode && code.binaryVersion >= kEarlyCode;
}

// The same, asked once a device: all kernels are compiled for the same architectures.
inline bool begins_early(const void* kernel) {
  constexpr std::size_t kDevices = 64;
  static std::array<std::atomic<signed char>, kDevices> known{};  // 0: not yet, 1: no, 2: yes
  int device = 0;
  if (!early_launches() || cudaGetDevice(&device) != cudaSuccess) return false;
  if (std::size_t(device) >= kDevices) return asks_for_early(kernel);
  std::atomic<signed char>& answer = known[std::size_t(device)];
  if (answer == 0) answer = asks_for_early(kernel) ? 2 : 1;
  return answer == 2;
}

}  // namespace fm::cuda
