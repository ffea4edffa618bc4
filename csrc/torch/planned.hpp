// Ops whose plan is worked out once: checks, workspace, run.
#pragma once

#include "core/checks.hpp"
#include "torch/common.hpp"

namespace flashu::torch_ops {

// Plan: of csrc/api. Checks once, takes the workspace that the plan asks for, and runs.
template <class Plan, class Args>
void run_planned(const char* op, const Args& args, const Tensor& like) {
  std::optional<Plan> plan;
  check_status(core::guarded(op, [&] { plan.emplace(args); }));
  const Workspace workspace(like, plan->workspace_bytes());
  check_status(core::guarded(op, [&] { plan->run(workspace.data(), workspace.bytes()); }));
}

// A new tensor of the rows of `like`, `width` columns wide.
inline Tensor new_rows(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes = sizes_of(like);
  if (!sizes.empty()) sizes.back() = width;
  return new_empty(like, sizes);
}

inline int64_t size_or_zero(const Tensor& tensor, int dim) {
  return tensor.dim() > dim ? tensor.size(dim) : 0;
}

}  // namespace flashu::torch_ops
