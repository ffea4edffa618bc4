// Between torch's stable ABI and the C API: tensor views and errors. The only headers of torch used anywhere
// are torch/csrc/stable and torch/headeronly, so that one binary serves torch 2.11 and newer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "flashu/flashu.h"

namespace flashu::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// View for the C API; throws for dtypes and devices that the C API has no code for, naming the argument.
flashu_tensor view(const char* op, const char* name, const Tensor& tensor);

// The absent tensor when there is none.
flashu_tensor view(const char* op, const char* name, const std::optional<Tensor>& tensor);

// Throws when `status` is not FLASHU_OK. The text starts with "flashu <kind> error: " (value, type, index,
// unsupported, internal), from which Python chooses the exception class.
void check_status(int32_t status);

// A fresh args struct with its size filled in.
template <class Args>
Args make_args() {
  Args args{};
  args.struct_size = sizeof(Args);
  return args;
}

// Contiguous uninitialised tensor with `like`'s dtype (or another) and device.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes,
                        std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The tensor itself if its leading dimensions fold into rows of one stride (what the C API asks of inputs),
// else a contiguous copy. For inputs only.
Tensor foldable(const Tensor& tensor);
std::optional<Tensor> foldable(const std::optional<Tensor>& tensor);

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

}  // namespace flashu::torch_ops
