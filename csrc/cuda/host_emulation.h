// CUDA on the CPU: what launch.h gives to kernels where there is no nvcc.
//
// A block's threads are fibers of the calling OS thread; blocks run one after the other. A thread
// runs until it must wait: at __syncthreads for its block, at a warp function for its warp. All of
// them must wait at the same place in the source, else the launch throws fm::Error, which names
// the kernel, the block and the threads that stand elsewhere. Shared memory starts as 0xFF bytes
// (NaN), and so does the target of an asynchronous copy from its issue until its wait, which is
// when the copy lands. With `shuffle_threads(seed)` or FASTMAML_EMULATION_SHUFFLE=seed, blocks,
// and the threads of a block between two barriers, run in a shuffled order, so that results which
// hang on an order show. A kernel that ends, or comes to a barrier, without having awaited the
// kernels before it (early_launch.h) is an error, too.
//
// What it can't tell: speed, registers, bank conflicts, weak memory ordering between blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <typeinfo>

#include "program/backend.h"

#define __launch_bounds__(...)
#define threadIdx (::fm::cuda_emulated::context.thread)
#define blockIdx (::fm::cuda_emulated::context.block)
#define blockDim (::fm::cuda_emulated::context.block_size)
#define gridDim (::fm::cuda_emulated::context.grid_size)

namespace fm::cuda_emulated {

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define FM_VECTOR(T, name)                                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FM_VECTOR(float, float)
FM_VECTOR(double, double)
FM_VECTOR(int, int)
FM_VECTOR(unsigned, uint)
#undef FM_VECTOR

// Where the running thread stands. A plain POD of the OS thread: fibers never change theirs.
struct Context {
  uint3 thread, block, block_size, grid_size;
  void* shared;
};
extern __thread Context context __attribute__((tls_model("initial-exec")));

// A place in the source where threads wait for each other.
struct Place {
  const char* what;
  const char* file;
  int line;
};

// Lets the running launch touch what device_memory of inspect.h gave.
void await_previous_kernels();

void wait_for_block(Place place);
void wait_for_warp(Place place);

// Leaves `bytes` bytes for the other lanes, waits for the warp, and returns what all lanes left,
// kSlot bytes apart; good until the next call.
constexpr int kSlot = 64;
const unsigned char* exchange(const void* mine, std::size_t bytes, Place place);

// Asynchronous copies of the running thread; a null source fills with zeros.
void copy_issue(void* target, const void* source, int bytes, bool valid, Place place);
void copy_commit();
void copy_wait(int groups_left);

// Shuffles the order of threads from now on, in all OS threads; 0 runs them in order.
void shuffle_threads(std::uint64_t seed);

// Throws an Error that names the running kernel, block and thread.
[[noreturn]] void fail_here(const std::string& what);

struct Launch {
  const char* text;            // the arguments of `launch`
  const char* params;          // type of the parameters, mangled: tells the scalar
  void (*run)(const Launch&);  // one thread
  void (*kernel)();
  const void* arguments;
  dim3 grid;
  unsigned block;
  std::size_t shared_bytes;
};
void run_launch(const Launch& call);

std::size_t shared_memory_of_a_block();  // bytes, at most
// Asks `observe` about every launch, in all OS threads, whether to run it; null: runs them all.
void observe_launches(bool (*observe)(const Launch&));

template <class Params>
void launch_named(const char* text, void (*kernel)(Params), dim3 grid, unsigned block,
                  std::size_t shared_bytes, const Exec&, const std::common_type_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "a kernel takes plain data");
  const auto run = [](const Launch& call) {
    reinterpret_cast<void (*)(Params)>(call.kernel)(*static_cast<const Params*>(call.arguments));
  };
  run_launch({text, typeid(Params).name(), run, reinterpret_cast<void (*)()>(kernel), &params, grid,
              block, shared_bytes});
}

// ------------------------------------------------------------------------- inside kernels

#define FM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FM_PLACE) { wait_for_block({"__syncthreads", file, line}); }
inline void __syncwarp(FM_PLACE) { wait_for_warp({"__syncwarp", file, line}); }

template <class S>
S* shared_memory() {
  return static_cast<S*>(context.shared);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

// Fibers of one OS thread take turns, so that nothing can come between.
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  const unsigned before = *p;
  *p += v;
  return before;
}
inline void __threadfence() {}

// What lane `from(lane)` left, or the own value where that is no lane.
template <class T, class From>
T shuffled(T v, From from, Place place) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "a type that warps can exchange");
  const unsigned char* all = exchange(&v, sizeof v, place);
  const unsigned source = from(context.thread.x % 32);
  if (source < 32) std::memcpy(&v, all + source * kSlot, sizeof v);
  return v;
}

template <class T>
T warp_shuffle(T v, int lane, FM_PLACE) {
  return shuffled(v, [=](unsigned) { return unsigned(lane) % 32; }, {"warp_shuffle", file, line});
}
template <class T>
T warp_shuffle_xor(T v, int mask, FM_PLACE) {
  return shuffled(v, [=](unsigned l) { return l ^ unsigned(mask); },
                  {"warp_shuffle_xor", file, line});
}
template <class T>
T warp_shuffle_down(T v, unsigned delta, FM_PLACE) {
  return shuffled(v, [=](unsigned l) { return l + delta; }, {"warp_shuffle_down", file, line});
}

inline unsigned warp_ballot(bool p, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE(), const char* what = "warp_ballot") {
  const unsigned char* all = exchange(&p, sizeof p, {what, file, line});
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= unsigned(all[lane * kSlot] != 0) << lane;
  return mask;
}
inline bool warp_any(bool p, FM_PLACE) { return warp_ballot(p, file, line, "warp_any") != 0; }
inline bool warp_all(bool p, FM_PLACE) {
  return warp_ballot(p, file, line, "warp_all") == 0xffffffffu;
}

}  // namespace fm::cuda_emulated
