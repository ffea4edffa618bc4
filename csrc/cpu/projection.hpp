// Packed rows times matrices of weights, with all that is done to the result before it is stored: the down
// half of the FFN, and linear layers.
#pragma once

#include <cstdint>

#include "core/linear_problem.hpp"
#include "core/tiles.hpp"
#include "cpu/gemm.hpp"

namespace flashu::cpu {

// out = epilogue(x weight^T + bias) + residual, for each of the parts
struct Projection {
  const core::LinearPart* parts;
  int32_t count;     // of parts
  Weights weights;   // which columns of theirs are K
  int32_t epilogue;  // flashu_epilogue
};

// Rows [first_row, first_row + rows) of every part's out, from the operand that holds them. scratch, slots:
// see multiply_panels.
void project(const Projection& p, const core::GemmTiles& tiles, const PackedRows& a, int64_t first_row,
             int64_t rows, float* scratch, int64_t slots);

}  // namespace flashu::cpu
