// From the dtype code of a view to a C++ type.
#pragma once

#include "core/half.hpp"
#include "flashu/flashu.h"

namespace flashu::core {

// Calls body with a value of the storage type that `dtype` names: float, bfloat16 or float16.
template <class Body>
void with_type(int32_t dtype, const Body& body) {
  switch (dtype) {
    case FLASHU_BF16:
      return body(bfloat16{});
    case FLASHU_F16:
      return body(float16{});
    default:
      return body(0.0f);
  }
}

template <class T>
T* pointer(const flashu_tensor& tensor) {
  return static_cast<T*>(tensor.data);
}

}  // namespace flashu::core
