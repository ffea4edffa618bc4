/// @file
/// The C++ API, base part: errors as exceptions and tensor views from plain pointers. Header-only over the C
/// API; each op family adds a header of thin typed wrappers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashu/flashu.h"

/// The C++ API.
namespace flashu {

/// A failed call: status() tells the kind, what() is "op: argument: expected ..., got ...".
class Error : public std::runtime_error {
 public:
  /// As check() throws it.
  Error(flashu_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  /// Its kind, never FLASHU_OK.
  flashu_status status() const { return status_; }

 private:
  flashu_status status_;
};

/// Throws Error with the library's text unless `status`, from a function of the C API, is FLASHU_OK.
inline void check(int32_t status) {
  if (status != FLASHU_OK) throw Error(static_cast<flashu_status>(status), flashu_last_error());
}

/// A tensor over the caller's memory, on the CPU or on FLASHU_DEVICE_CUDA(ordinal). Strides count elements;
/// without them the tensor is contiguous.
inline flashu_tensor tensor(const void* data, flashu_dtype dtype, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides = {}, int32_t device = FLASHU_DEVICE_CPU) {
  if (sizes.size() > FLASHU_MAX_DIMS || (!strides.empty() && strides.size() != sizes.size())) {
    throw Error(FLASHU_INVALID_VALUE, "tensor: expected at most " + std::to_string(FLASHU_MAX_DIMS) +
                                          " sizes and as many strides, got " + std::to_string(sizes.size()) +
                                          " and " + std::to_string(strides.size()));
  }
  flashu_tensor view{};
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.device = device;
  view.ndim = static_cast<int32_t>(sizes.size());
  int64_t contiguous = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.sizes[d] = sizes[static_cast<size_t>(d)];
    view.strides[d] = strides.empty() ? contiguous : strides[static_cast<size_t>(d)];
    contiguous *= view.sizes[d];
  }
  return view;
}

/// A zeroed args struct of the C API with its size filled in.
template <class Args>
Args make_args() {
  Args args{};
  args.struct_size = sizeof(Args);
  return args;
}

/// Memory for an op that needs some; see flashu.h. Without one the C++ API allocates it for
/// ops on the CPU; ops on CUDA devices that need one refuse.
struct Workspace {
  void* data = nullptr;  ///< on the op's device, aligned to 64 bytes
  uint64_t bytes = 0;    ///< its size
};

namespace detail {

struct AlignedDelete {
  void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

template <class Args>
void run_with_workspace(Args args, int32_t device, int32_t (*size)(const Args*, uint64_t*),
                        int32_t (*run)(const Args*)) {
  args.struct_size = sizeof(Args);
  std::unique_ptr<std::byte[], AlignedDelete> memory;
  if (args.workspace == nullptr && device == FLASHU_DEVICE_CPU) {
    check(size(&args, &args.workspace_bytes));
    memory.reset(new (std::align_val_t{64}) std::byte[args.workspace_bytes]);
    args.workspace = memory.get();
  }
  check(run(&args));
}

}  // namespace detail

}  // namespace flashu
