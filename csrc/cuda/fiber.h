// Fibers: stacks that one OS thread runs in turns, switched to by hand.
//
// A switch saves the registers that a function call preserves, and the stack pointer: written in
// assembly for x86-64 and AArch64 on Linux, a few nanoseconds; elsewhere (or with
// FM_FIBER_UCONTEXT defined) through ucontext, which asks the kernel for the signal mask each
// time. AddressSanitizer is told of each switch. Stacks come from mmap with a guard page below,
// and their tops are staggered, or all of them would compete for the same few lines of the cache.
#pragma once

#include <cstddef>

#if !defined(FM_FIBER_UCONTEXT) && \
    !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#define FM_FIBER_UCONTEXT
#endif
#if defined(FM_FIBER_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FM_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FM_ADDRESS_SANITIZER
#endif
#endif

namespace fm::cuda_emulated {

class Fiber {
 public:
  // The stack of the calling OS thread.
  Fiber() = default;
  // A stack that calls entry(argument), which never returns, once it is switched to. `number`
  // staggers the stack.
  Fiber(void (*entry)(void*), void* argument, int number);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Goes to `other`; returns when somebody switches back.
  void switch_to(Fiber& other);
  // Begins anew with its entry: what was on the stack is forgotten, without destructors.
  void restart();

 private:
  static void begin(Fiber* self);
  static void begin_split(unsigned high, unsigned low);
  void arrived();

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  char* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  const void* bottom_ = nullptr;  // of the usable stack, lowest address
  std::size_t size_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  Fiber* from_ = nullptr;       // who switched here last
#if defined(FM_FIBER_UCONTEXT)
  ucontext_t registers_ = {};
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace fm::cuda_emulated
