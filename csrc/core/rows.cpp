// Folding of leading dimensions into rows.
#include "core/rows.hpp"

namespace flashu::core {

Rows as_rows(const char* name, const flashu_tensor& tensor) {
  check_rank_at_least(name, tensor, 1);
  check_inner_contiguous(name, tensor);
  Rows rows{1, tensor.sizes[tensor.ndim - 1], 0};
  for (int d = 0; d < tensor.ndim - 1; ++d) rows.count *= tensor.sizes[d];
  if (rows.count == 0) return rows;
  int64_t folded = 1;  // rows below the dimension being looked at
  for (int d = tensor.ndim - 2; d >= 0; --d) {
    if (tensor.sizes[d] == 1) continue;
    if (folded == 1) {
      rows.stride = tensor.strides[d];
    } else {
      FLASHU_CHECK(tensor.strides[d] == rows.stride * folded, FLASHU_INVALID_VALUE, name,
                   ": expected leading dimensions that fold into rows of one stride, got stride ",
                   tensor.strides[d], " in dimension ", d, " instead of ", rows.stride * folded);
    }
    folded *= tensor.sizes[d];
  }
  if (folded == 1) rows.stride = rows.width;
  return rows;
}

}  // namespace flashu::core
