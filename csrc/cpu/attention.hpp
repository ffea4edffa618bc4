// Attention on the CPU, after all checks (csrc/api/attention.cpp).
#pragma once

#include <cstdint>

#include "core/attention_problem.hpp"

namespace flashu::cpu {

// How a problem is run, and its scratch: sizes in floats.
struct AttentionPlan {
  int64_t lanes = 0;   // queries of a panel
  int64_t panels = 0;  // of a task: they share the blocks of keys that are read
  int64_t tasks_of_head = 0;
  int64_t span_floats = 0, slot_floats = 0;
  int64_t slots = 0;  // tasks that may run at once

  int64_t bytes() const { return (span_floats + slots * slot_floats) * 4; }
};

// Of at least one row, head, query and column. Depends on shapes, strides of the mask and the number of
// threads.
AttentionPlan plan_attention(const core::AttentionProblem& problem);

// workspace: of at least plan.bytes().
void attention(const core::AttentionProblem& problem, const AttentionPlan& plan, void* workspace);

}  // namespace flashu::cpu
