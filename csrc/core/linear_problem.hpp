// Linear layers of one input after all checks: what the kernels are asked for.
#pragma once

#include <cstdint>

#include "core/matrix.hpp"
#include "flashu/linear.h"

namespace flashu::core {

// The columns of the result that one matrix of weights gives.
struct LinearPart {
  Matrix weight;         // [n, k]
  int64_t n;             // at least 1
  const float* scale;    // [n] that the sums are multiplied by where weights are int8, or null
  const void* bias;      // [n] of the storage type, or null
  Matrix residual, out;  // from this part's first column on
};

struct LinearProblem {
  int32_t type;  // flashu_dtype F32, BF16 or F16
  int32_t device;
  int64_t m, n, k;  // rows, columns of out, columns of x
  Matrix x;
  LinearPart parts[FLASHU_LINEAR_WEIGHTS];  // side by side
  int32_t count;                            // of parts
  int32_t epilogue;                         // flashu_epilogue
  bool int8;                                // weights are
  void* stream;
};

}  // namespace flashu::core
