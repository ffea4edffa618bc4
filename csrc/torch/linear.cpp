// torch adapter of linear layers: views in, C API, output and workspace from torch's allocator.
#include "flashu/linear.h"

#include <algorithm>
#include <limits>
#include <string>

#include "api/linear_plan.hpp"
#include "torch/planned.hpp"

namespace flashu::torch_ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

int32_t code(int64_t epilogue) {
  using Limits = std::numeric_limits<int32_t>;
  return static_cast<int32_t>(std::clamp<int64_t>(epilogue, Limits::min(), Limits::max()));
}

// op: its name, for errors. scale: of an int8 weight.
Tensor run_linear(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                  const OptionalTensor& bias, const OptionalTensor& residual, int64_t epilogue,
                  const Tensor& out) {
  const Tensor rows = foldable(x);
  const OptionalTensor added = foldable(residual);
  auto args = make_args<flashu_linear_args>(x);
  args.epilogue = code(epilogue);
  args.x = view(op, "x", rows);
  args.weight = view(op, "weight", weight);
  args.scale = view(op, "scale", scale);
  args.bias = view(op, "bias", bias);
  args.residual = view(op, "residual", added);
  args.out = view(op, "out", out);
  run_planned<api::LinearPlan>(op, args, x);
  return out;
}

Tensor linear_into(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, int64_t epilogue, const Tensor& out) {
  return run_linear("linear", x, weight, std::nullopt, bias, residual, epilogue, out);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual, int64_t epilogue) {
  return linear_into(x, weight, bias, residual, epilogue, new_rows(x, size_or_zero(weight, 0)));
}

Tensor int8_linear_into(const Tensor& x, const Tensor& weight, const Tensor& scale,
                        const OptionalTensor& bias, const OptionalTensor& residual, int64_t epilogue,
                        const Tensor& out) {
  return run_linear("int8_linear", x, weight, scale, bias, residual, epilogue, out);
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const OptionalTensor& bias,
                   const OptionalTensor& residual, int64_t epilogue) {
  return int8_linear_into(x, weight, scale, bias, residual, epilogue, new_rows(x, size_or_zero(weight, 0)));
}

Tensor linears_into(const Tensor& x, const std::vector<Tensor>& weights,
                    const std::vector<OptionalTensor>& biases, const OptionalTensor& residual,
                    int64_t epilogue, const Tensor& out) {
  const char* op = "linears";
  STD_TORCH_CHECK(!weights.empty() && weights.size() <= FLASHU_LINEAR_WEIGHTS,
                  "flashu value error: linears: weights: expected 1 to ", FLASHU_LINEAR_WEIGHTS,
                  " tensors, got ", weights.size());
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(),
                  "flashu value error: linears: biases: expected ", weights.size(),
                  " entries, one for each weight, got ", biases.size());
  const Tensor rows = foldable(x);
  const OptionalTensor added = foldable(residual);
  auto args = make_args<flashu_linears_args>(x);
  args.epilogue = code(epilogue);
  args.count = static_cast<int32_t>(weights.size());
  args.x = view(op, "x", rows);
  const auto element = [](const char* list, size_t i) {
    return std::string(list) + "[" + std::to_string(i) + "]";
  };
  for (size_t i = 0; i < weights.size(); ++i)
    args.weights[i] = view(op, element("weights", i).c_str(), weights[i]);
  for (size_t i = 0; i < biases.size(); ++i)
    args.biases[i] = view(op, element("biases", i).c_str(), biases[i]);
  args.residual = view(op, "residual", added);
  args.out = view(op, "out", out);
  run_planned<api::LinearPlan>(op, args, x);
  return out;
}

Tensor linears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
               const OptionalTensor& residual, int64_t epilogue) {
  int64_t width = 0;
  for (const Tensor& weight : weights) width += size_or_zero(weight, 0);
  return linears_into(x, weights, biases, residual, epilogue, new_rows(x, width));
}

}  // namespace

template <class Library>
void register_linear(Library& m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear.out", TORCH_BOX(&linear_into));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.out", TORCH_BOX(&int8_linear_into));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("linears.out", TORCH_BOX(&linears_into));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(linear)
