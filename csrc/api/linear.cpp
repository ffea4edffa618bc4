// C API of linear layers: every check, then the kernels of the device.
#include "flashu/linear.h"

#include <algorithm>

#include "api/calls.hpp"
#include "api/dispatch.hpp"
#include "api/linear_plan.hpp"
#include "api/operands.hpp"
#include "core/rows.hpp"

namespace flashu::api {
namespace {

// What a caller knows a weight and its bias by.
struct Names {
  const char* weight;
  const char* bias;
};
constexpr Names kOne[FLASHU_LINEAR_WEIGHTS] = {{"weight", "bias"}};
constexpr Names kSeveral[FLASHU_LINEAR_WEIGHTS] = {{"weights[0]", "biases[0]"},
                                                   {"weights[1]", "biases[1]"},
                                                   {"weights[2]", "biases[2]"},
                                                   {"weights[3]", "biases[3]"}};

const char* bytes_behind(const void* data, int64_t elements, int32_t type) {
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(data) +
                                       static_cast<uintptr_t>(elements * core::dtype_size(type)));
}

// The same rows from another column on.
core::Matrix from_column(const core::Matrix& matrix, int64_t column, int32_t type) {
  if (matrix.data == nullptr) return matrix;
  return {static_cast<char*>(matrix.data) + column * core::dtype_size(type), matrix.stride};
}

// Whether `next` continues the rows of `part`, so that both are one matrix. The columns of `out` of both must
// begin where a vector may, or one of them alone would be written, and summed, by another kernel.
bool continues(const core::LinearPart& part, const core::LinearPart& next, int32_t type) {
  constexpr uintptr_t kVectorBytes = 16;
  const auto vector = [](const core::Matrix& matrix) {
    return reinterpret_cast<uintptr_t>(matrix.data) % kVectorBytes == 0;
  };
  const bool biases = (part.bias == nullptr) == (next.bias == nullptr) &&
                      (part.bias == nullptr || bytes_behind(part.bias, part.n, type) == next.bias);
  return biases && part.weight.stride == next.weight.stride &&
         bytes_behind(part.weight.data, part.n * part.weight.stride, type) == next.weight.data &&
         vector(part.out) && vector(next.out);
}

// scale: of a first weight that is int8, or absent.
core::LinearProblem checked(const flashu_linears_args& a, const Names* names, const flashu_tensor& scale) {
  FLASHU_CHECK(a.count >= 1 && a.count <= FLASHU_LINEAR_WEIGHTS, FLASHU_INVALID_VALUE,
               "count: expected 1 to ", FLASHU_LINEAR_WEIGHTS, " weights, got ", a.count);
  static_assert(FLASHU_LINEAR_WEIGHTS == 4, "the lists of inputs below name four");
  flashu_tensor w[FLASHU_LINEAR_WEIGHTS] = {};
  flashu_tensor b[FLASHU_LINEAR_WEIGHTS] = {};
  std::copy_n(a.weights, a.count, w);  // what lies behind `count` is not looked at
  std::copy_n(a.biases, a.count, b);
  const NamedTensors inputs = {{"x", &a.x},
                               {names[0].weight, &w[0]},
                               {names[1].weight, &w[1]},
                               {names[2].weight, &w[2]},
                               {names[3].weight, &w[3]},
                               {names[0].bias, &b[0]},
                               {names[1].bias, &b[1]},
                               {names[2].bias, &b[2]},
                               {names[3].bias, &b[3]},
                               {"scale", &scale},
                               {"residual", &a.residual}};
  check_all(inputs);
  check_all({{"x", &a.x}, {"out", &a.out}});
  core::check_floating("x", a.x);
  FLASHU_CHECK(a.epilogue >= FLASHU_EPILOGUE_NONE && a.epilogue <= FLASHU_EPILOGUE_SILU, FLASHU_INVALID_VALUE,
               "epilogue: expected none, gelu, gelu_tanh or silu (0 to 3), got ", a.epilogue);
  const core::Rows x = core::as_rows("x", a.x);
  core::LinearProblem p{};
  p.type = a.x.dtype;
  p.device = a.x.device;
  p.x = {a.x.data, x.stride};
  p.m = x.count;
  p.k = x.width;
  p.epilogue = a.epilogue;
  p.stream = a.stream;
  p.int8 = core::present(scale);
  core::LinearPart given[FLASHU_LINEAR_WEIGHTS] = {};
  for (int32_t i = 0; i < a.count; ++i) {
    core::LinearPart& part = given[i];
    part.weight = p.int8 ? int8_weight(names[i].weight, w[i]) : weight(names[i].weight, w[i], "x", a.x);
    core::check_size(names[i].weight, w[i], 1, p.k);
    part.n = w[i].sizes[0];
    if (p.int8) part.scale = row_scales("scale", scale, part.n);
    p.n += part.n;
    if (!core::present(b[i])) continue;
    core::check_same_dtype(names[i].bias, b[i], "x", a.x);
    core::check_rank(names[i].bias, b[i], 1);
    core::check_inner_contiguous(names[i].bias, b[i]);
    core::check_size(names[i].bias, b[i], 0, part.n);
    part.bias = b[i].data;
  }
  core::Matrix residual;
  if (core::present(a.residual)) residual = rows_like("residual", a.residual, "x", a.x, p.n);
  const core::Matrix out = output(a.out, "x", a.x, p.n, inputs);
  int64_t column = 0;
  for (int32_t i = 0; i < a.count; ++i) {
    core::LinearPart part = given[i];
    if (part.n == 0) continue;
    part.residual = from_column(residual, column, p.type);
    part.out = from_column(out, column, p.type);
    if (p.count > 0 && continues(p.parts[p.count - 1], part, p.type)) {
      p.parts[p.count - 1].n += part.n;
    } else {
      p.parts[p.count++] = part;
    }
    column += part.n;
  }
  return p;
}

core::LinearProblem checked(const flashu_linear_args& a) {
  flashu_linears_args one{};
  one.epilogue = a.epilogue;
  one.count = 1;
  one.x = a.x;
  one.weights[0] = a.weight;
  one.biases[0] = a.bias;
  one.residual = a.residual;
  one.out = a.out;
  one.stream = a.stream;
  return checked(one, kOne, a.scale);
}

}  // namespace

LinearPlan::LinearPlan(const flashu_linear_args& args) : problem_(checked(args)) { plan(); }
LinearPlan::LinearPlan(const flashu_linears_args& args) : problem_(checked(args, kSeveral, {})) { plan(); }

void LinearPlan::plan() {
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
int32_t flashu_linears(const flashu_linears_args* args) {
  return flashu::api::run<flashu::api::LinearPlan>("linears", args);
}
int32_t flashu_linears_workspace(const flashu_linears_args* args, uint64_t* bytes) {
  return flashu::api::workspace<flashu::api::LinearPlan>("linears", args, bytes);
}

}  // extern "C"
