// The linear layer on CUDA devices, after all checks (csrc/api/linear.cpp).
#pragma once

#include <cstdint>

#include "core/ffn_choice.hpp"
#include "core/linear_problem.hpp"

namespace flashu::cuda {

// How a problem is run: the tile, and the workspace for the parts of K where blocks share a tile.
struct LinearPlan {
  core::FfnCandidate tile{};
  int multiprocessors = 0;
  core::FfnPartials partials;

  int64_t bytes() const { return partials.bytes; }
};

// Of at least one row and one column. Depends on shapes, alignment and the device.
LinearPlan plan_linear(const core::LinearProblem& problem);

// workspace: of at least plan.bytes().
void linear(const core::LinearProblem& problem, const LinearPlan& plan, void* workspace);

}  // namespace flashu::cuda
