// The selected neurons in the form that the CPU loops read.
#pragma once

#include <cstdint>
#include <vector>

#include "core/ffn_problem.hpp"

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

// Throws Failure for indices that are out of range or repeated.
Selection resolve(const core::FfnProblem& problem);

}  // namespace flashu::cpu
