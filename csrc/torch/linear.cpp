// torch adapter of the linear layer: views in, C API, output and workspace from torch's allocator.
#include "flashu/linear.h"

#include <algorithm>

#include "api/linear_plan.hpp"
#include "torch/planned.hpp"

namespace flashu::torch_ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor linear_into(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, int64_t epilogue, const Tensor& out) {
  const char* op = "linear";
  const Tensor rows = foldable(x);
  const OptionalTensor added = foldable(residual);
  auto args = make_args<flashu_linear_args>(x);
  args.epilogue = static_cast<int32_t>(std::clamp<int64_t>(epilogue, -1, FLASHU_EPILOGUE_SILU + 1));
  args.x = view(op, "x", rows);
  args.weight = view(op, "weight", weight);
  args.bias = view(op, "bias", bias);
  args.residual = view(op, "residual", added);
  args.out = view(op, "out", out);
  run_planned<api::LinearPlan>(op, args, x);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual, int64_t epilogue) {
  return linear_into(x, weight, bias, residual, epilogue, new_rows(x, size_or_zero(weight, 0)));
}

}  // namespace

template <class Library>
void register_linear(Library& m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear.out", TORCH_BOX(&linear_into));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(linear)
