#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/thread_limits.h"

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
// Looks between two looks at the clock.
constexpr int kLooks = 64;
// Who waits for parts that others run spins this often before it gives way to other threads.
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

// What is left of a loop: parts [first, last), open to threads below `takers`. One word, so that
// taking a part needs to know nothing else: a thread that comes late with the ticket of an earlier
// loop either fails to exchange it or takes a part of the present loop, as good as any.
struct Ticket {
  static constexpr int kBits = 24;
  static constexpr index_t kMask = (index_t(1) << kBits) - 1;
  static constexpr int kAnyThread = 0xffff;

  index_t first, last;
  int takers;

  explicit Ticket(std::uint64_t word)
      : first(index_t(word >> kBits) & kMask),
        last(index_t(word) & kMask),
        takers(int(word >> 2 * kBits)) {}
  Ticket(index_t first, index_t last, int takers) : first(first), last(last), takers(takers) {}

  std::uint64_t word() const {
    return std::uint64_t(takers) << 2 * kBits | std::uint64_t(first) << kBits | std::uint64_t(last);
  }
  bool open_to(int thread) const { return first < last && thread < takers; }
};

class Pool;

// A loop on offer. Body, state and parts are written before the ticket that offers the loop and
// read after a part of it was taken; they stay until every part is counted as done. They share the
// ticket's cache line, which whoever takes a part has to fetch anyway.
struct alignas(128) Loop {
  std::atomic<std::uint64_t> ticket{0};
  PartBody body = nullptr;
  void* state = nullptr;
  index_t parts = 0;
  Pool* pool = nullptr;
  alignas(64) std::atomic<index_t> done{0};
};

class Pool {
 public:
  explicit Pool(int threads) : size_(threads), teams_(threads) {
    for (Loop& team : teams_) team.pool = this;
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  const Loop* team_of(int thread) const { return size_ > 1 ? &teams_[thread] : nullptr; }

  // The call itself. Its caller is thread 0.
  void run(index_t parts, int threads, PartBody body, void* state) {
    if (size_ == 1) {
      for (index_t part = 0; part < parts; ++part) body(state, 0, part);
      return;
    }
    if (caller_has_moved()) keep_off_this_cpu();
    offer(tasks_, parts, std::min({threads, size_, Ticket::kAnyThread}), body, state);
    take(tasks_, 0, true);
    for (int tries = 0; tasks_.done.load(std::memory_order_acquire) < parts; ++tries) {
      if (help(0)) tries = 0;
      pause(tries);
    }
  }

  // A loop inside a part. Its thread takes parts from the front, helpers take them from the back:
  // in the next loop over the same data each finds in its cache what it left there.
  void run_team(Loop& team, index_t parts, PartBody body, void* state) {
    offer(team, parts, Ticket::kAnyThread, body, state);
    take(team, int(&team - teams_.data()), true);
    for (int tries = 0; team.done.load(std::memory_order_acquire) < parts; ++tries) pause(tries);
  }

  // A thread of its own, and its share of those that run no task and find none to take.
  int team_size() const {
    const Ticket tasks(tasks_.ticket.load(std::memory_order_relaxed));
    index_t running = tasks.takers;
    if (tasks.first >= tasks.last) {
      const index_t done = tasks_.done.load(std::memory_order_relaxed);
      running = std::clamp<index_t>(tasks_.parts - done, 1, running);
    }
    return 1 + int((size_ - running + running - 1) / running);
  }

 private:
  void offer(Loop& loop, index_t parts, int takers, PartBody body, void* state) {
    loop.body = body;
    loop.state = state;
    loop.parts = parts;
    loop.done.store(0, std::memory_order_relaxed);
    // In the order of a single history, as is what a thread does before it sleeps: either it finds
    // this ticket or it is found asleep.
    loop.ticket.store(Ticket(0, parts, takers).word());
    if (parts > 1 && asleep_.load() && asleep_.exchange(false)) {
      if (&loop == &tasks_ || &loop == &teams_[0]) keep_off_this_cpu();
      wake();
    }
  }

  // Takes parts of a loop until there are none: several at a time while there are many.
  void take(Loop& loop, int thread, bool from_front) {
    std::uint64_t word = loop.ticket.load(std::memory_order_acquire);
    for (;;) {
      const Ticket now(word);
      if (!now.open_to(thread)) return;
      const index_t count = std::max<index_t>(1, (now.last - now.first) / (16 * size_));
      const Ticket next = from_front ? Ticket(now.first + count, now.last, now.takers)
                                     : Ticket(now.first, now.last - count, now.takers);
      if (!loop.ticket.compare_exchange_weak(word, next.word(), std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
        continue;
      }
      const index_t begin = from_front ? now.first : next.last;
      for (index_t part = begin; part < begin + count; ++part) loop.body(loop.state, thread, part);
      loop.done.fetch_add(count, std::memory_order_release);
      word = loop.ticket.load(std::memory_order_acquire);
    }
  }

  static bool offers(const Loop& loop, int thread) {
    return Ticket(loop.ticket.load()).open_to(thread);
  }

  // The loop this thread should work at: the call's own, else that of a team, the nearest first so
  // that helpers spread evenly. Null if there is none.
  Loop* find(int thread) {
    const Ticket tasks(tasks_.ticket.load());
    if (tasks.open_to(thread)) return &tasks_;
    for (int i = 0; i < tasks.takers; ++i) {
      Loop& team = teams_[(thread + i) % tasks.takers];
      if (offers(team, thread)) return &team;
    }
    return nullptr;
  }

  bool help(int thread) {
    Loop* loop = find(thread);
    if (loop) take(*loop, thread, false);
    return loop;
  }

  static void pause(int tries) {
    if (tries < kSpinTries) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }

  void work(int thread) {
    FlushDenormals flush;
    auto since = std::chrono::steady_clock::now();
    bool lingering = false;
    for (int looks = 0; !stop_.load(std::memory_order_relaxed);) {
      if (help(thread)) {
        looks = 0;
        lingering = false;
        continue;
      }
      if (lingering) {
        std::this_thread::yield();
      } else {
        relax();
      }
      if (++looks == 1) since = std::chrono::steady_clock::now();
      if (!lingering && looks % kLooks != 0) continue;
      const auto waited = std::chrono::steady_clock::now() - since;
      lingering = waited > kSpin;
      if (waited > kLinger) {
        sleep(thread);
        looks = 0;
        lingering = false;
      }
    }
  }

  // Until there is work or somebody wakes this thread; then it stays up for a while, since a call
  // can be over before a sleeper is there.
  void sleep(int thread) {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::uint64_t before = wakes_;
    asleep_.store(true);
    wake_.wait(lock, [&] { return stop_.load() || wakes_ != before || find(thread); });
  }

  void wake() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++wakes_;
    }
    wake_.notify_all();
  }

  // Workers may use any CPU of the process but the caller's. The kernel likes to wake a thread on
  // the CPU of the one that wakes it, where it would wait for that one to finish; and it may move
  // the caller to a worker's CPU.
  void keep_off_this_cpu() {
#if defined(__linux__)
    cpu_set_t set;
    callers_cpu_ = sched_getcpu();
    if (callers_cpu_ < 0 || sched_getaffinity(0, sizeof(set), &set) != 0) return;
    if (CPU_COUNT(&set) < 2) return;
    CPU_CLR(callers_cpu_, &set);
    if (CPU_EQUAL(&set, &workers_cpus_)) return;
    workers_cpus_ = set;
    for (std::thread& worker : workers_) {
      pthread_setaffinity_np(worker.native_handle(), sizeof(set), &set);
    }
#endif
  }

  bool caller_has_moved() const {
#if defined(__linux__)
    return sched_getcpu() != callers_cpu_;
#else
    return false;
#endif
  }

  const int size_;
  Loop tasks_;
  std::vector<Loop> teams_;                       // of the threads that take tasks
  alignas(128) std::atomic<bool> asleep_{false};  // somebody may be
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::uint64_t wakes_ = 0;
  std::vector<std::thread> workers_;
#if defined(__linux__)
  int callers_cpu_ = -1;      // where it last was
  cpu_set_t workers_cpus_{};  // as this pool last set it, none at first
#endif
};

std::mutex& call_mutex() {
  static auto* mutex = new std::mutex;  // never destroyed: calls may outlive static destructors
  return *mutex;
}

std::atomic<int> requested_threads{0};  // 0: the default
std::atomic<int> pool_size{0};          // 0: there is no pool yet
Pool* shared_pool = nullptr;            // belongs to who holds the mutex, for the length of a call

// A forked child has none of the parent's threads: it starts over with a pool of its own.
void forget_pool() {
  shared_pool = nullptr;
  pool_size = 0;
  new (&call_mutex()) std::mutex;
}

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  const int requested = requested_threads;
  if (shared_pool && requested > 0 && shared_pool->size() != requested) {
    delete shared_pool;
    shared_pool = nullptr;
  }
  if (!shared_pool) {
    shared_pool = new Pool(requested > 0 ? requested : default_threads());
    pool_size = shared_pool->size();
  }
  return *shared_pool;
}

}  // namespace

void set_num_threads(int threads) { requested_threads = threads > 0 ? threads : default_threads(); }

int num_threads() {
  if (const int requested = requested_threads) return requested;
  const int size = pool_size;
  return size > 0 ? size : default_threads();
}

void run_parts(index_t parts, int threads, PartBody body, void* state) {
  std::lock_guard<std::mutex> lock(call_mutex());
  FlushDenormals flush;
  Pool& shared = pool();
  struct Slice {  // of more parts than a ticket can count
    PartBody body;
    void* state;
    index_t first;
  } slice{body, state, 0};
  const auto run_slice = [](void* s, int thread, index_t part) {
    const Slice& slice = *static_cast<const Slice*>(s);
    slice.body(slice.state, thread, slice.first + part);
  };
  for (; parts - slice.first > Ticket::kMask; slice.first += Ticket::kMask) {
    shared.run(Ticket::kMask, threads, run_slice, &slice);
  }
  if (slice.first == 0) return shared.run(parts, threads, body, state);
  shared.run(parts - slice.first, threads, run_slice, &slice);
}

const void* team_of(int thread) { return shared_pool->team_of(thread); }

void team_parts(const void* team, index_t parts, PartBody body, void* state) {
  Loop& loop = *static_cast<Loop*>(const_cast<void*>(team));
  loop.pool->run_team(loop, parts, body, state);
}

int team_size(const void* team) {
  return team ? static_cast<const Loop*>(team)->pool->team_size() : 1;
}

}  // namespace fm::cpu
