#include "cuda/machine.h"

#if defined(FM_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "common/error.h"

namespace fm::cuda_emulated {

__thread Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

#if defined(FM_ADDRESS_SANITIZER)
// The sanitizer ends the process after its report, so this adds to the report.
void report_thread(const char*) {
  const std::string where = machine ? machine->where() : "";
  if (where.empty()) return;
  const std::string text = "CUDA emulation: in " + where + "\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text.data(), text.size());
}
#endif

void make_machine() {
#if defined(FM_ADDRESS_SANITIZER)
  __asan_set_error_report_callback(report_thread);
#endif
  static thread_local std::unique_ptr<Machine> owner;
  if (!owner) owner = std::make_unique<Machine>();
  machine = owner.get();
}

namespace {

std::string describe(const Thread& thread) {
  std::string text = "thread " + std::to_string(thread.index);
  if (thread.state == State::done) return text + " has finished";
  return text + " waits at " + describe(thread.place);
}

bool same_place(const Thread& a, const Thread& b) {
  return a.state == b.state && a.place.line == b.place.line &&
         std::strcmp(a.place.what, b.place.what) == 0 &&
         std::strcmp(a.place.file, b.place.file) == 0;
}

void require_awaited(const Thread& thread, const char* where) {
  if (!thread.awaited)
    fail_here("came to " + std::string(where) +
              " without having awaited the kernels before; every kernel begins with "
              "await_previous_kernels()");
}

}  // namespace

// ------------------------------------------------------------------------------- threads

void Machine::enter(Thread& thread) {
  current_ = &thread;
  context.thread = {thread.index, 0, 0};
}

// The next lane of this step that can run.
Thread* Machine::advance() {
  while (lane_ < kLanes) {
    Thread* thread = lanes_[lane_++];
    if (thread->state == State::fresh || thread->state == State::ready) return thread;
  }
  return nullptr;
}

Worker& Machine::worker_of(Thread& thread) {
  if (!thread.worker) {
    if (idle_.empty()) {
      workers_.push_back(std::make_unique<Worker>());
      Worker& made = *workers_.back();
      made.fiber = std::make_unique<Fiber>(&Machine::work, &made, int(workers_.size()));
      idle_.push_back(&made);
    }
    thread.worker = idle_.back();
    thread.worker->thread = &thread;
    idle_.pop_back();
  }
  return *thread.worker;
}

// A stack's life: threads that begin on it, one after the other.
void Machine::work(void* self) {
  Worker& worker = *static_cast<Worker*>(self);
  for (;;) {
    Machine& m = *machine;
    Thread* thread = worker.thread;
    try {
      m.call_->run(*m.call_);
      require_awaited(*thread, "its end");
    } catch (...) {
      m.error_ = std::current_exception();
    }
    if (m.error_) {
      worker.fiber->switch_to(m.main_);  // for good: abandon() restarts every stack
      continue;
    }
    thread->state = State::done;
    thread->worker = nullptr;
    ++m.finished_;
    Thread* next = m.advance();
    if (next && !next->worker) {
      worker.thread = next;
      next->worker = &worker;
      m.enter(*next);
      continue;
    }
    m.idle_.push_back(&worker);
    if (next) m.enter(*next);
    worker.fiber->switch_to(next ? *next->worker->fiber : m.main_);
  }
}

void Machine::wait(State state, Place place) {
  Thread& me = *current_;
  require_awaited(me, place.what);
  me.state = state;
  me.place = place;
  Thread* next = advance();
  if (next) {
    Worker& other = worker_of(*next);
    enter(*next);
    me.worker->fiber->switch_to(*other.fiber);
  } else {
    me.worker->fiber->switch_to(main_);
  }
}

unsigned char* Machine::slots() {
  Warp& warp = warps_[current_->index / kLanes];
  return warp.slots[warp.turn % 2][0];
}

// After an error: all stacks begin anew.
void Machine::abandon() {
  idle_.clear();
  for (auto& worker : workers_) {
    worker->fiber->restart();
    idle_.push_back(worker.get());
  }
  for (Thread& thread : threads_) thread.worker = nullptr;
}

// -------------------------------------------------------------------------------- blocks

// Runs every lane of a warp until it waits; true if the warp may go on, false if it waits for its
// block or is done.
bool Machine::step(unsigned warp) {
  Thread* first = &threads_[warp * kLanes];
  for (int i = 0; i < kLanes; ++i) lanes_[i] = first + i;
  if (shuffled_) random_.shuffle(lanes_, kLanes);
  lane_ = 0;
  if (Thread* next = advance()) {
    Worker& worker = worker_of(*next);
    enter(*next);
    main_.switch_to(*worker.fiber);
    if (error_) return false;
  }
  const Thread* waiting =
      std::find_if(first, first + kLanes, [](const Thread& t) { return t.state == State::warp; });
  if (waiting == first + kLanes) return false;
  for (int i = 0; i < kLanes; ++i) {
    if (!same_place(*waiting, first[i])) diverged(*waiting, first[i], "warp");
  }
  for (int i = 0; i < kLanes; ++i) first[i].state = State::ready;
  ++warps_[warp].turn;
  return true;
}

void Machine::run_threads() {
  std::vector<unsigned> running;
  for (;;) {
    running.resize(warps_.size());
    for (unsigned w = 0; w < running.size(); ++w) running[w] = w;
    while (!running.empty()) {
      const unsigned at = shuffled_ ? random_.below(unsigned(running.size())) : 0;
      while (step(running[at]) && !shuffled_) {
      }
      if (error_) std::rethrow_exception(error_);
      const Thread& lane = threads_[running[at] * kLanes];
      if (lane.state != State::ready) running.erase(running.begin() + at);
    }
    if (finished_ == threads_.size()) return;
    const auto waiting = std::find_if(threads_.begin(), threads_.end(),
                                      [](const Thread& t) { return t.state == State::block; });
    for (Thread& thread : threads_) {
      if (!same_place(*waiting, thread)) diverged(*waiting, thread, "block");
    }
    for (Thread& thread : threads_) thread.state = State::ready;
  }
}

void Machine::run_block(unsigned long long block) {
  const dim3& grid = call_->grid;
  context.block = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                   unsigned(block / grid.x / grid.y)};
  unsigned char* shared = static_cast<unsigned char*>(context.shared);
  std::memset(shared, 0xff, call_->shared_bytes + kGuard);
  for (Thread& thread : threads_) {
    thread.state = State::fresh;
    thread.awaited = false;
    thread.copies.clear();
    thread.groups.clear();
  }
  finished_ = 0;
  run_threads();
  for (std::size_t i = 0; i < kGuard; ++i) {
    if (shared[call_->shared_bytes + i] == 0xff) continue;
    fail(describe(*call_), ": block ", describe(context.block), " wrote byte ", i,
         " behind its shared memory of ", call_->shared_bytes, " bytes");
  }
}

void Machine::run(const Launch& call, std::uint64_t seed) {
  if (call_) fail(describe(call), ": launched from inside of ", describe(*call_));
  check_launch(call);
  call_ = &call;
  shuffled_ = seed != 0;
  random_.state = seed * 0x9E3779B97F4A7C15u + ++launches_;
  threads_.resize(call.block);
  for (unsigned i = 0; i < call.block; ++i) threads_[i].index = i;
  warps_.resize(call.block / kLanes);
  // Exactly as many bytes as were asked for, so that AddressSanitizer sees the first one beyond.
  const std::unique_ptr<void, void (*)(void*)> shared(
      [&] {
        void* memory = nullptr;
        return posix_memalign(&memory, 16, call.shared_bytes + kGuard) ? nullptr : memory;
      }(),
      std::free);
  context.shared = shared.get();
  context.block_size = {call.block, 1, 1};
  context.grid_size = {call.grid.x, call.grid.y, call.grid.z};
  const unsigned long long blocks = 1ull * call.grid.x * call.grid.y * call.grid.z;
  std::vector<unsigned> order;
  if (shuffled_) {
    for (unsigned long long b = 0; b < blocks; ++b) order.push_back(unsigned(b));
    random_.shuffle(order.data(), unsigned(blocks));
  }
  try {
    for (unsigned long long b = 0; b < blocks; ++b) run_block(shuffled_ ? order[b] : b);
  } catch (...) {
    abandon();
    error_ = nullptr;
    call_ = nullptr;
    throw;
  }
  call_ = nullptr;
}

void Machine::diverged(const Thread& a, const Thread& b, const char* group) {
  fail(describe(*call_), ": block ", describe(context.block), ": ", describe(a), ", but ",
       describe(b), "; all threads of a ", group, " must wait at the same place");
}

std::string Machine::where() const {
  if (!call_) return "";
  return describe(*call_) + ": block " + describe(context.block) + ", thread " +
         std::to_string(current_ ? current_->index : 0);
}

bool Machine::in_shared(const void* p, std::size_t bytes) const {
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  const auto begin = reinterpret_cast<std::uintptr_t>(context.shared);
  return at >= begin && at + bytes <= begin + call_->shared_bytes;
}

}  // namespace fm::cuda_emulated
