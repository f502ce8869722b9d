"""Compiles and runs the C++ of an experiment."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)

HEADER = r"""
#include <immintrin.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>
#include <vector>

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef float H __attribute__((vector_size(32), aligned(4), may_alias));

inline double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Seconds of one call: the best of 7 tries of `repeats` calls.
template <class Body>
double best(int repeats, Body&& body) {
  double least = 1e9;
  body();
  for (int i = 0; i < 7; ++i) {
    const double start = now();
    for (int r = 0; r < repeats; ++r) {
      body();
      asm volatile("" ::: "memory");
    }
    least = std::min(least, (now() - start) / repeats);
  }
  return least;
}

struct Floats {
  std::vector<float> memory;
  float* p;
  explicit Floats(long n, float value = 0.5f) : memory(n + 16, value) {
    const auto at = reinterpret_cast<unsigned long>(memory.data());
    p = memory.data() + ((at + 63) / 64 * 64 - at) / 4;
  }
  operator float*() { return p; }
};
"""


def run(source: str) -> str:
    """Compiles HEADER and a source for this machine and runs it.

    Returns:
        What it printed.

    Raises:
        SystemExit: if it does not compile or run here, with the compiler's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        code, program = Path(folder) / "main.cpp", Path(folder) / "main"
        code.write_text(HEADER + source)
        compiler = os.environ.get("CXX", "g++")
        for command in ([compiler, *FLAGS, code, "-o", program], [program]):
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True
            )
            if done.returncode != 0:
                raise SystemExit(done.stderr.strip() or f"exit {done.returncode}")
    return done.stdout
