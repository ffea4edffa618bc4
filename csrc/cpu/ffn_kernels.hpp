// Epilogues of the FFN: what happens to a product panel before it is stored. One table per CPU instruction
// set.
#pragma once

#include <cstdint>

#include "cpu/gemm_kernels.hpp"

namespace flashu::cpu {

struct FfnKernels {
  // A panel holds kWidth gate columns, then kWidth up columns (panel_columns = 2 kWidth). In place, per row:
  // c[r][j] = silu(c[r][j]) * c[r][kWidth + j].
  void (*swiglu)(float* c, int64_t rows);

  // c[r][j] += added[r * stride + j], r < rows, j < count <= kWidth, of a storage type.
  void (*add[kStorageTypes])(float* c, const void* added, int64_t stride, int64_t rows, int64_t count);

  // sums[j] += c[r][j]^2 over rows in order, j < count <= kWidth.
  void (*add_squares)(double* sums, const float* c, int64_t rows, int64_t count);

  // c[r][j], j < count -> tile order, as GemmKernels::pack_rows has it: rounded to bf16 where the slots are
  // pairs of them, in float otherwise.
  void (*pack_tile[kStorageTypes])(float* out, const float* c, int64_t rows, int64_t count);
};
FLASHU_DECLARE_ISA(FfnKernels, ffn_kernels)

}  // namespace flashu::cpu
