// Linear layers on CUDA devices, after all checks (csrc/api/linear.cpp).
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/ffn_choice.hpp"
#include "core/linear_problem.hpp"

namespace flashu::cuda {

// How a problem is run: by the kernel for few rows, or for each of its parts by a tile, with workspace for
// the parts of K where blocks share a tile.
struct LinearPlan {
  struct Part {
    core::FfnCandidate tile{};
    core::FfnPartials partials;
  };
  bool few_rows = false;
  Part parts[FLASHU_LINEAR_WEIGHTS];
  int multiprocessors = 0;

  // The parts run one after another and use the same memory.
  int64_t bytes() const {
    int64_t most = 0;
    for (const Part& part : parts) most = std::max(most, part.partials.bytes);
    return most;
  }
};

// Of at least one row and one column. Depends on shapes, alignment and the device.
LinearPlan plan_linear(const core::LinearProblem& problem);

// workspace: of at least plan.bytes().
void linear(const core::LinearProblem& problem, const LinearPlan& plan, void* workspace);

}  // namespace flashu::cuda
