// Linear layers on the CPU: rows in chunks, each packed once and projected.
#include "cpu/linear.hpp"

#include <algorithm>

#include "cpu/gemm.hpp"
#include "cpu/projection.hpp"

namespace flashu::cpu {

LinearPlan plan_linear(const core::LinearProblem& p) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  LinearPlan s;
  s.tiles = core::choose_gemm_tiles(gemm_problem(gemm, p.type, p.int8, p.m, p.n, p.k));
  s.x_floats =
      PackedRows::floats(std::min(p.m, s.tiles.chunk_m), slots_of(gemm, p.type, p.k), gemm.tile_rows);
  s.slot_floats = panel_scratch_floats(gemm, s.tiles);
  s.slots = slots_for(p.m, static_cast<double>(p.n) * static_cast<double>(p.k));
  return s;
}

void linear(const core::LinearProblem& p, const LinearPlan& s, void* workspace) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  float* const packed = static_cast<float*>(workspace);
  const Projection projection{p.parts, p.count, {p.type, p.int8, p.k, p.k, 0, nullptr}, p.epilogue};
  for (int64_t row = 0; row < p.m; row += s.tiles.chunk_m) {
    const PackedRows x{packed, std::min(s.tiles.chunk_m, p.m - row), slots_of(gemm, p.type, p.k),
                       gemm.tile_rows, s.tiles.block_k};
    pack_rows(gemm, x, row_of(p.x, row, p.type), p.type, p.x.stride, p.k);
    project(projection, s.tiles, x, row, packed + s.x_floats, s.slots);
  }
}

}  // namespace flashu::cpu
