// Context switches, stacks and sanitizer annotations.
#include "simt/fiber.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace simt {
namespace {

constexpr std::size_t kPage = 4096;
[[maybe_unused]] constexpr unsigned kNoOrder = 1;  // a switch is not an edge of the program under test

thread_local Fiber* leaving = nullptr;
thread_local Fiber* arriving = nullptr;

// Saves the callee-saved registers and the stack pointer into *from and loads those of `to`.
#if defined(__x86_64__)
__attribute__((naked, noinline)) void swap_stacks(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
constexpr int kSavedRegisters = 6;
#else
#error "the SIMT emulator switches stacks on x86-64 only"
#endif

}  // namespace

Fiber::Fiber() {
#if defined(__SANITIZE_THREAD__)
  tsan_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(std::size_t stack_bytes, void (*entry)()) : bytes_(stack_bytes) {
  // A page that may not be touched below the stack turns an overflow into a fault.
  void* memory = mmap(nullptr, bytes_ + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + kPage;
  bottom_ = stack_;
  height_ = bytes_;
  restart(entry);
#if defined(__SANITIZE_THREAD__)
  tsan_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(tsan_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, bytes_);
#endif
  munmap(stack_ - kPage, bytes_ + kPage);
}

void Fiber::restart(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, bytes_);
  fake_stack_ = nullptr;
#endif
  // `ret` pops the entry; at a function's first instruction the stack is 8 bytes off 16-byte alignment.
  void** frame = reinterpret_cast<void**>(stack_ + bytes_ - 64);
  frame[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= kSavedRegisters; ++i) frame[-i] = nullptr;
  pointer_ = frame - kSavedRegisters;
}

void Fiber::switch_to(Fiber& next, bool forever) {
  leaving = this;
  arriving = &next;
  void** const from = &pointer_;
  void* const to = next.pointer_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack_, next.bottom_, next.height_);
#endif
  [[maybe_unused]] void* const tsan = next.tsan_;
  if (forever) unseen_end();  // a thread may not end while it ignores
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(tsan, kNoOrder);
#endif
  swap_stacks(from, to);
  fiber_started();
}

void fiber_started() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(arriving->fake_stack_, &bottom, &bytes);
  if (leaving->stack_ == nullptr) {  // the adopted stack's bounds are known only here
    leaving->bottom_ = bottom;
    leaving->height_ = bytes;
  }
#endif
}

bool stacks_are_reusable() {
#if defined(__SANITIZE_THREAD__)
  return false;
#else
  return true;
#endif
}

void order_release([[maybe_unused]] const void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<void*>(address));
#endif
}

void order_acquire([[maybe_unused]] const void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(address));
#endif
}

void unseen_begin() {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
#endif
}

void unseen_end() {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreWritesEnd("", 0);
  AnnotateIgnoreReadsEnd("", 0);
#endif
}

void as_own_thread(void (*work)(void*), void* context) {
#if defined(__SANITIZE_THREAD__)
  void* self = __tsan_get_current_fiber();
  void* engine = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(engine, kNoOrder);
  work(context);
  __tsan_switch_to_fiber(self, kNoOrder);
  __tsan_destroy_fiber(engine);
#else
  work(context);
#endif
}

}  // namespace simt
