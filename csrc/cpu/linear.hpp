// Linear layers on the CPU, after all checks (csrc/api/linear.cpp).
#pragma once

#include <cstdint>

#include "core/linear_problem.hpp"
#include "core/tiles.hpp"

namespace flashu::cpu {

// How a problem is run, and its scratch: sizes in floats.
struct LinearPlan {
  core::GemmTiles tiles{};
  bool digits = false;  // rows are multiplied as such
  int64_t chunk = 0;    // rows that share one packing of the weights
  int64_t x_floats = 0, slot_floats = 0;
  int64_t slots = 0;  // tasks that may run at once

  int64_t bytes() const { return (x_floats + slots * slot_floats) * 4; }
};

// Of at least one row and one column. Depends on shapes and the number of threads.
LinearPlan plan_linear(const core::LinearProblem& problem);

// workspace: of at least plan.bytes().
void linear(const core::LinearProblem& problem, const LinearPlan& plan, void* workspace);

}  // namespace flashu::cpu
