// The gathered FFN on the CPU: rows in chunks, the up half into h, h into the down half.
#include "cpu/ffn.hpp"

#include <algorithm>

#include "core/checks.hpp"
#include "core/parallel.hpp"
#include "core/tiles.hpp"
#include "cpu/epilogue_kernels.hpp"
#include "cpu/ffn_kernels.hpp"
#include "cpu/gemm.hpp"
#include "cpu/projection.hpp"
#include "cpu/selection.hpp"

namespace flashu::cpu {
namespace {

using core::FfnProblem;

// Scratch of one call, carved out of the caller's workspace.
struct Buffers {
  float* x;
  float* h;
  float* slots;
};

// Rows [first_row, first_row + a.rows) of the up half: panels of kWidth gate and kWidth up columns.
void up_half(const FfnProblem& p, const FfnPlan& s, const PackedRows& a, int64_t first_row,
             const PackedRows* packed_h, const Buffers& buffers) {
  const Selection& selected = s.selected;
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const FfnKernels& ffn = FLASHU_PICK_ISA(ffn_kernels);
  const EpilogueKernels& epilogue = FLASHU_PICK_ISA(epilogue_kernels);
  const int64_t width = gemm.panel_columns / 2;

  const auto rows_of = [&](int64_t panel, const void** rows) {
    for (int64_t j = 0; j < width; ++j) {
      // Columns past the last neuron repeat it; what they give is not stored.
      const int64_t neuron = selected[std::min(panel * width + j, selected.count - 1)];
      rows[j] = weight_row(p.w_gate, neuron, p.type, p.int8);
      rows[width + j] = weight_row(p.w_up, neuron, p.type, p.int8);
    }
  };
  // Before the activation: scales of int8 weights, and what is added to a product.
  const auto complete = [&](int64_t first, int64_t count, float* c) {
    if (p.int8) {
      float scales[kMaxPanelColumns] = {};
      for (int64_t j = 0; j < count; ++j) {
        scales[j] = p.gate_scale[selected[first + j]];
        scales[width + j] = p.up_scale[selected[first + j]];
      }
      epilogue.scale(c, scales, a.rows);
    }
    const auto add = [&](const core::Matrix& added, float* to) {
      if (added.data == nullptr) return;
      const char* const from = row_of(added, first_row, p.type) + first * element_bytes(p.type);
      ffn.add[p.type](to, from, added.stride, a.rows, count);
    };
    add(p.gate_add, c);
    add(p.up_add, c + width);
  };
  const auto finish = [&](int64_t panel, float* c) {
    const int64_t first = panel * width;
    const int64_t count = std::min(width, selected.count - first);
    complete(first, count, c);
    ffn.swiglu(c, a.rows);
    if (core::present(p.norms)) {
      double sums[32] = {};
      ffn.add_squares(sums, c, a.rows, count);
      for (int64_t j = 0; j < count; ++j) {
        if (p.norms.dtype == FLASHU_F64) {
          static_cast<double*>(p.norms.data)[first + j] += sums[j];
        } else {
          float& total = static_cast<float*>(p.norms.data)[first + j];
          total = static_cast<float>(total + sums[j]);
        }
      }
    }
    if (packed_h == nullptr) {
      epilogue.store_rows[p.type](row_of(p.h, first_row, p.type) + first * element_bytes(p.type), p.h.stride,
                                  nullptr, 0, c, a.rows, count);
      return;
    }
    const int64_t slot = first / gemm.slot_values[p.type];  // whole: a panel has an even number of neurons
    const int64_t begin = slot / packed_h->block_k * packed_h->block_k;
    for (int64_t tile = 0; tile < a.tiles(); ++tile) {
      ffn.pack_tile[p.type](packed_h->at(tile, begin) + (slot - begin) * a.tile_rows,
                            c + tile * a.tile_rows * gemm.panel_columns, a.rows_in(tile), count);
    }
  };
  multiply_panels(gemm, s.up, a, divide_up(selected.count, width),
                  {p.type, p.int8, p.hidden, p.hidden, 0, nullptr}, buffers.slots, s.slots, rows_of, finish);
}

// Rows [first_row, first_row + a.rows) of the down half, from packed h.
void down_half(const FfnProblem& p, const FfnPlan& s, const PackedRows& a, int64_t first_row,
               const Buffers& buffers) {
  const Selection& selected = s.selected;
  const Weights weights{p.type, p.int8, p.intermediate, selected.count, selected.first, selected.list()};
  const core::LinearPart part{p.w_down, p.width, p.down_scale, nullptr, p.residual, p.out};
  project({&part, 1, weights, FLASHU_EPILOGUE_NONE}, s.down, a, first_row, buffers.slots, s.slots);
}

}  // namespace

FfnPlan plan_ffn(const FfnProblem& p) {
  FfnPlan s;
  s.selected = resolve(p);
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const core::GemmProblem up = gemm_problem(gemm, p.type, p.int8, p.rows, 2 * p.neurons, p.hidden);
  core::GemmProblem down = up;
  down.n = p.width;
  down.k = p.neurons;
  down.gathered = s.selected.list() != nullptr;
  s.up = core::choose_gemm_tiles(up);
  s.down = core::choose_gemm_tiles(down);
  const int64_t chunk = std::min(p.rows, s.up.chunk_m);  // both halves chunk alike: it depends on rows only
  if (p.has_up) s.x_floats = PackedRows::floats(chunk, slots_of(gemm, p.type, p.hidden), gemm.tile_rows);
  if (p.has_down) s.h_floats = PackedRows::floats(chunk, slots_of(gemm, p.type, p.neurons), gemm.tile_rows);
  if (p.has_up) s.slot_floats = panel_scratch_floats(gemm, s.up);
  if (p.has_down) s.slot_floats = std::max(s.slot_floats, panel_scratch_floats(gemm, s.down));
  const double weights = static_cast<double>(p.neurons) *
                         static_cast<double>((p.has_up ? 2 * p.hidden : 0) + (p.has_down ? p.width : 0));
  s.slots = slots_for(p.rows, weights);
  return s;
}

void ffn(const FfnProblem& p, const FfnPlan& s, void* workspace) {
  float* floats = static_cast<float*>(workspace);
  const Buffers buffers{floats, floats + s.x_floats, floats + s.x_floats + s.h_floats};
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  for (int64_t row = 0; row < p.rows; row += s.up.chunk_m) {
    const int64_t rows = std::min(s.up.chunk_m, p.rows - row);
    const PackedRows h{buffers.h, rows, slots_of(gemm, p.type, p.neurons), gemm.tile_rows, s.down.block_k};
    if (p.has_up) {
      const PackedRows x{buffers.x, rows, slots_of(gemm, p.type, p.hidden), gemm.tile_rows, s.up.block_k};
      pack_rows(gemm, x, row_of(p.x, row, p.type), p.type, p.x.stride, p.hidden);
      up_half(p, s, x, row, p.has_down ? &h : nullptr, buffers);
    } else {
      pack_rows(gemm, h, row_of(p.h, row, p.type), p.type, p.h.stride, p.neurons);
    }
    if (p.has_down) down_half(p, s, h, row, buffers);
  }
}

}  // namespace flashu::cpu
