// Packed rows times matrices of weights, a panel of their rows at a time.
#include "cpu/projection.hpp"

#include <algorithm>

#include "core/typed.hpp"
#include "cpu/epilogue_kernels.hpp"

namespace flashu::cpu {
namespace {

// `count` values of a bias of storage type `type` from column `first` on as floats; null where there is none.
const float* widened(const void* bias, int32_t type, int64_t first, int64_t count, float* to) {
  if (bias == nullptr) return nullptr;
  core::with_type(type, [&](auto tag) {
    const auto* const from = static_cast<const decltype(tag)*>(bias) + first;
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
  });
  return to;
}

// Where a panel lies: a part never shares a panel with the next one.
struct Place {
  const core::LinearPart& part;
  int64_t first;  // column of the part
};

Place place_of(const Projection& p, int64_t panel, int64_t panel_columns) {
  const core::LinearPart* part = p.parts;
  for (;; ++part) {
    const int64_t panels = divide_up(part->n, panel_columns);
    if (panel < panels) return {*part, panel * panel_columns};
    panel -= panels;
  }
}

}  // namespace

void project(const Projection& p, const core::GemmTiles& tiles, const PackedRows& a, int64_t first_row,
             int64_t rows, float* scratch, int64_t slots) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const EpilogueKernels& epilogue = FLASHU_PICK_ISA(epilogue_kernels);
  const int32_t type = p.weights.type;
  const int64_t size = element_bytes(type);

  const auto rows_of = [&](int64_t panel, const void** weights) {
    const auto [part, first] = place_of(p, panel, gemm.panel_columns);
    // Columns past the last one repeat it; what they give is not stored.
    for (int64_t j = 0; j < gemm.panel_columns; ++j)
      weights[j] = weight_row(part.weight, std::min(first + j, part.n - 1), type, p.weights.int8);
  };
  const auto finish = [&](int64_t panel, float* c) {
    const auto [part, first] = place_of(p, panel, gemm.panel_columns);
    const int64_t count = std::min<int64_t>(gemm.panel_columns, part.n - first);
    float memory[kMaxPanelColumns] = {};
    if (part.scale != nullptr) {
      std::copy_n(part.scale + first, count, memory);
      epilogue.scale(c, memory, rows);
    }
    const float* const bias = widened(part.bias, type, first, count, memory);
    if (bias != nullptr || p.epilogue != FLASHU_EPILOGUE_NONE) epilogue.activate[p.epilogue](c, bias, rows);
    const char* const residual =
        part.residual.data == nullptr ? nullptr : row_of(part.residual, first_row, type) + first * size;
    epilogue.store_rows[type](row_of(part.out, first_row, type) + first * size, part.out.stride, residual,
                              part.residual.stride, c, rows, count);
  };
  int64_t panels = 0;
  for (int32_t i = 0; i < p.count; ++i) panels += divide_up(p.parts[i].n, gemm.panel_columns);
  multiply_panels(gemm, tiles, a, panels, p.weights, scratch, slots, rows_of, finish);
}

}  // namespace flashu::cpu
