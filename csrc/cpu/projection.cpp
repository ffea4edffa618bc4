// Packed rows times a matrix of weights, a panel of its rows at a time.
#include "cpu/projection.hpp"

#include <algorithm>

#include "core/typed.hpp"
#include "cpu/epilogue_kernels.hpp"

namespace flashu::cpu {
namespace {

// `count` values of the bias from column `first` on as floats; null where there is none.
const float* widened(const Projection& p, int64_t first, int64_t count, float* to) {
  if (p.bias == nullptr) return nullptr;
  core::with_type(p.weights.type, [&](auto tag) {
    const auto* const from = static_cast<const decltype(tag)*>(p.bias) + first;
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
  });
  return to;
}

}  // namespace

void project(const Projection& p, const core::GemmTiles& tiles, const PackedRows& a, int64_t first_row,
             float* scratch, int64_t slots) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const EpilogueKernels& epilogue = FLASHU_PICK_ISA(epilogue_kernels);
  const int32_t type = p.weights.type;
  const int64_t size = element_bytes(type);

  const auto rows_of = [&](int64_t panel, const void** rows) {
    // Columns past the last one repeat it; what they give is not stored.
    for (int64_t j = 0; j < gemm.panel_columns; ++j)
      rows[j] = row_of(p.w, std::min(panel * gemm.panel_columns + j, p.n - 1), type);
  };
  const auto finish = [&](int64_t panel, float* c) {
    const int64_t first = panel * gemm.panel_columns;
    const int64_t count = std::min<int64_t>(gemm.panel_columns, p.n - first);
    float memory[kMaxPanelColumns] = {};
    const float* const bias = widened(p, first, count, memory);
    if (bias != nullptr || p.epilogue != FLASHU_EPILOGUE_NONE) epilogue.activate[p.epilogue](c, bias, a.rows);
    const char* const residual =
        p.residual.data == nullptr ? nullptr : row_of(p.residual, first_row, type) + first * size;
    epilogue.store_rows[type](row_of(p.out, first_row, type) + first * size, p.out.stride, residual,
                              p.residual.stride, c, a.rows, count);
  };
  multiply_panels(gemm, tiles, a, divide_up(p.n, gemm.panel_columns), p.weights, scratch, slots, rows_of,
                  finish);
}

}  // namespace flashu::cpu
