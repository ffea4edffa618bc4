// Fibers of the SIMT emulator: one stack per emulated CUDA thread, switched by hand within one OS thread. All
// that the sanitizers must be told about stacks and switches is in fiber.cpp.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  // Adopts the stack that is running now: the scheduler's own context.
  Fiber();
  // A fresh context whose first switch_to() calls `entry`, which must never return.
  Fiber(std::size_t stack_bytes, void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes a fiber whose entry will not come back start anew on the same stack.
  void restart(void (*entry)());

  // Leaves this fiber, which must be the running one, for `next`. `forever`: it will not be come back to, and
  // the caller's one unseen_begin() is ended.
  void switch_to(Fiber& next, bool forever = false);

 private:
  friend void fiber_started();

  void* pointer_ = nullptr;  // of the stack, while not running
  char* stack_ = nullptr;    // null for the adopted one
  std::size_t bytes_ = 0;
  const void* bottom_ = nullptr;  // what AddressSanitizer is told of the stack
  std::size_t height_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
};

// The first call in an entry function: completes the switch that started it.
void fiber_started();

// What happens-before edges there are between emulated threads; no-ops without ThreadSanitizer. A release
// orders everything before it before the acquires that follow on the same address.
void order_release(const void* address);
void order_acquire(const void* address);

// Whether a stack may serve a second thread: ThreadSanitizer remembers who wrote to it.
bool stacks_are_reusable();

// Between the two, memory accesses are invisible to ThreadSanitizer: the emulator's own bookkeeping is not
// part of the program under test. They nest.
void unseen_begin();
void unseen_end();

class Unseen {
 public:
  Unseen() { unseen_begin(); }
  ~Unseen() { unseen_end(); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// Runs work(context) as a thread of its own in the happens-before order: a copy engine or a tensor core.
void as_own_thread(void (*work)(void*), void* context);

}  // namespace simt
