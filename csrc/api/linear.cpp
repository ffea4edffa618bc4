// C API of the linear layer: every check, then the kernels of the device.
#include "flashu/linear.h"

#include "api/calls.hpp"
#include "api/dispatch.hpp"
#include "api/linear_plan.hpp"
#include "api/operands.hpp"
#include "core/rows.hpp"

namespace flashu::api {
namespace {

core::LinearProblem checked(const flashu_linear_args& a) {
  check_all(
      {{"x", &a.x}, {"weight", &a.weight}, {"bias", &a.bias}, {"residual", &a.residual}, {"out", &a.out}});
  core::check_floating("x", a.x);
  FLASHU_CHECK(a.epilogue >= FLASHU_EPILOGUE_NONE && a.epilogue <= FLASHU_EPILOGUE_SILU, FLASHU_INVALID_VALUE,
               "epilogue: expected none, gelu, gelu_tanh or silu (0 to 3), got ", a.epilogue);
  const core::Rows x = core::as_rows("x", a.x);
  core::LinearProblem p{};
  p.type = a.x.dtype;
  p.device = a.x.device;
  p.x = {a.x.data, x.stride};
  p.weight = weight("weight", a.weight, "x", a.x);
  core::check_size("weight", a.weight, 1, x.width);
  p.m = x.count;
  p.n = a.weight.sizes[0];
  p.k = x.width;
  p.epilogue = a.epilogue;
  p.stream = a.stream;
  if (core::present(a.bias)) {
    core::check_same_dtype("bias", a.bias, "x", a.x);
    core::check_rank("bias", a.bias, 1);
    core::check_inner_contiguous("bias", a.bias);
    core::check_size("bias", a.bias, 0, p.n);
    p.bias = a.bias.data;
  }
  if (core::present(a.residual)) p.residual = rows_like("residual", a.residual, "x", a.x, p.n);
  p.out = output(a.out, "x", a.x, p.n,
                 {{"x", &a.x}, {"weight", &a.weight}, {"bias", &a.bias}, {"residual", &a.residual}});
  return p;
}

}  // namespace

LinearPlan::LinearPlan(const flashu_linear_args& args) : problem_(checked(args)) {
  if (empty()) return;
  run_on(
      problem_.device, [&] { plan_ = cpu::plan_linear(problem_); },
      [&] { plan_ = cuda::plan_linear(problem_); });
}

uint64_t LinearPlan::workspace_bytes() const {
  return std::visit([](const auto& plan) { return static_cast<uint64_t>(plan.bytes()); }, plan_);
}

void LinearPlan::run(void* workspace, uint64_t bytes) const {
  if (empty()) return;
  core::check_workspace(workspace, bytes, workspace_bytes());
  run_on(
      problem_.device, [&] { cpu::linear(problem_, std::get<cpu::LinearPlan>(plan_), workspace); },
      [&] { cuda::linear(problem_, std::get<cuda::LinearPlan>(plan_), workspace); });
}

}  // namespace flashu::api

extern "C" {

int32_t flashu_linear(const flashu_linear_args* args) {
  return flashu::api::run<flashu::api::LinearPlan>("linear", args);
}
int32_t flashu_linear_workspace(const flashu_linear_args* args, uint64_t* bytes) {
  return flashu::api::workspace<flashu::api::LinearPlan>("linear", args, bytes);
}

}  // extern "C"
