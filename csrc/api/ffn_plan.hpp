// A call of the FFN family after its checks: what runs and the workspace that it needs, worked out once.
#pragma once

#include <cstdint>
#include <variant>

#include "core/ffn_problem.hpp"
#include "core/for_ops.hpp"
#include "cpu/ffn.hpp"
#include "cuda/ffn.hpp"

namespace flashu::api {

class FLASHU_FOR_OPS FfnPlan {
 public:
  // Args: flashu_swiglu_args, flashu_down_args or flashu_ffn_args, whose workspace is not looked at. Throws
  // Failure. The tensors' memory is used until run() returns.
  template <class Args>
  explicit FfnPlan(const Args& args);

  // Depends on shapes, the selection, the device and the number of threads.
  uint64_t workspace_bytes() const;

  // Throws FLASHU_WORKSPACE for a workspace that is too small or misaligned.
  void run(void* workspace, uint64_t bytes) const;

 private:
  core::FfnProblem problem_;
  std::variant<cpu::FfnPlan, cuda::FfnPlan> plan_;
};

}  // namespace flashu::api
