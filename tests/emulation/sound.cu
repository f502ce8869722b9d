// Kernels that are right, against plain loops: says what differs, or nothing and returns 0.
//
// Covers the geometry of a launch, asynchronous copies in a pipeline, warp functions, reductions,
// and fragments of tensor cores, which are loaded as the tables of the PTX ISA print them.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"

namespace FM_CUDA {

struct Params {
  const float* in;
  float* out;
  int n;
};

// ------------------------------------------------------------------------------- geometry

// out[linear thread] = its number; no barrier, so no fiber is switched to.
FM_KERNEL void number_kernel(const Params p) {
  await_previous_kernels();
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned i = block * blockDim.x + threadIdx.x;
  p.out[i] = float(i);
}

// ------------------------------------------------------------------------- barriers, copies

// Reverses blocks through two buffers, the next one copied while the last one is read.
template <int Bytes>
FM_KERNEL void pipeline_kernel(const Params p) {
  await_previous_kernels();
  constexpr int each = Bytes / 4;
  float* tile = shared_memory<float>();
  const int size = int(blockDim.x) * each, rounds = p.n / size + (p.n % size != 0);
  const auto start = [&](int round) {
    if (round < rounds) {
      const int at = round * size + int(threadIdx.x) * each;
      copy_async<Bytes>(tile + round % 2 * size + threadIdx.x * each, p.in + at, at < p.n);
    }
    copy_async_commit();
  };
  start(0);
  for (int round = 0; round < rounds; ++round) {
    start(round + 1);
    copy_async_wait<1>();
    __syncthreads();
    for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
      p.out[round * size + i] = tile[round % 2 * size + size - 1 - i];
    }
    __syncthreads();
  }
}

// -------------------------------------------------------------------------------- warps

struct WarpParams {
  const double* in;
  double* out;      // [7, threads]
  unsigned* votes;  // [3, threads]
};

FM_KERNEL void warp_kernel(const WarpParams p) {
  await_previous_kernels();
  const unsigned i = threadIdx.x, n = blockDim.x;
  const double v = p.in[i];
  p.out[i] = warp_shuffle(v, 5);
  p.out[n + i] = warp_shuffle(v, int(i * 7 % 32));
  p.out[2 * n + i] = warp_shuffle_xor(v, 3);
  p.out[3 * n + i] = warp_shuffle_down(v, 9u);
  p.out[4 * n + i] = warp_sum(v);
  p.out[5 * n + i] = warp_max(v);
  p.out[6 * n + i] = double(warp_shuffle(int(i), 31));
  p.votes[i] = warp_ballot(v > 0);
  p.votes[n + i] = warp_any(v > 1);
  p.votes[2 * n + i] = warp_all(v > -1);
}

struct ReduceParams {
  const double* in;  // [2, threads]
  double* out;       // [4, threads]
};

FM_KERNEL void reduce_kernel(const ReduceParams p) {
  await_previous_kernels();
  double* partial = shared_memory<double>();
  const unsigned i = threadIdx.x, n = blockDim.x;
  double two[2] = {p.in[i], p.in[n + i]};
  block_sum(two, partial);
  p.out[i] = two[0];
  p.out[n + i] = two[1];
  p.out[2 * n + i] = block_max(p.in[i], partial);
  p.out[3 * n + i] = block_sum(p.in[i], partial);
}

// --------------------------------------------------------------------------- tensor cores

struct ProductParams {
  const float *a, *b;  // [16, K], [K, 8]
  float* d;            // [16, 8], added to
};

// Fragments loaded as the tables of the PTX ISA have them.
FM_KERNEL void tf32_kernel(const ProductParams p) {
  await_previous_kernels();
  const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane % 4;
  unsigned a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8;
    const int column = i == 0 || i == 1 ? in_group : in_group + 4;
    a[i] = to_tf32(p.a[row * 8 + column]);
  }
  for (int i = 0; i < 2; ++i) b[i] = to_tf32(p.b[(in_group + 4 * i) * 8 + group]);
  for (int i = 0; i < 4; ++i) {
    d[i] = p.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  mma_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) {
    p.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
  }
}

FM_KERNEL void bf16_kernel(const ProductParams p) {
  await_previous_kernels();
  const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane % 4;
  float a[8], b[4], d[4];
  for (int i = 0; i < 8; ++i) {
    const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a[i] = p.a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = p.b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
  }
  for (int i = 0; i < 4; ++i) {
    d[i] = p.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  const unsigned pa[4] = {pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(a[4], a[5]),
                          pack_bf16(a[6], a[7])};
  const unsigned pb[2] = {pack_bf16(b[0], b[1]), pack_bf16(b[2], b[3])};
  mma_bf16(d, pa, pb);
  for (int i = 0; i < 4; ++i) {
    p.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
  }
}

// out[3, n]: to_tf32, and the two parts of split_tf32.
FM_KERNEL void split_kernel(const Params p) {
  await_previous_kernels();
  const int i = int(threadIdx.x);
  unsigned big, small;
  split_tf32(p.in[i], big, small);
  p.out[i] = as_float(to_tf32(p.in[i]));
  p.out[p.n + i] = as_float(big);
  p.out[2 * p.n + i] = as_float(small);
}

}  // namespace FM_CUDA

#if !defined(__CUDACC__)
using namespace FM_CUDA;

std::atomic<int> failures{0};

void check(bool good, const std::string& what) {
  if (good) return;
  std::fputs(("differs: " + what + "\n").c_str(), stdout);
  ++failures;
}

// Numbers that differ in every place: a fixed walk through (-1, 1).
double number(int i) { return std::fmod(0.6180339887498949 * (i + 1), 1.0) * 2 - 1; }

template <class S>
std::vector<S> numbers(int n, int from = 0) {
  std::vector<S> v;
  for (int i = 0; i < n; ++i) v.push_back(S(number(from + i)));
  return v;
}

void geometry() {
  for (unsigned block : {32u, 96u, 1024u}) {
    std::vector<float> out(2 * 3 * 4 * block, -1.0f);
    launch(number_kernel, dim3(2, 3, 4), block, 0, {}, {nullptr, out.data(), 0});
    for (std::size_t i = 0; i < out.size(); ++i) check(out[i] == float(i), "geometry");
  }
}

template <int Bytes>
void pipeline(int rounds, int missing) {
  const int threads = 64, size = threads * Bytes / 4;
  const std::vector<float> in = numbers<float>(rounds * size - missing);
  std::vector<float> out(rounds * size, -2.0f);
  launch(pipeline_kernel<Bytes>, 1, unsigned(threads), 2 * size * sizeof(float), {},
         {in.data(), out.data(), int(in.size())});
  for (int r = 0; r < rounds; ++r) {
    for (int i = 0; i < size; ++i) {
      const std::size_t from = std::size_t(r * size + size - 1 - i);
      check(out[r * size + i] == (from < in.size() ? in[from] : 0.0f), "pipeline");
    }
  }
}

void warps() {
  for (unsigned n : {32u, 256u}) {
    const std::vector<double> in = numbers<double>(int(n));
    std::vector<double> out(7 * n);
    std::vector<unsigned> votes(3 * n);
    launch(warp_kernel, 1, n, 0, {}, {in.data(), out.data(), votes.data()});
    for (unsigned i = 0; i < n; ++i) {
      const unsigned base = i / 32 * 32, lane = i % 32;
      const double* w = in.data() + base;
      check(out[i] == w[5], "shuffle");
      check(out[n + i] == w[i * 7 % 32], "shuffle from each");
      check(out[2 * n + i] == w[lane ^ 3], "shuffle_xor");
      check(out[3 * n + i] == w[lane + 9 < 32 ? lane + 9 : lane], "shuffle_down");
      double sum = 0, largest = w[0];
      unsigned positive = 0;
      for (int l = 0; l < 32; ++l) {
        sum += w[l];
        largest = w[l] > largest ? w[l] : largest;
        positive |= unsigned(w[l] > 0) << l;
      }
      check(std::abs(out[4 * n + i] - sum) < 1e-13, "warp_sum");
      check(out[4 * n + i] == out[4 * n + base], "warp_sum: the same bits in all lanes");
      check(out[5 * n + i] == largest, "warp_max");
      check(out[6 * n + i] == double(base + 31), "shuffle of an int");
      check(votes[i] == positive, "ballot");
      check(votes[n + i] == 0 && votes[2 * n + i] == 1, "any and all");
    }
  }
}

void reductions() {
  for (unsigned n : {32u, 96u, 512u, 1024u}) {
    const std::vector<double> in = numbers<double>(int(2 * n));
    std::vector<double> out(4 * n);
    launch(reduce_kernel, 1, n, 2 * 32 * sizeof(double), {}, {in.data(), out.data()});
    double sums[2] = {0, 0}, largest = in[0];
    for (unsigned i = 0; i < n; ++i) {
      sums[0] += in[i];
      sums[1] += in[n + i];
      largest = in[i] > largest ? in[i] : largest;
    }
    for (unsigned i = 0; i < n; ++i) {
      check(std::abs(out[i] - sums[0]) < 1e-12, "block_sum");
      check(std::abs(out[n + i] - sums[1]) < 1e-12, "block_sum of two");
      check(out[2 * n + i] == largest, "block_max");
      check(out[3 * n + i] == out[0] && out[i] == out[0], "block_sum: always the same bits");
    }
  }
}

float rounded(float x, int bits) {  // to so many bits of the fraction
  int exponent;
  const float fraction = std::frexp(x, &exponent);
  return std::ldexp(std::round(std::ldexp(fraction, bits + 1)), exponent - bits - 1);
}

void products() {
  for (int k : {8, 16}) {
    const std::vector<float> a = numbers<float>(16 * k), b = numbers<float>(k * 8, 1000);
    std::vector<float> d = numbers<float>(16 * 8, 2000), start = d;
    const ProductParams params = {a.data(), b.data(), d.data()};
    if (k == 8) launch(tf32_kernel, 1, 32, 0, {}, params);
    if (k == 16) launch(bf16_kernel, 1, 32, 0, {}, params);
    const int bits = k == 8 ? 10 : 7;
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double sum = start[i * 8 + j];
        for (int l = 0; l < k; ++l) {
          sum += double(rounded(a[i * k + l], bits)) * double(rounded(b[l * 8 + j], bits));
        }
        check(std::abs(d[i * 8 + j] - sum) < 1e-6, k == 8 ? "mma_tf32" : "mma_bf16");
      }
    }
  }
}

void splits() {
  std::vector<float> in = numbers<float>(32);
  in[0] = 0;
  in[1] = 1 + 0x1p-11f;  // a tie: away from zero
  in[2] = -1 - 0x1p-11f;
  in[3] = INFINITY;
  in[4] = NAN;
  in[5] = 0x1.fffffep127f;  // rounds to infinity
  std::vector<float> out(96);
  launch(split_kernel, 1, 32, 0, {}, {in.data(), out.data(), 32});
  check(out[0] == 0 && out[1] == 1 + 0x1p-10f && out[2] == -1 - 0x1p-10f, "ties of tf32");
  check(out[3] == INFINITY && std::isnan(out[4]) && out[5] == INFINITY, "ends of tf32");
  for (int i = 6; i < 32; ++i) {
    check(out[i] == rounded(in[i], 10) && out[32 + i] == out[i], "to_tf32");
    check(std::abs(in[i] - out[32 + i] - out[64 + i]) <= std::abs(in[i]) * 0x1p-22f, "split_tf32");
  }
}

// Several callers, each with a machine of its own.
void callers() {
  std::vector<std::thread> all;
  for (int i = 0; i < 3; ++i) {
    all.emplace_back([] {
      reductions();
      pipeline<16>(5, 4);
    });
  }
  for (std::thread& thread : all) thread.join();
}

int main() {
  for (std::uint64_t seed : {0, 1, 2}) {
    shuffle_threads(seed);
    geometry();
    for (int rounds : {1, 2, 5}) {
      pipeline<4>(rounds, 0);
      pipeline<8>(rounds, 2);
      pipeline<16>(rounds, 4);
    }
    warps();
    reductions();
    products();
    splits();
    callers();
  }
  return failures != 0;
}
#endif
