// A call of linear layers after its checks: what runs and the workspace that it needs, worked out once.
#pragma once

#include <cstdint>
#include <variant>

#include "core/for_ops.hpp"
#include "core/linear_problem.hpp"
#include "cpu/linear.hpp"
#include "cuda/linear.hpp"
#include "flashu/linear.h"

namespace flashu::api {

class FLASHU_FOR_OPS LinearPlan {
 public:
  // The workspace of `args` is not looked at. Throws Failure. The tensors' memory is used until run()
  // returns.
  explicit LinearPlan(const flashu_linear_args& args);
  explicit LinearPlan(const flashu_linears_args& args);

  // Depends on shapes, the device and the number of threads.
  uint64_t workspace_bytes() const;

  // Throws FLASHU_WORKSPACE for a workspace that is too small or misaligned.
  void run(void* workspace, uint64_t bytes) const;

 private:
  void plan();
  bool empty() const { return problem_.m == 0 || problem_.n == 0; }

  core::LinearProblem problem_;
  std::variant<cpu::LinearPlan, cuda::LinearPlan> plan_;
};

}  // namespace flashu::api
