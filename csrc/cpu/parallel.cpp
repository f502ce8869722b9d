#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace fm::cpu {
namespace {

// Workers look for new work this long before they sleep, the first part of it without giving way
// to other threads: waking a sleeper takes longer than a meta-gradient of a small network, and the
// gap between two calls of a training loop is some hundred microseconds.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr auto kLinger = std::chrono::microseconds(1000);
// The caller spins this often for the last part before it gives way to other threads.
constexpr int kSpinTries = 2000;

void relax() {
#if defined(__SSE__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Flush-to-zero for the lifetime of the object: denormals cost a hundred times a normal operation.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

int cgroup_quota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period) {
    if (quota == "max" || period <= 0) return 0;
    return std::max(1, int(std::strtod(quota.c_str(), nullptr) / period + 0.5));
  }
  std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double limit = 0;
  if ((v1 >> limit) && (v1_period >> period) && limit > 0 && period > 0) {
    return std::max(1, int(limit / period + 0.5));
  }
  return 0;
}

int default_threads() {
  int threads = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) threads = CPU_COUNT(&set);
#endif
  if (const int quota = cgroup_quota()) threads = std::min(threads, quota);
  if (const char* wish = std::getenv("FASTMAML_NUM_THREADS")) {
    const int value = std::atoi(wish);
    if (value > 0) threads = value;
  }
  return std::max(1, threads);
}

class Pool {
 public:
  explicit Pool(int threads) : size_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ticket_.fetch_add(std::uint64_t(1) << 32);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  // Parts are claimed from a ticket that holds the generation and how many are left, so a worker
  // that comes late finds nothing to claim, and nobody waits for one that sleeps: the call is over
  // when the last part is done. What a part reads is written before the ticket that offers it, and
  // stays until the part is counted as done.
  void run(index_t parts, PartBody body, void* state) {
    if (size_ == 1 || parts <= 1) {
      for (index_t part = 0; part < parts; ++part) body(state, 0, part);
      return;
    }
    body_ = body;
    state_ = state;
    parts_ = parts;
    done_.store(0, std::memory_order_relaxed);
    const std::uint32_t generation = generation_of(ticket_.load(std::memory_order_relaxed)) + 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ticket_.store(std::uint64_t(generation) << 32 | std::uint64_t(parts));
    }
    if (sleepers_.load() > 0) {
      keep_off_this_cpu();
      wake_.notify_all();
    }
    claim(0, generation);
    for (int tries = 0; done_.load(std::memory_order_acquire) < parts; ++tries) {
      if (tries < kSpinTries) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  // The kernel likes to wake a thread on the CPU of the one that wakes it, where it would wait for
  // that one to finish. Workers may use any other CPU of the process.
  void keep_off_this_cpu() {
#if defined(__linux__)
    cpu_set_t set;
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof(set), &set) != 0 || CPU_COUNT(&set) < 2) return;
    CPU_CLR(here, &set);
    for (std::thread& worker : workers_) {
      pthread_setaffinity_np(worker.native_handle(), sizeof(set), &set);
    }
#endif
  }

  static std::uint32_t generation_of(std::uint64_t ticket) { return std::uint32_t(ticket >> 32); }

  void claim(int thread, std::uint32_t generation) {
    std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const index_t left = index_t(ticket & 0xffffffffu);
      if (generation_of(ticket) != generation || left == 0) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
      body_(state_, thread, parts_ - left);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work(int thread) {
    FlushDenormals flush;
    std::uint32_t seen = 0;
    for (;;) {
      seen = wait_for_work(seen);
      if (stop_) return;
      claim(thread, seen);
    }
  }

  std::uint32_t wait_for_work(std::uint32_t seen) {
    const auto start = std::chrono::steady_clock::now();
    bool lingering = false;
    for (int i = 1;; ++i) {
      const std::uint32_t now = generation_of(ticket_.load(std::memory_order_acquire));
      if (now != seen) return now;
      if (lingering) {
        std::this_thread::yield();
      } else {
        relax();
      }
      if (!lingering && i % 64 != 0) continue;
      const auto waited = std::chrono::steady_clock::now() - start;
      if (waited > kLinger) break;
      lingering = waited > kSpin;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return generation_of(ticket_.load()) != seen; });
    sleepers_.fetch_sub(1);
    return generation_of(ticket_.load(std::memory_order_acquire));
  }

  const int size_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> ticket_{0};  // generation in the upper half, parts left in the lower
  std::atomic<int> sleepers_{0};
  std::atomic<index_t> done_{0};
  std::atomic<bool> stop_{false};
  PartBody body_ = nullptr;
  void* state_ = nullptr;
  index_t parts_ = 0;
};

std::mutex& call_mutex() {
  static auto* mutex = new std::mutex;  // never destroyed: calls may outlive static destructors
  return *mutex;
}

int requested_threads = 0;  // 0: the default
Pool* shared_pool = nullptr;

// A forked child has none of the parent's threads: it starts over with a pool of its own.
void forget_pool() {
  shared_pool = nullptr;
  new (&call_mutex()) std::mutex;
}

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  const int wanted = requested_threads > 0 ? requested_threads : default_threads();
  if (shared_pool && requested_threads > 0 && shared_pool->size() != wanted) {
    delete shared_pool;
    shared_pool = nullptr;
  }
  if (!shared_pool) shared_pool = new Pool(wanted);
  return *shared_pool;
}

}  // namespace

void set_num_threads(int threads) {
  std::lock_guard<std::mutex> lock(call_mutex());
  requested_threads = threads > 0 ? threads : default_threads();
}

int num_threads() {
  std::lock_guard<std::mutex> lock(call_mutex());
  if (requested_threads > 0) return requested_threads;
  return shared_pool ? shared_pool->size() : default_threads();
}

void run_parts(index_t parts, int threads, PartBody body, void* state) {
  std::lock_guard<std::mutex> lock(call_mutex());
  FlushDenormals flush;
  Pool& shared = pool();
  if (shared.size() <= threads) return shared.run(parts, body, state);
  // the pool has grown since the caller counted: it is too large for this call alone
  for (index_t part = 0; part < parts; ++part) body(state, 0, part);
}

void run_team(TeamBody body, void* state) {
  std::lock_guard<std::mutex> lock(call_mutex());
  FlushDenormals flush;
  Pool& team = pool();
  body(state, team.size() > 1 ? &team : nullptr);
}

void team_parts(const void* team, index_t parts, PartBody body, void* state) {
  static_cast<Pool*>(const_cast<void*>(team))->run(parts, body, state);
}

int team_size(const void* team) { return team ? static_cast<const Pool*>(team)->size() : 1; }

}  // namespace fm::cpu
