// Packs: what a thread moves in one access of up to 16 bytes, and how a launch chooses their width.
//
// Pack<S, W> is W neighbouring elements. W is 16 / sizeof(S) where all pointers of a launch lie on
// 16 bytes and rows hold whole packs, else 1; both are the same kernel with another W, and give the
// same bits. Kernels that walk over a flat array take its last, incomplete pack one by one.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/error.h"
#include "common/types.h"
#include "cuda/launch.h"

// For loops whose length is not known: so many accesses in flight, or as little code as there may
// be.
#if defined(__CUDACC__)
#define FM_UNROLL_BY_TWO _Pragma("unroll 2")
#define FM_UNROLL_BY_FOUR _Pragma("unroll 4")
#define FM_UNROLL_BY_EIGHT _Pragma("unroll 8")
#define FM_NO_UNROLL _Pragma("unroll 1")
// The compiler moves no access to memory over this.
#define FM_KEEP_ORDER() asm volatile("" ::: "memory")
#else
#define FM_KEEP_ORDER()
#define FM_UNROLL_BY_TWO
#define FM_UNROLL_BY_FOUR
#define FM_UNROLL_BY_EIGHT
#define FM_NO_UNROLL
#endif

// At the end of a layer's file: its four passes, for a scalar.
#define FM_INSTANTIATE_PASSES(layer, S)                                    \
  template void layer##_forward(const LayerArgs<S>&, const Exec&);         \
  template void layer##_backward(const LayerArgs<S>&, const Exec&);        \
  template void layer##_tangent_forward(const LayerArgs<S>&, const Exec&); \
  template void layer##_tangent_backward(const LayerArgs<S>&, const Exec&)

namespace FM_CUDA {

constexpr unsigned kThreads = 256;

template <class S>
constexpr int kPack = int(16 / sizeof(S));

template <class S, int W>
struct alignas(W * sizeof(S)) Pack {
  S at[W];
};

template <int W, class S>
FM_DEVICE Pack<S, W> load(const S* p) {
  return *reinterpret_cast<const Pack<S, W>*>(p);
}

// Zeros where there is nothing: a null tangent means zero.
template <int W, class S>
FM_DEVICE Pack<S, W> load_or_zero(const S* p, index_t offset) {
  return p ? load<W>(p + offset) : Pack<S, W>{};
}

// p + offset, null where p is.
template <class T>
FM_DEVICE T* shifted(T* p, index_t offset) {
  return p ? p + offset : nullptr;
}

template <int W, class S>
FM_DEVICE void store(S* p, const Pack<S, W>& pack) {
  *reinterpret_cast<Pack<S, W>*>(p) = pack;
}

// Whether all pointers lie on 16 bytes; null ones do.
inline bool on_packs(std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<std::uintptr_t>(p);
  return bits % 16 == 0;
}

inline index_t divide_up(index_t n, index_t by) { return (n + by - 1) / by; }

// Blocks of kThreads threads for `n` items, whose places kernels decode in 32 bits.
inline unsigned flat_blocks(index_t n, const char* what) {
  require(n < (index_t(1) << 31), what, ": expected fewer than 2^31 items a launch, got ", n,
          "; use fewer tasks or samples a call");
  return unsigned(divide_up(n, kThreads));
}

}  // namespace FM_CUDA
