// Division of counts into whole tiles, blocks and chunks.
#pragma once

#include <cstdint>

namespace flashu {

// The least number of groups of `by` that hold `value`; value >= 0, by > 0.
constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace flashu
