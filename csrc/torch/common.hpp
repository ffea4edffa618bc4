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

// The ops are torch.ops.flashu.*, unless a build that must stand beside others in one process names another
// namespace.
#ifndef FLASHU_OPS_NAMESPACE
#define FLASHU_OPS_NAMESPACE flashu
#endif
// Torch's macros make names and strings of the namespace, so it is expanded before they see it.
#define FLASHU_OPS_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define FLASHU_OPS_IMPL(ns, device, m) STABLE_TORCH_LIBRARY_IMPL(ns, device, m)

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

// torch's current stream of the tensor's device; null on the CPU.
void* current_stream(const Tensor& tensor);

// A fresh args struct with its size filled in, to run on `tensor`'s device and stream.
template <class Args>
Args make_args(const Tensor& tensor) {
  Args args{};
  args.struct_size = sizeof(Args);
  args.stream = current_stream(tensor);
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

// Scratch memory from torch's allocator, on the device of `like`.
class Workspace {
 public:
  Workspace(const Tensor& like, uint64_t bytes) : bytes_(bytes) {
    // Torch's allocators align to 64 bytes and more, which is what the C API asks for (and checks).
    const std::vector<int64_t> sizes = {static_cast<int64_t>(bytes)};
    if (bytes > 0) memory_ = new_empty(like, sizes, ScalarType::Byte);
  }
  void* data() const { return memory_.has_value() ? memory_->mutable_data_ptr() : nullptr; }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t bytes_;
  std::optional<Tensor> memory_;
};

// Runs an op that takes a workspace.
template <class Args>
void run_with_workspace(Args& args, const Tensor& like, int32_t (*size)(const Args*, uint64_t*),
                        int32_t (*op)(const Args*)) {
  check_status(size(&args, &args.workspace_bytes));
  const Workspace workspace(like, args.workspace_bytes);
  args.workspace = workspace.data();
  check_status(op(&args));
}

// Registers a family for the devices that this build has kernels for: the adapters serve all of them.
#if FLASHU_HAS_CUDA
#define FLASHU_REGISTER(family)                                                              \
  FLASHU_OPS_IMPL(FLASHU_OPS_NAMESPACE, CPU, m) { flashu::torch_ops::register_##family(m); } \
  FLASHU_OPS_IMPL(FLASHU_OPS_NAMESPACE, CUDA, m) { flashu::torch_ops::register_##family(m); }
#else
#define FLASHU_REGISTER(family) \
  FLASHU_OPS_IMPL(FLASHU_OPS_NAMESPACE, CPU, m) { flashu::torch_ops::register_##family(m); }
#endif

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

}  // namespace flashu::torch_ops
