#include "cuda/host_emulation.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <mutex>

#include "common/error.h"
#include "cuda/inspect.h"
#include "cuda/launch.h"
#include "cuda/machine.h"

namespace fm::cuda_emulated {

__thread Context context __attribute__((tls_model("initial-exec")));

namespace {

constexpr std::size_t kLargestShared = 227 << 10;  // of a block, compute capability 9.0
constexpr unsigned kMostThreads = 1024;

std::atomic<std::uint64_t> shuffle_seed{0};
std::atomic<bool (*)(const Launch&)> observer{nullptr};

void read_environment() {
  static const bool once = [] {
    if (const char* seed = std::getenv("FASTMAML_EMULATION_SHUFFLE")) {
      shuffle_seed = std::strtoull(seed, nullptr, 10);
    }
    return true;
  }();
  (void)once;
}

// What inspect.h knows.
struct Inspected {
  std::mutex mutex;
  std::vector<std::pair<void*, std::size_t>> memory;
  int running = 0;  // launches that may touch it

  void access(int allowed) {
    for (const auto& [at, bytes] : memory) {
      if (mprotect(at, bytes, allowed) != 0) fail("device memory: ", std::strerror(errno));
    }
  }
};

Inspected& inspected() {
  static Inspected all;
  return all;
}

// A launch, which can touch device memory once it has awaited those before it.
class Launched {
 public:
  Launched() : outer_(innermost) { innermost = this; }
  ~Launched() {
    innermost = outer_;
    if (!open_) return;
    Inspected& all = inspected();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (--all.running == 0) all.access(PROT_NONE);
  }
  void open() {
    if (open_) return;
    open_ = true;
    Inspected& all = inspected();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (all.running++ == 0) all.access(PROT_READ | PROT_WRITE);
  }

  static thread_local Launched* innermost;

 private:
  bool open_ = false;
  Launched* outer_;
};
thread_local Launched* Launched::innermost = nullptr;

void land(Thread& thread, std::size_t groups) {
  if (groups == 0) return;
  const std::size_t end = thread.groups[groups - 1];
  for (std::size_t i = 0; i < end; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.valid) {
      std::memcpy(copy.target, copy.source, std::size_t(copy.bytes));
    } else {
      std::memset(copy.target, 0, std::size_t(copy.bytes));
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + std::ptrdiff_t(end));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + std::ptrdiff_t(groups));
  for (std::size_t& group : thread.groups) group -= end;
}

}  // namespace

std::string describe(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string describe(const Launch& call) {
  int status = 0;
  char* name = abi::__cxa_demangle(call.params, nullptr, nullptr, &status);
  std::string type = name ? name : call.params;
  std::free(name);
  for (std::size_t at; (at = type.find("fm::cuda_emulated::")) != std::string::npos;) {
    type.erase(at, std::strlen("fm::cuda_emulated::"));
  }
  return kernel_name(call.text) + "(" + type + ")";
}

std::string describe(const Place& place) {
  const char* file = std::strrchr(place.file, '/');
  return std::string(place.what) + " (" + (file ? file + 1 : place.file) + ":" +
         std::to_string(place.line) + ")";
}

void check_launch(const Launch& call) {
  const auto name = [&] { return describe(call) + ": "; };
  if (call.block == 0 || call.block > kMostThreads || call.block % kLanes != 0) {
    fail(name(), "block of ", call.block, " threads: expected a multiple of 32 up to 1024");
  }
  if (call.shared_bytes > kLargestShared) {
    fail(name(), "shared memory of ", call.shared_bytes, " bytes: a block has at most ",
         kLargestShared, " (227 KB)");
  }
  const dim3& g = call.grid;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    fail(name(), "grid ", describe(uint3{g.x, g.y, g.z}),
         ": expected 1 to 2147483647, 65535 and 65535 blocks");
  }
}

std::size_t shared_memory_of_a_block() { return kLargestShared; }

void await_previous_kernels() {
  machine->current().awaited = true;
  Launched::innermost->open();
}

void wait_for_block(Place place) { machine->wait(State::block, place); }

void wait_for_warp(Place place) { machine->wait(State::warp, place); }

const unsigned char* exchange(const void* mine, std::size_t bytes, Place place) {
  unsigned char* slots = machine->slots();
  std::memcpy(slots + machine->current().index % kLanes * kSlot, mine, bytes);
  machine->wait(State::warp, place);
  return slots;
}

void copy_issue(void* target, const void* source, int bytes, bool valid, Place place) {
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % std::uintptr_t(bytes) != 0;
  };
  const auto where = [&] { return describe(place) + " of " + std::to_string(bytes) + " bytes: "; };
  if (!machine->in_shared(target, std::size_t(bytes))) {
    fail_here(where() + "the target is not within the block's shared memory");
  }
  if (misaligned(target)) fail_here(where() + "the target is misaligned");
  if (misaligned(source)) fail_here(where() + "the source is misaligned");
  std::memset(target, 0xff, std::size_t(bytes));
  machine->current().copies.push_back({target, source, bytes, valid});
}

void copy_commit() {
  Thread& thread = machine->current();
  thread.groups.push_back(thread.copies.size());
}

void copy_wait(int groups_left) {
  Thread& thread = machine->current();
  const std::size_t left = std::size_t(groups_left);
  land(thread, thread.groups.size() > left ? thread.groups.size() - left : 0);
}

void shuffle_threads(std::uint64_t seed) {
  read_environment();  // now, so that it can't override this later
  shuffle_seed = seed;
}

void fail_here(const std::string& what) { fail(machine->where(), ": ", what); }

void observe_launches(bool (*observe)(const Launch&)) { observer = observe; }

void run_launch(const Launch& call) {
  if (const auto observe = observer.load()) {
    check_launch(call);
    if (!observe(call)) return;
  }
  read_environment();
  if (!machine) make_machine();
  const Launched launched;
  machine->run(call, shuffle_seed);
}

void* device_memory(std::size_t bytes) {
  Inspected& all = inspected();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const int access = all.running > 0 ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* at = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) fail("device memory of ", bytes, " bytes: ", std::strerror(errno));
  all.memory.emplace_back(at, bytes);
  return at;
}

}  // namespace fm::cuda_emulated
