// Packed rows times a matrix of weights, with all that is done to the result before it is stored: the down
// half of the FFN, and the linear layer.
#pragma once

#include <cstdint>

#include "core/matrix.hpp"
#include "core/tiles.hpp"
#include "cpu/gemm.hpp"

namespace flashu::cpu {

// out = epilogue(x w^T + bias) + residual
struct Projection {
  core::Matrix w;   // [n, weights.width]
  Weights weights;  // which of its columns are K
  int64_t n;
  const void* bias;  // [n] of the storage type, or null
  int32_t epilogue;  // flashu_epilogue
  core::Matrix residual, out;
};

// Rows [first_row, first_row + a.rows) of out. scratch, slots: see multiply_panels.
void project(const Projection& p, const core::GemmTiles& tiles, const PackedRows& a, int64_t first_row,
             float* scratch, int64_t slots);

}  // namespace flashu::cpu
