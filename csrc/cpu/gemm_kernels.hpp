// Kernels of the packed GEMM: packing of rows and weight panels into float, and the register tile. One
// table per CPU instruction set; the loops around them are in gemm.cpp.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"

namespace flashu::cpu {

// Packed operands consist of 32-bit slots along k: a float, or two bf16 where the CPU multiplies bf16 pairs
// and the storage is bf16. Products are summed in blocks of this many slots, each from zero, block after
// block. The order depends on nothing else (not on M, threads, or blocking), so a row's result is the same
// bits whatever else is computed with it.
inline constexpr int64_t kSumBlock = 32;

// Storage types in the order of the tables below (flashu_dtype F32, BF16, F16).
inline constexpr int kStorageTypes = 3;

// What weights may be beside x of a storage type t: t too, or int8 at kStorageTypes + t.
inline constexpr int kWeightKinds = 2 * kStorageTypes;

struct GemmKernels {
  int32_t tile_rows;                   // rows of one register tile
  int32_t panel_columns;               // columns of one register tile and of one packed panel; two vectors
  int32_t slot_values[kStorageTypes];  // k in a slot: 1, or 2 for bf16 pairs

  // `count` is a number of k, slot s holds k = s * slot_values and on; what is missing (rows, or the second
  // half of the last slot) becomes zero.

  // x[r * stride + k], r < rows <= tile_rows, k < count -> out[s * tile_rows + r].
  void (*pack_rows[kStorageTypes])(float* out, const void* x, int64_t stride, int64_t rows, int64_t count);

  // source[c][k], c < panel_columns, k < count -> out[s * panel_columns + c]. `ahead` are rows that will be
  // packed next, to be prefetched; may be null.
  void (*pack_panel[kWeightKinds])(float* out, const void* const* source, const void* const* ahead,
                                   int64_t count);

  // source[c][columns[k]] -> out[s * panel_columns + c]; `width` is the length of every source row.
  void (*pack_columns[kWeightKinds])(float* out, const void* const* source, const int32_t* columns,
                                     int64_t count, int64_t width);

  // One row straight from the weights, nothing packed: c[j] = sum over slots of a[s * tile_rows] *
  // source[j]. `ahead` as above: the rows of the next call.
  void (*multiply_row[kWeightKinds])(float* c, const float* a, const void* const* source,
                                     const void* const* ahead, int64_t count);

  // c[r * panel_columns + j] (+)= sum over slots of a[s * tile_rows + r] * b[s * panel_columns + j]; r <
  // rows. Overwrites c when `first`.
  void (*multiply[kStorageTypes])(float* c, const float* a, const float* b, int64_t slots, int32_t rows,
                                  bool first);
};
FLASHU_DECLARE_ISA(GemmKernels, gemm_kernels)

}  // namespace flashu::cpu
