// The caller's selection of neurons, validated and in the form that the CPU loops read.
#pragma once

#include <cstdint>
#include <vector>

#include "flashu/ffn.h"

namespace flashu::cpu {

// Either one range [first, first + count), or a list of `count` neurons.
struct Selection {
  int64_t count = 0;
  int64_t first = 0;
  bool range = true;
  std::vector<int32_t> list;  // empty for a range

  int64_t operator[](int64_t position) const {
    return range ? first + position : list[static_cast<size_t>(position)];
  }
};

// Throws Failure for runs or indices that are out of range, repeated or malformed.
Selection resolve(const flashu_selection& selection, int64_t intermediate);

}  // namespace flashu::cpu
