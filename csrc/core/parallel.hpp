// Host threads for the CPU kernels: one parallel_for over whatever backend is installed (OpenMP, torch's, the
// embedder's). Kernels split work so that no result depends on how many chunks there are.
#pragma once

#include <cstdint>
#include <type_traits>

#include "flashu/flashu.h"

namespace flashu::core {

const flashu_parallel_backend& parallel_backend();

// The backend that is used until flashu_set_parallel_backend() names another. Defined once per final library:
// parallel_openmp.cpp in libflashu, parallel_torch.cpp in the torch ops library.
const flashu_parallel_backend& default_parallel_backend();

inline int32_t num_threads() { return parallel_backend().num_threads(); }

// Runs body(begin, end) over disjoint chunks of [begin, end) of at least `grain` each; serial when nested.
// The body must not throw.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) {
    body(begin, end);
    return;
  }
  const auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Body*>(context))(first, last);
  };
  parallel_backend().parallel_for(begin, end, grain, call,
                                  const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace flashu::core
