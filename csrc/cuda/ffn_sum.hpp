// The sum of the parts of a result that several blocks made; see ffn_sum.cu.
#pragma once

#include <cstdint>

#include "cuda/epilogue.hpp"
#include "cuda/primitives/launch.cuh"

namespace flashu::cuda {

// out[r, c] = parts[0, r, c] + parts[1, r, c] + ... (+ residual[r, c]). Strides in values. An epilogue is
// that of the linear layer, whose parts are few.
struct FfnSum {
  const float* parts;  // [count][rows][stride]
  int count;
  int64_t rows, width, stride;
  const void* residual;
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
  Epilogue epilogue = {};
};

// Begins while the kernel before still runs, and waits for it. `type`: a flashu_dtype of 16 bits.
void ffn_sum(const FfnSum& sum, int32_t type, Stream stream);

}  // namespace flashu::cuda
