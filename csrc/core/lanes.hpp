// Sums over explicit lanes: vectorisable, and of one order that depends on the length only (the compiler may
// not reassociate a floating sum by itself).
#pragma once

#include <cstdint>

#include "core/half.hpp"

namespace flashu::core {

template <class Sum, int kCount>
struct Lanes {
  Sum lane[kCount] = {};

  FLASHU_INLINE Sum total() {
    for (int width = kCount / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
  }
};

// Calls term(j, lane) for every j in [0, n), lane = j modulo the number of lanes.
template <int kCount, class Term>
FLASHU_INLINE void for_lanes(int64_t n, const Term& term) {
  int64_t j = 0;
  for (; j + kCount <= n; j += kCount) {
    for (int i = 0; i < kCount; ++i) term(j + i, i);
  }
  for (int i = 0; j < n; ++j, ++i) term(j, i);
}

}  // namespace flashu::core
