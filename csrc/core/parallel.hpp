// Host threads for the CPU kernels: one parallel_for over whatever backend is installed (OpenMP, torch's, the
// embedder's). Kernels split work so that no result depends on how many chunks there are.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "flashu/flashu.h"

namespace flashu::core {

const flashu_parallel_backend& parallel_backend();

// The backend that is used until flashu_set_parallel_backend() names another, as the torch ops library does.
const flashu_parallel_backend& default_parallel_backend();

inline int32_t num_threads() { return parallel_backend().num_threads(); }

// A thread's rounding, and whether it flushes denormals to zero (torch.set_flush_denormal); put back at the
// end.
class FloatMode {
 public:
#if defined(__SSE__)
  static uint32_t current() { return _mm_getcsr(); }
  explicit FloatMode(uint32_t mode) : before_(_mm_getcsr()) { _mm_setcsr(mode); }
  ~FloatMode() { _mm_setcsr(before_); }
#else
  static uint32_t current() { return 0; }
  explicit FloatMode(uint32_t mode) : before_(mode) {}
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  [[maybe_unused]] uint32_t before_;
};

// Runs body(begin, end) over disjoint chunks of [begin, end) of at least `grain` each; serial when nested.
// The body must not throw. Workers compute in the caller's mode, so that no result depends on who computes
// it.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) {
    body(begin, end);
    return;
  }
  struct Work {
    const Body& body;
    uint32_t mode;
  };
  Work work{body, FloatMode::current()};
  const auto call = [](int64_t first, int64_t last, void* context) {
    const Work& own = *static_cast<const Work*>(context);
    const FloatMode mode(own.mode);
    own.body(first, last);
  };
  parallel_backend().parallel_for(begin, end, grain, call, &work);
}

}  // namespace flashu::core
