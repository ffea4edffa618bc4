// What happens to a product panel before it is stored, and the store. One table per CPU instruction set.
#pragma once

#include <cstdint>

#include "cpu/gemm_kernels.hpp"
#include "flashu/linear.h"

namespace flashu::cpu {

inline constexpr int kEpilogues = 4;  // of flashu_epilogue

struct EpilogueKernels {
  // In place: c[r][j] *= scale[j], r < rows, j < panel_columns.
  void (*scale)(float* c, const float* scale, int64_t rows);

  // In place: c[r][j] = f(c[r][j] + bias[j]), r < rows, j < panel_columns; bias may be null. By
  // flashu_epilogue. Whole vectors only, so that a value gives the same bits in every column.
  void (*activate[kEpilogues])(float* c, const float* bias, int64_t rows);

  // out[r * stride + j] = c[r][j] (+ residual[r * residual_stride + j]), r < rows, j < count <=
  // panel_columns. The residual has out's storage type and may be null.
  void (*store_rows[kStorageTypes])(void* out, int64_t stride, const void* residual, int64_t residual_stride,
                                    const float* c, int64_t rows, int64_t count);
};
FLASHU_DECLARE_ISA(EpilogueKernels, epilogue_kernels)

}  // namespace flashu::cpu
