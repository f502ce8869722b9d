// Kernels with a fault each, and sound twins: `planted CASE [SEED]` says what became of one.
//
// Prints "right" or "wrong" for its results, or the message of the error that the launch threw.
// SEED runs the threads in a shuffled order. After a fault a sound kernel runs, to see that the
// emulation has recovered. tests/test_host_emulation.py knows what each case must say.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/inspect.h"
#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"

namespace FM_CUDA {

struct Params {
  const float* in;
  float* out;
  int n;
};

// ---------------------------------------------------------------------- missing barriers

enum class Barrier { none, warp, block };

template <Barrier B>
FM_DEVICE void barrier() {
  if constexpr (B == Barrier::warp) __syncwarp();
  if constexpr (B == Barrier::block) __syncthreads();
}

// Reads what a thread further on has written.
template <Barrier B>
FM_KERNEL void reverse_kernel(const Params p) {
  await_previous_kernels();
  float* tile = shared_memory<float>();
  const unsigned i = threadIdx.x;
  tile[i] = p.in[i];
  barrier<B>();
  p.out[i] = tile[blockDim.x - 1 - i];
}

// Reads what a thread before has written: right in order, whatever the barrier.
template <Barrier B>
FM_KERNEL void previous_kernel(const Params p) {
  await_previous_kernels();
  float* tile = shared_memory<float>();
  const unsigned i = threadIdx.x;
  tile[i] = p.in[i];
  barrier<B>();
  p.out[i] = tile[i == 0 ? 0 : i - 1];
}

// Lanes of one warp exchange.
template <Barrier B>
FM_KERNEL void pairs_kernel(const Params p) {
  await_previous_kernels();
  float* tile = shared_memory<float>();
  const unsigned i = threadIdx.x;
  tile[i] = p.in[i];
  barrier<B>();
  p.out[i] = tile[i ^ 1];
}

// Two rounds through one tile: the second write must wait for the readers of the first.
template <Barrier B>
FM_KERNEL void reuse_kernel(const Params p) {
  await_previous_kernels();
  float* tile = shared_memory<float>();
  const unsigned i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[i] = p.in[i] * float(1 + round);
    __syncthreads();
    sum += tile[(i + 32) % blockDim.x];
    barrier<B>();
  }
  p.out[i] = sum;
}

// Blocks that hand on through global memory, which no barrier orders.
FM_KERNEL void chain_kernel(const Params p) {
  await_previous_kernels();
  if (threadIdx.x == 0) p.out[blockIdx.x] = blockIdx.x == 0 ? 1 : p.out[blockIdx.x - 1] + 1;
}

// ------------------------------------------------------------------- the kernels before

template <int Fault>
FM_KERNEL void await_kernel(const Params p) {
  if (Fault == 0) await_previous_kernels();
  if (Fault == 1 && threadIdx.x < 8) await_previous_kernels();
  if (Fault == 2) __syncthreads();
  if (Fault < 2 || Fault == 3) p.out[threadIdx.x] = p.in[threadIdx.x] + float(threadIdx.x + 1);
  if (Fault > 1) await_previous_kernels();
}

// ------------------------------------------------------------------- divergent barriers

template <int Fault>
FM_KERNEL void diverge_kernel(const Params p) {
  await_previous_kernels();
  const unsigned i = threadIdx.x;
  if (Fault == 0 && i >= 40) return;  // before a barrier
  if (Fault == 1) {
    if (i < 64) {
      __syncthreads();
    } else {
      __syncthreads();  // another one
    }
  }
  if (Fault == 2 && i % 32 < 16) p.out[i] = warp_sum(p.in[i]);
  if (Fault == 3) {
    unsigned a[4] = {}, b[2] = {};
    float d[4] = {};
    if (i != 37) mma_tf32(d, a, b);
    p.out[i] = d[0];
  }
  if (Fault == 4) {  // lanes at a barrier of their warp, and of their block
    if (i == 5) __syncwarp();
  }
  if (Fault == 5) {  // a trip more for some lanes
    for (unsigned trip = 0; trip < 2 + i / 16 % 2; ++trip) p.out[i] = warp_shuffle(p.in[i], 0);
  }
  __syncthreads();
  p.out[i] = p.in[i];
}

// ----------------------------------------------------------------------- bounds, alignment

template <int Fault>
FM_KERNEL void bounds_kernel(const Params p) {
  await_previous_kernels();
  float* tile = shared_memory<float>();  // [blockDim.x]
  const unsigned i = threadIdx.x, n = blockDim.x;
  if (Fault == 0) tile[i == 7 ? n : i] = p.in[i];  // writes behind the end
  if (Fault == 1) p.out[i] = tile[i == 7 ? n : i];
  if (Fault == 2) {
    p.out[i] = reinterpret_cast<const float4*>(p.in + (i == 7 ? 1 : 0))->x;
  }
}

template <int Fault>
FM_KERNEL void copy_kernel(const Params p) {
  await_previous_kernels();
  float* tile = shared_memory<float>();  // [2, blockDim.x, 4]
  const unsigned i = threadIdx.x, n = blockDim.x;
  const unsigned from = Fault == 1 && i == 7 ? 1 : 0;  // elements off
  const unsigned to = Fault == 2 && i == 7 ? 2 : Fault == 3 && i == n - 1 ? 4 * n + 4 : 0;
  copy_async<16>(tile + 4 * i + to, p.in + 4 * i + from, true);
  copy_async_commit();
  copy_async<16>(tile + 4 * (n + i), p.in + 4 * i, true);
  copy_async_commit();
  if (Fault == 4) {  // no wait
  } else if (Fault == 5) {
    copy_async_wait<1>();  // leaves the second group on its way
  } else {
    copy_async_wait<0>();
  }
  if (Fault != 6) __syncthreads();  // the wait is each thread's own
  const unsigned other = n - 1 - i;
  p.out[i] = tile[4 * other] + tile[4 * (n + other)] - p.in[4 * other];
  if (Fault == 7) {  // copies to where others still read
    copy_async<16>(tile + 4 * i, p.in + 4 * i, true);
  }
}

FM_KERNEL void nested_kernel(const Params p) {
  await_previous_kernels();
  launch(chain_kernel, 1, 32, 0, {}, p);
}

}  // namespace FM_CUDA

#if !defined(__CUDACC__)
using namespace FM_CUDA;

namespace {

constexpr int kThreads = 128;
constexpr std::size_t kBytes = kThreads * sizeof(float);
alignas(16) float in[4 * kThreads + 4], out[4 * kThreads];

using Run = void (*)(const Params&);
using Expect = float (*)(int);

float reversed(int i) { return in[kThreads - 1 - i]; }
float reversed4(int i) { return in[4 * (kThreads - 1 - i)]; }
float previous(int i) { return in[i == 0 ? 0 : i - 1]; }
float pair(int i) { return in[i ^ 1]; }
float reused(int i) { return in[(i + 32) % kThreads] * 3; }
float counted(int i) { return float(i + 1); }
float same(int i) { return in[i]; }
float zero(int) { return 0; }

template <auto Kernel>
void block(const Params& p) {
  launch(Kernel, 1, kThreads, kBytes, {}, p);
}
template <auto Kernel>
void copies(const Params& p) {
  launch(Kernel, 1, kThreads, 8 * kBytes, {}, p);
}

// Reads memory that is closed to the host.
template <int Fault>
void awaits(const Params& p) {
  const void* closed = device_memory(kThreads * sizeof(float));
  launch(await_kernel<Fault>, 1, kThreads, 0, {}, {static_cast<const float*>(closed), p.out, p.n});
}

struct Case {
  Run run;
  Expect expect;
};

const std::map<std::string, Case> cases = {
    {"reverse", {block<reverse_kernel<Barrier::block>>, reversed}},
    {"reverse without", {block<reverse_kernel<Barrier::none>>, reversed}},
    {"previous", {block<previous_kernel<Barrier::block>>, previous}},
    {"previous without", {block<previous_kernel<Barrier::none>>, previous}},
    {"previous warp only", {block<previous_kernel<Barrier::warp>>, previous}},
    {"pairs", {block<pairs_kernel<Barrier::warp>>, pair}},
    {"pairs without", {block<pairs_kernel<Barrier::none>>, pair}},
    {"reuse", {block<reuse_kernel<Barrier::block>>, reused}},
    {"reuse without", {block<reuse_kernel<Barrier::none>>, reused}},
    {"chain", {[](const Params& p) { launch(chain_kernel, kThreads, 32, 0, {}, p); }, counted}},
    {"await", {awaits<0>, counted}},
    {"await by some", {awaits<1>, counted}},
    {"await behind a barrier", {awaits<2>, counted}},
    {"await too late", {awaits<3>, counted}},
    {"return", {[](const Params& p) { launch(diverge_kernel<0>, 3, kThreads, 0, {}, p); }, same}},
    {"two barriers", {block<diverge_kernel<1>>, same}},
    {"half a warp", {block<diverge_kernel<2>>, same}},
    {"mma", {block<diverge_kernel<3>>, same}},
    {"two kinds", {block<diverge_kernel<4>>, same}},
    {"trips", {block<diverge_kernel<5>>, same}},
    {"no fault", {block<diverge_kernel<9>>, same}},
    {"write behind", {block<bounds_kernel<0>>, zero}},
    {"read behind", {block<bounds_kernel<1>>, zero}},
    {"vector", {block<bounds_kernel<2>>, zero}},
    {"copy", {copies<copy_kernel<0>>, reversed4}},
    {"copy source", {copies<copy_kernel<1>>, reversed4}},
    {"copy target", {copies<copy_kernel<2>>, reversed4}},
    {"copy behind", {copies<copy_kernel<3>>, reversed4}},
    {"copy without wait", {copies<copy_kernel<4>>, reversed4}},
    {"copy half a wait", {copies<copy_kernel<5>>, reversed4}},
    {"copy without barrier", {copies<copy_kernel<6>>, reversed4}},
    {"copy too early", {copies<copy_kernel<7>>, reversed4}},
    {"shared", {[](const Params& p) { launch(chain_kernel, 1, 32, 232449, {}, p); }, zero}},
    {"shared at most",
     {[](const Params& p) { launch(chain_kernel, 1, 32, 232448, {}, p); },
      [](int i) { return i == 0 ? 1.0f : 0.0f; }}},
    {"block 1056", {[](const Params& p) { launch(chain_kernel, 1, 1056, 0, {}, p); }, zero}},
    {"block 48", {[](const Params& p) { launch(chain_kernel, 1, 48, 0, {}, p); }, zero}},
    {"block 0", {[](const Params& p) { launch(chain_kernel, 1, 0, 0, {}, p); }, zero}},
    {"grid", {[](const Params& p) { launch(chain_kernel, dim3(1, 0), 32, 0, {}, p); }, zero}},
    {"nested", {[](const Params& p) { launch(nested_kernel, 1, 32, 0, {}, p); }, zero}},
};

std::string outcome(const Case& c) {
  for (int i = 0; i < 4 * kThreads; ++i) in[i] = float(i * 7 % 31) + 0.5f;
  for (float& x : out) x = 0;
  try {
    c.run({in, out, kThreads});
  } catch (const fm::Error& error) {
    return error.what();
  }
  for (int i = 0; i < kThreads; ++i) {
    if (!(out[i] == c.expect(i))) return "wrong";
  }
  return "right";
}

}  // namespace

int main(int count, char** words) {
  if (count > 2) shuffle_threads(std::strtoull(words[2], nullptr, 10));
  const auto found = cases.find(count > 1 ? words[1] : "");
  std::string said = found == cases.end() ? "no such case" : outcome(found->second);
  if (outcome(cases.at("reverse")) != "right") said += "; and nothing runs afterwards";
  std::fputs((said + "\n").c_str(), stdout);
}
#endif
