// One linear layer after all checks: what the kernels are asked for.
#pragma once

#include <cstdint>

#include "core/matrix.hpp"

namespace flashu::core {

struct LinearProblem {
  int32_t type;  // flashu_dtype F32, BF16 or F16
  int32_t device;
  int64_t m, n, k;  // rows, columns of out, columns of x
  Matrix x, weight, residual, out;
  const void* bias;  // [n] of the storage type, or null
  int32_t epilogue;  // flashu_epilogue
  void* stream;
};

}  // namespace flashu::core
