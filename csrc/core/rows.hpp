// A tensor seen as rows: leading dimensions folded into one where their strides allow it.
#pragma once

#include "core/checks.hpp"

namespace flashu::core {

// [..., width] as `count` rows that are `stride` elements apart.
struct Rows {
  int64_t count;
  int64_t width;
  int64_t stride;
};

// Folds all dimensions but the last. Fails, naming the tensor, if no single row stride reaches all rows or if
// the last dimension is not contiguous.
Rows as_rows(const char* name, const flashu_tensor& tensor);

}  // namespace flashu::core
