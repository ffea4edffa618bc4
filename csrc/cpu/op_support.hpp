// What the row-wise op families of the CPU share: typed dispatch and grains of work.
#pragma once

#include <algorithm>

#include "core/checks.hpp"
#include "core/typed.hpp"

namespace flashu::cpu {

using core::pointer;
using core::with_type;

// Elements below which one more thread costs more than it saves.
inline constexpr int64_t kGrainElements = 16384;

// The same in rows of `width`.
inline int64_t row_grain(int64_t width) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

}  // namespace flashu::cpu
