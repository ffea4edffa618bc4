// What the entry points of the row-wise op families share: typed dispatch, grains of work and compound
// checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "core/checks.hpp"
#include "core/half.hpp"

namespace flashu::cpu {

// Calls body with a value of the storage type that `dtype` names.
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

// Elements below which one more thread costs more than it saves.
inline constexpr int64_t kGrainElements = 16384;

// The same in rows of `width`.
inline int64_t row_grain(int64_t width) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

inline void check_floating(const char* name, const flashu_tensor& tensor) {
  core::check_dtype(name, tensor, {FLASHU_F32, FLASHU_BF16, FLASHU_F16});
}

// Same shape and dtype.
inline void check_like(const char* name, const flashu_tensor& tensor, const char* other_name,
                       const flashu_tensor& other) {
  core::check_same_shape(name, tensor, other_name, other);
  core::check_same_dtype(name, tensor, other_name, other);
}

// A tensor that is written: it overlaps neither itself nor an input.
inline void check_output(const char* name, const flashu_tensor& out,
                         std::initializer_list<std::pair<const char*, const flashu_tensor*>> inputs) {
  core::check_non_overlapping(name, out);
  for (const auto& [input_name, input] : inputs) core::check_disjoint(name, out, input_name, *input);
}

inline void check_contiguous(const char* name, const flashu_tensor& tensor) {
  if (core::numel(tensor) == 0) return;
  int64_t expected = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    FLASHU_CHECK(tensor.sizes[d] == 1 || tensor.strides[d] == expected, FLASHU_INVALID_VALUE, name,
                 ": expected a contiguous tensor, got stride ", tensor.strides[d], " in dimension ", d,
                 " instead of ", expected);
    expected *= tensor.sizes[d];
  }
}

inline void check_finite(const char* name, double value) {
  FLASHU_CHECK(std::isfinite(value), FLASHU_INVALID_VALUE, name, ": expected a finite number, got ", value);
}

}  // namespace flashu::cpu
