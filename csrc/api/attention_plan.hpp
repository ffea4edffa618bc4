// A call of attention after its checks: what runs and the workspace that it needs, worked out once.
#pragma once

#include <cstdint>

#include "core/attention_problem.hpp"
#include "core/for_ops.hpp"
#include "cpu/attention.hpp"
#include "flashu/attention.h"

namespace flashu::api {

class FLASHU_FOR_OPS AttentionPlan {
 public:
  // The workspace of `args` is not looked at. Throws Failure. The tensors' memory is used until run()
  // returns.
  explicit AttentionPlan(const flashu_attention_args& args);

  // Depends on shapes and the number of threads.
  uint64_t workspace_bytes() const;

  // Throws FLASHU_WORKSPACE for a workspace that is too small or misaligned.
  void run(void* workspace, uint64_t bytes) const;

 private:
  bool empty() const {
    return problem_.rows == 0 || problem_.heads == 0 || problem_.n == 0 || problem_.d == 0;
  }

  core::AttentionProblem problem_;
  cpu::AttentionPlan plan_;
};

}  // namespace flashu::api
