"""The engine's thread pool alone, in a C++ program, plain and under ThreadSanitizer.

What Python can't see from outside: who runs what. Where threads must work at the same
time, each waits for the other; a pool that brings no helper makes the program fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parent.parent / "csrc" / "cpu"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not CPU.is_dir(), reason="no C++ compiler, or no sources"
)

PROGRAM = r"""
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

using namespace fm;
using namespace fm::cpu;

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::_Exit(1);
}

template <class Condition>
void wait_for(Condition&& condition, const char* what) {
  const auto start = std::chrono::steady_clock::now();
  while (!condition()) {
    check(std::chrono::steady_clock::now() - start < std::chrono::seconds(60), what);
    std::this_thread::yield();
  }
}

using Body = std::function<void(int, index_t)>;
void call(void* body, int thread, index_t part) {
  (*static_cast<Body*>(body))(thread, part);
}
void loop(index_t parts, int threads, Body body) {
  run_parts(parts, threads, call, &body);
}
void team_loop(const void* team, index_t parts, Body body) {
  if (team) return team_parts(team, parts, call, &body);
  for (index_t part = 0; part < parts; ++part) body(0, part);
}

// Every part once; a thread's number belongs to it alone; results are there afterwards.
void parts() {
  for (int threads : {1, 2, 3, 4, 8, 2}) {
    set_num_threads(threads);
    for (index_t n : {0, 1, 2, 3, 25, 1000}) {
      for (int slots : {1, 2, 8}) {
        std::vector<int> runs(n, 0);  // plain: a part is one thread's
        std::vector<std::atomic<bool>> busy(8);
        loop(n, slots, [&](int thread, index_t part) {
          check(thread < slots && thread < threads, "a thread's number");
          check(!busy[thread].exchange(true), "a number used twice");
          ++runs[part];
          busy[thread] = false;
        });
        for (int r : runs) check(r == 1, "every part runs once");
      }
    }
  }
}

// Loops inside of parts, for fewer, as many and more tasks than threads.
void nested() {
  for (int threads : {1, 2, 3, 4, 8}) {
    set_num_threads(threads);
    for (index_t tasks = 1; tasks <= 9; ++tasks) {
      std::vector<std::vector<int>> runs(tasks, std::vector<int>(40, 0));
      loop(tasks, threads, [&](int thread, index_t task) {
        const void* team = team_of(thread);
        for (int repeat = 0; repeat < 30; ++repeat) {
          const int size = team_size(team);
          check(size >= 1 && size <= threads, "a team's size");
          team_loop(team, 2 * size, [&](int, index_t part) {
            for (index_t i = part; i < 40; i += 2 * size) ++runs[task][i];
          });
        }
      });
      for (auto& row : runs) {
        for (int r : row) check(r == 30, "every part of every nested loop runs once");
      }
    }
  }
}

// `tasks` tasks at once, each with two threads of its own at the same time.
void teams(index_t tasks, int slots, int threads) {
  set_num_threads(threads);
  std::atomic<int> together{0};
  loop(tasks, slots, [&](int thread, index_t) {
    check(thread < slots, "only as many tasks at once as there are slots");
    team_loop(team_of(thread), 2, [&](int, index_t) {
      ++together;
      wait_for([&] { return together == 2 * tasks; }, "all teams work at once");
    });
  });
}

// Threads that find no task help the last one.
void remainder() {
  set_num_threads(3);
  std::atomic<int> started{0}, together{0};
  loop(4, 3, [&](int thread, index_t) {
    if (++started < 4) return;
    const void* team = team_of(thread);
    wait_for([&] { return team_size(team) == 3; }, "the last task's team is everybody");
    team_loop(team, 3, [&](int, index_t) {
      ++together;
      wait_for([&] { return together == 3; }, "three threads at the last task");
    });
  });
}

// Helpers that have gone to sleep, between calls or in the middle of one, come back.
void sleepers() {
  set_num_threads(2);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    teams(1, 1, 2);
    loop(1, 1, [&](int thread, index_t) {
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
      std::atomic<int> together{0};
      team_loop(team_of(thread), 2, [&](int, index_t) {
        ++together;
        wait_for([&] { return together == 2; }, "a helper wakes up");
      });
    });
  }
}

// Nobody who reads or sets the number of threads waits for a call to end.
void settings() {
  set_num_threads(2);
  std::atomic<bool> running{false}, asked{false};
  std::thread other([&] {
    wait_for([&] { return running.load(); }, "the call starts");
    check(num_threads() == 2, "the number of threads");
    set_num_threads(3);
    check(num_threads() == 3, "the number of threads, set during a call");
    asked = true;
  });
  loop(2, 2, [&](int, index_t) {
    running = true;
    wait_for([&] { return asked.load(); }, "settings are there during a call");
  });
  other.join();
}

// Several callers, whose number of threads changes all the time.
void callers() {
  std::vector<std::thread> all;
  for (int c = 0; c < 3; ++c) {
    all.emplace_back([c] {
      for (int i = 0; i < 200; ++i) {
        set_num_threads(1 + (i + c) % 4);
        std::vector<index_t> out(7, 0);
        loop(7, 3, [&](int thread, index_t task) {
          check(thread < 3, "a slot");
          std::vector<index_t> terms(4, 0);
          team_loop(team_of(thread), 4, [&](int, index_t p) { terms[p] = task + p; });
          for (index_t t : terms) out[task] += t;
        });
        for (index_t t = 0; t < 7; ++t) {
          check(out[t] == 4 * t + 6, "a caller's results");
        }
      }
    });
  }
  for (auto& thread : all) thread.join();
}

// More parts than one ticket can count.
void many() {
  set_num_threads(2);
  const index_t n = (index_t(1) << 24) + 5;
  std::vector<char> runs(n, 0);
  loop(n, 2, [&](int, index_t part) { ++runs[part]; });
  for (char r : runs) check(r == 1, "every one of many parts runs once");
}

int main() {
  parts();
  nested();
  teams(1, 1, 2);
  teams(2, 2, 4);
  teams(2, 2, 8);  // more threads than needed
  teams(3, 3, 6);
  teams(2, 2, 4);
  remainder();
  sleepers();
  settings();
  callers();
  many();
}
"""


def build(folder: Path, source: str, *flags: str) -> Path:
    """Compiles a program with the pool; skips where that sanitizer is missing."""
    folder.joinpath("pool.cpp").write_text(source)
    sources = [CPU / "parallel.cpp", CPU / "thread_limits.cpp", folder / "pool.cpp"]
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", f"-I{CPU.parent}"]
        + [*flags, *map(str, sources), "-o", str(folder / "pool")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "tsan" in done.stderr:
        pytest.skip("no ThreadSanitizer here")
    assert done.returncode == 0, done.stderr
    return folder / "pool"


@pytest.mark.parametrize("sanitizer", ["", "thread"], ids=["plain", "tsan"])
def test_the_pool(tmp_path, sanitizer):
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    program = build(tmp_path, PROGRAM, *flags)
    clean = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [program], capture_output=True, text=True, env=clean, timeout=240, check=False
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is too much for ThreadSanitizer")
    assert done.returncode == 0, done.stderr[-6000:]
