// The C++ API, base part: errors as exceptions and tensor views from plain pointers. Header-only over the C
// API; each op family adds a header of thin typed wrappers.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashu/flashu.h"

namespace flashu {

// A failed call: status() tells the kind, what() is "op: argument: expected ..., got ...".
class Error : public std::runtime_error {
 public:
  Error(flashu_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  flashu_status status() const { return status_; }

 private:
  flashu_status status_;
};

inline void check(int32_t status) {
  if (status != FLASHU_OK) throw Error(static_cast<flashu_status>(status), flashu_last_error());
}

// A CPU tensor over the caller's memory. Strides count elements; without them the tensor is contiguous.
inline flashu_tensor tensor(const void* data, flashu_dtype dtype, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides = {}) {
  if (sizes.size() > FLASHU_MAX_DIMS || (!strides.empty() && strides.size() != sizes.size())) {
    throw Error(FLASHU_INVALID_VALUE, "tensor: expected at most " + std::to_string(FLASHU_MAX_DIMS) +
                                          " sizes and as many strides, got " + std::to_string(sizes.size()) +
                                          " and " + std::to_string(strides.size()));
  }
  flashu_tensor view{};
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.device = FLASHU_DEVICE_CPU;
  view.ndim = static_cast<int32_t>(sizes.size());
  int64_t contiguous = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.sizes[d] = sizes[static_cast<size_t>(d)];
    view.strides[d] = strides.empty() ? contiguous : strides[static_cast<size_t>(d)];
    contiguous *= view.sizes[d];
  }
  return view;
}

// A zeroed args struct of the C API with its size filled in.
template <class Args>
Args make_args() {
  Args args{};
  args.struct_size = sizeof(Args);
  return args;
}

}  // namespace flashu
