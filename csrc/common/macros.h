// Compiler vocabulary. Everything that a kernel file shares with another translation unit is
// FM_INLINE: kernel files are compiled once per instruction set, and a plain inline function would
// be merged by the linker into whichever copy it met first.
#pragma once

#if defined(__CUDACC__)
#define FM_HD __host__ __device__
#else
#define FM_HD
#endif

// Before a loop with constant bounds. nvcc reads a file once for each side, and neither side knows
// the other's pragma.
#if defined(__CUDA_ARCH__)
#define FM_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define FM_UNROLL
#else
#define FM_UNROLL _Pragma("GCC unroll 32")
#endif

#define FM_INLINE FM_HD inline __attribute__((always_inline))
#define FM_RESTRICT __restrict__
