// The machine that runs blocks: one per OS thread, kept from launch to launch.
//
// `step(warp)` runs each lane of a warp, in some order, until it waits or has finished. A lane that
// waits continues the next lane itself (a lane that has not begun starts on a stack of its own); a
// lane that finishes without ever waiting begins the next one on the same stack, so a kernel
// without barriers never switches. Then, if all lanes wait at one place for their warp, the warp
// may step on. When no warp may, all threads must wait at one place for their block, or be done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/fiber.h"
#include "cuda/host_emulation.h"

namespace fm::cuda_emulated {

constexpr int kLanes = 32;
#if defined(FM_ADDRESS_SANITIZER)
constexpr std::size_t kGuard = 0;  // the sanitizer's own stand around the block
#else
constexpr std::size_t kGuard = 256;  // poison behind shared memory that must stay as it is
#endif

enum class State : unsigned char { fresh, ready, warp, block, done };

struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool valid;
};

struct Thread;

struct Worker {
  std::unique_ptr<Fiber> fiber;
  Thread* thread = nullptr;
};

struct Thread {
  unsigned index = 0;
  State state = State::fresh;
  bool awaited = false;  // the kernels before
  Place place = {};
  Worker* worker = nullptr;
  std::vector<Copy> copies;         // issued and not landed, oldest first
  std::vector<std::size_t> groups;  // committed: where each ends among the copies
};

struct Warp {
  unsigned turn = 0;  // counts what the warp has waited for; slots alternate
  alignas(64) unsigned char slots[2][kLanes][kSlot];
};

struct Random {  // splitmix64
  std::uint64_t state = 0;
  unsigned below(unsigned n) {
    std::uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return unsigned((z ^ (z >> 31)) % n);
  }
  template <class T>
  void shuffle(T* values, unsigned n) {
    for (unsigned i = n; i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }
};

class Machine {
 public:
  // A seed of 0 runs threads in order.
  void run(const Launch& call, std::uint64_t seed);
  void wait(State state, Place place);
  unsigned char* slots();  // of the running warp, for what its lanes exchange next
  Thread& current() { return *current_; }
  bool in_shared(const void* p, std::size_t bytes) const;
  std::string where() const;  // kernel, block and thread; empty if none runs

 private:
  void run_block(unsigned long long block);
  void run_threads();
  bool step(unsigned warp);
  [[noreturn]] void diverged(const Thread& a, const Thread& b, const char* group);
  Thread* advance();
  Worker& worker_of(Thread& thread);
  void enter(Thread& thread);
  static void work(void* self);
  void abandon();

  const Launch* call_ = nullptr;
  Fiber main_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<Worker*> idle_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Thread* current_ = nullptr;
  Thread* lanes_[kLanes] = {};  // of the warp that steps, in the order of this step
  int lane_ = 0;                // the next one
  unsigned finished_ = 0;
  std::exception_ptr error_;
  bool shuffled_ = false;
  Random random_;
  std::uint64_t launches_ = 0;
};

// Of the calling OS thread; made by its first launch.
extern __thread Machine* machine __attribute__((tls_model("initial-exec")));
void make_machine();

// Throws if no GPU would take the launch.
void check_launch(const Launch& call);

std::string describe(const uint3& v);
std::string describe(const Launch& call);
std::string describe(const Place& place);

}  // namespace fm::cuda_emulated
