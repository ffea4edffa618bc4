// Linear layers on the CPU: rows in chunks, each packed once and projected.
#include "cpu/linear.hpp"

#include <algorithm>

#include "cpu/gemm.hpp"
#include "cpu/projection.hpp"

namespace flashu::cpu {

LinearPlan plan_linear(const core::LinearProblem& p) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  LinearPlan s;
  s.digits = p.int8 && uses_digits(p.type, p.k);
  s.tiles = core::choose_gemm_tiles(s.digits ? digit_problem(gemm, p.m, p.n, p.k)
                                             : gemm_problem(gemm, p.type, p.int8, p.m, p.n, p.k));
  s.chunk = s.digits ? s.tiles.chunk_m / kDigits : s.tiles.chunk_m;
  const int64_t rows = std::min(p.m, s.chunk);
  s.x_floats = s.digits ? Digits::floats(rows, p.k)
                        : PackedRows::floats(rows, slots_of(gemm, p.type, p.k), gemm.tile_rows);
  s.slot_floats = panel_scratch_floats(gemm, s.tiles);
  s.slots = slots_for(p.m, static_cast<double>(p.n) * static_cast<double>(p.k));
  return s;
}

void linear(const core::LinearProblem& p, const LinearPlan& s, void* workspace) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  float* const packed = static_cast<float*>(workspace);
  const Projection projection{p.parts, p.count, {p.type, p.int8, p.k, p.k, 0, nullptr}, p.epilogue};
  for (int64_t row = 0; row < p.m; row += s.chunk) {
    const int64_t rows = std::min(s.chunk, p.m - row);
    const core::Matrix from{row_of(p.x, row, p.type), p.x.stride};
    if (s.digits) {
      const Digits x({from, p.type, unit_bits(p.type), rows, p.k, p.k}, s.tiles.block_k, packed);
      project(projection, s.tiles, x.operand(), row, rows, packed + s.x_floats, s.slots);
      continue;
    }
    const PackedRows x{packed, rows, slots_of(gemm, p.type, p.k), gemm.tile_rows, s.tiles.block_k};
    pack_rows(gemm, x, from.data, p.type, p.x.stride, p.k);
    project(projection, s.tiles, x, row, rows, packed + s.x_floats, s.slots);
  }
}

}  // namespace flashu::cpu
