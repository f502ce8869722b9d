#include "cuda/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "common/error.h"

#if defined(FM_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(FM_FIBER_UCONTEXT)

// fm_fiber_switch(void** save, void* load): pushes the registers that a call preserves, leaves the
// stack pointer in *save, continues on the stack `load`. A new stack holds zeros for the registers
// and fm_fiber_start as return address, which hands the fiber (in rbx or x19) to `begin` (in r12
// or x20). A jump instead of a return: the processor's return predictor would be wrong each time.
extern "C" void fm_fiber_switch(void** save, void* load);
extern "C" void fm_fiber_start();

#if defined(__x86_64__)
__asm__(R"(
  .text
  .p2align 4
  .globl fm_fiber_switch
  .hidden fm_fiber_switch
  .type fm_fiber_switch, @function
fm_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size fm_fiber_switch, .-fm_fiber_switch
  .globl fm_fiber_start
  .hidden fm_fiber_start
  .type fm_fiber_start, @function
fm_fiber_start:
  movq %rbx, %rdi
  call *%r12
  ud2
  .size fm_fiber_start, .-fm_fiber_start
)");
constexpr int kSaved = 7, kStart = 6, kSelf = 4, kBegin = 3;  // words from the stack pointer up
#else
__asm__(R"(
  .text
  .p2align 4
  .globl fm_fiber_switch
  .hidden fm_fiber_switch
  .type fm_fiber_switch, %function
fm_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
  .size fm_fiber_switch, .-fm_fiber_switch
  .globl fm_fiber_start
  .hidden fm_fiber_start
  .type fm_fiber_start, %function
fm_fiber_start:
  mov x0, x19
  blr x20
  brk #1
  .size fm_fiber_start, .-fm_fiber_start
)");
constexpr int kSaved = 20, kStart = 11, kSelf = 0, kBegin = 1;
#endif
#endif

namespace fm::cuda_emulated {
namespace {

constexpr std::size_t kStack = 256 << 10;
constexpr std::size_t kStagger = 9 * 64;  // bytes from one stack's top to the next one's
constexpr int kStaggers = 128;

}  // namespace

Fiber::Fiber(void (*entry)(void*), void* argument, int number)
    : entry_(entry), argument_(argument) {
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
  mapped_ = page + kStack;
  void* const memory =
      mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "CUDA emulation: no memory for a stack of ", mapped_,
          " bytes; launch fewer threads per block, or from fewer OS threads");
  mapping_ = static_cast<char*>(memory);
  mprotect(mapping_, page, PROT_NONE);
  bottom_ = mapping_ + page;
  size_ = kStack - std::size_t(number % kStaggers) * kStagger;
  restart();
}

Fiber::~Fiber() {
  if (!mapping_) return;
#if defined(FM_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(mapping_, mapped_);
#endif
  munmap(mapping_, mapped_);
}

void Fiber::restart() {
  fake_stack_ = nullptr;
#if defined(FM_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(bottom_, size_);
#endif
#if defined(FM_FIBER_UCONTEXT)
  getcontext(&registers_);
  registers_.uc_stack.ss_sp = const_cast<void*>(bottom_);
  registers_.uc_stack.ss_size = size_;
  registers_.uc_link = nullptr;
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&registers_, reinterpret_cast<void (*)()>(&begin_split), 2,
              unsigned(std::uint64_t(self) >> 32), unsigned(self));
#else
  // Sixteen zero bytes on top end a debugger's walk up the stack, and keep it aligned.
  char* const top = static_cast<char*>(const_cast<void*>(bottom_)) + size_ - 16;
  void** words = reinterpret_cast<void**>(top) - kSaved;
  std::memset(words, 0, kSaved * sizeof(void*) + 16);
  words[kStart] = reinterpret_cast<void*>(&fm_fiber_start);
  words[kSelf] = this;
  words[kBegin] = reinterpret_cast<void*>(&begin);
  stack_pointer_ = words;
#endif
}

void Fiber::switch_to(Fiber& other) {
  other.from_ = this;
#if defined(FM_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
#endif
#if defined(FM_FIBER_UCONTEXT)
  swapcontext(&registers_, &other.registers_);
#else
  fm_fiber_switch(&stack_pointer_, other.stack_pointer_);
#endif
  arrived();
}

// On this stack, coming from another: its bounds are known now, an OS thread's at last.
void Fiber::arrived() {
#if defined(FM_ADDRESS_SANITIZER)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
  if (!from_->mapping_) {
    from_->bottom_ = bottom;
    from_->size_ = size;
  }
#endif
}

void Fiber::begin(Fiber* self) {
  self->arrived();
  self->entry_(self->argument_);
}

void Fiber::begin_split(unsigned high, unsigned low) {
  begin(reinterpret_cast<Fiber*>(std::uintptr_t(std::uint64_t(high) << 32 | low)));
}

}  // namespace fm::cuda_emulated
