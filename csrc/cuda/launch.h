// What a kernel file is written in. First include of every .cu, which is compiled twice:
//
//   by nvcc    namespace fm::cuda           kernels run on a GPU
//   by g++     namespace fm::cuda_emulated  kernels run on the CPU, see host_emulation.h
//
//   template <class S> FM_KERNEL void scale_kernel(const ScaleParams<S> p) {
//     await_previous_kernels();
//     ...
//   }
//   launch(scale_kernel<S>, dim3(blocks), 256, shared_bytes, exec, params);
//
// A kernel takes one POD by value, has blocks of blockDim.x threads (a multiple of the 32 of a
// warp), and shared memory that is dynamic only: `shared_memory<S>()`, aligned to 16 bytes. Warp
// functions are for full warps: all 32 lanes call them together. A kernel first of all awaits those
// before it, see early_launch.h. `launch` is a macro because an error names the kernel as the
// source does.
#pragma once

#include <cstddef>
#include <string>
#include <type_traits>

#include "common/error.h"
#include "common/types.h"
#include "program/backend.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FM_CUDA fm::cuda
#define FM_KERNEL __global__
#define FM_DEVICE __device__ __forceinline__
#else
#define FM_CUDA fm::cuda_emulated
#define FM_KERNEL
#define FM_DEVICE inline
#endif

#define launch(...) launch_named(#__VA_ARGS__, __VA_ARGS__)

namespace FM_CUDA {

constexpr unsigned kWarp = 32;

// Blocks of `size` threads or elements that cover n of them.
FM_INLINE unsigned blocks_for(index_t n, index_t size) { return unsigned((n + size - 1) / size); }

// The kernel in the text of a launch: all before the comma that ends the first argument.
inline std::string kernel_name(const std::string& text) {
  int open = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '<' || c == '(') ++open;
    if (c == '>' || c == ')') --open;
    if (c == ',' && open == 0) return text.substr(0, i);
  }
  return text;
}

}  // namespace FM_CUDA

#if defined(__CUDACC__)
#include "cuda/early_launch.h"

namespace FM_CUDA {

template <class S>
FM_DEVICE S* shared_memory() {
  extern __shared__ __align__(16) unsigned char fm_shared_memory[];
  return reinterpret_cast<S*>(fm_shared_memory);
}

template <class T>
FM_DEVICE T warp_shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
template <class T>
FM_DEVICE T warp_shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
FM_DEVICE T warp_shuffle_down(T v, unsigned delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
FM_DEVICE bool warp_any(bool p) { return __any_sync(0xffffffffu, p); }
FM_DEVICE bool warp_all(bool p) { return __all_sync(0xffffffffu, p); }
FM_DEVICE unsigned warp_ballot(bool p) { return __ballot_sync(0xffffffffu, p); }

inline void check_cuda(cudaError_t status, const char* text, const char* doing) {
  if (status == cudaSuccess) return;
  const bool foreign = status == cudaErrorNoKernelImageForDevice;
  fail(kernel_name(text), ": ", doing, ": ", cudaGetErrorString(status), " (",
       cudaGetErrorName(status), ")",
       foreign ? "; rebuild with this GPU's compute capability in FASTMAML_CUDA_ARCHS" : "");
}

// What a block may ask for on the current device, in bytes.
inline std::size_t shared_memory_of_a_block() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "shared memory", "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory", "asking for its size");
  return std::size_t(bytes);
}

constexpr std::size_t kSharedWithoutAsking = 48 << 10;

template <class Params>
void launch_named(const char* text, void (*kernel)(Params), dim3 grid, unsigned block,
                  std::size_t shared_bytes, const Exec& exec,
                  const std::common_type_t<Params>& params) {
  if (shared_bytes > kSharedWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
               text, "asking for shared memory");
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = cudaStream_t(const_cast<void*>(exec.context));
  config.attrs = &early;
  config.numAttrs = begins_early(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(params)), text, "launch");
}

}  // namespace FM_CUDA

#else
#include "cuda/host_emulation.h"
#endif
