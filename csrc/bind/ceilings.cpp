// For bench/ alone: what one core can do at most, in multiply-adds and in bytes.
#include <pybind11/pybind11.h>

#include <chrono>
#include <string>
#include <vector>

#include "bind/bench.h"
#include "common/error.h"
#include "common/types.h"
#include "cpu/backend_cpu.h"

namespace fm {
namespace {
volatile float ceiling_sink;
}
}  // namespace fm

#define FM_CEILING_NAME ceilings_baseline
#define FM_CEILING_TARGET
#define FM_CEILING_BYTES 16
#define FM_CEILING_CHAINS 12
#include "bind/ceilings.inl.h"
#if defined(__x86_64__)
#define FM_CEILING_NAME ceilings_avx2
#define FM_CEILING_TARGET __attribute__((target("avx2,fma")))
#define FM_CEILING_BYTES 32
#define FM_CEILING_CHAINS 12
#include "bind/ceilings.inl.h"
#define FM_CEILING_NAME ceilings_avx512
#define FM_CEILING_TARGET __attribute__((target("avx512f,fma")))
#define FM_CEILING_BYTES 64
#define FM_CEILING_CHAINS 24
#include "bind/ceilings.inl.h"
#endif

namespace py = pybind11;

namespace fm {
namespace {

using Stream = void (*)(const float*, float*, index_t);

struct Loops {
  double (*multiply_adds)(index_t);
  Stream read, write, copy;
};

#define FM_CEILING_LOOPS(n) {n::multiply_adds, n::read_stream, n::write_stream, n::copy_stream}

// With the vectors that the engine's kernels use.
Loops loops() {
#if defined(__x86_64__)
  const std::string isa = cpu::current_isa();
  if (isa == "avx512") return FM_CEILING_LOOPS(ceilings_avx512);
  if (isa == "avx2") return FM_CEILING_LOOPS(ceilings_avx2);
#endif
  return FM_CEILING_LOOPS(ceilings_baseline);
}

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Operations a second on registers alone, the best of some tries of milliseconds.
double multiply_add_peak(int tries) {
  require(tries > 0, "tries: expected at least one, got ", tries);
  const Loops l = loops();
  py::gil_scoped_release release;
  double best = 0;
  for (int i = 0; i < tries; ++i) {
    const double start = now(), operations = l.multiply_adds(1 << 18);
    best = max_of(best, operations / (now() - start));
  }
  return best;
}

// Bytes a second over `bytes` of memory, again and again: "read" all of it, "write" all of it, or
// "copy" one half to the other, where what is read and what is written count.
double stream_bandwidth(const std::string& kind, index_t bytes, int tries) {
  require(tries > 0, "tries: expected at least one, got ", tries);
  require(bytes >= 4096 && bytes % 4096 == 0, "bytes: expected a multiple of 4096, got ", bytes);
  const Loops l = loops();
  const Stream stream = kind == "read"    ? l.read
                        : kind == "write" ? l.write
                        : kind == "copy"  ? l.copy
                                          : nullptr;
  require(stream != nullptr, "kind: expected read, write or copy, got '", kind, "'");
  py::gil_scoped_release release;
  const bool halves = kind == "copy";
  const index_t all = bytes / index_t(sizeof(float)), n = halves ? all / 2 : all;
  std::vector<float> memory(all + kAlignment, 1.0f);
  const auto address = index_t(reinterpret_cast<std::uintptr_t>(memory.data()));
  float* x = memory.data() + (align_up(address, kAlignment) - address) / index_t(sizeof(float));
  float* y = halves ? x + n : x;
  const index_t rounds = max_of<index_t>(1, (index_t(1) << 26) / bytes);
  double best = 0;
  for (int i = 0; i <= tries; ++i) {
    const double start = now();
    for (index_t r = 0; r < rounds; ++r) {
      stream(x, y, n);
      asm volatile("" ::: "memory");
    }
    if (i > 0) best = max_of(best, double(rounds) * double(bytes) / (now() - start));
  }
  return best;
}

}  // namespace

void define_ceilings(py::module_& m) {
  m.def("multiply_add_peak", &multiply_add_peak);
  m.def("stream_bandwidth", &stream_bandwidth);
}

}  // namespace fm
