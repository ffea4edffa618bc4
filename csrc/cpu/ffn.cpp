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

// Where the up half's products go: into h in the storage type, packed, or into h in float.
struct Products {
  core::Matrix stored;
  int32_t type;
  const PackedRows* packed;
};

// Rows [first_row, first_row + rows) of the up half: panels of kWidth gate and kWidth up columns.
void up_half(const FfnProblem& p, const FfnPlan& s, const PackedRows& a, int64_t first_row, int64_t rows,
             const Products& products, const Buffers& buffers) {
  const Selection& selected = s.selected;
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const FfnKernels& ffn = FLASHU_PICK_ISA(ffn_kernels);
  const EpilogueKernels& epilogue = FLASHU_PICK_ISA(epilogue_kernels);
  const int64_t width = gemm.panel_columns / 2;

  const auto rows_of = [&](int64_t panel, const void** weights) {
    for (int64_t j = 0; j < width; ++j) {
      // Columns past the last neuron repeat it; what they give is not stored.
      const int64_t neuron = selected[std::min(panel * width + j, selected.count - 1)];
      weights[j] = weight_row(p.w_gate, neuron, p.type, p.int8);
      weights[width + j] = weight_row(p.w_up, neuron, p.type, p.int8);
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
      epilogue.scale(c, scales, rows);
    }
    const auto add = [&](const core::Matrix& added, float* to) {
      if (added.data == nullptr) return;
      const char* const from = row_of(added, first_row, p.type) + first * element_bytes(p.type);
      ffn.add[p.type](to, from, added.stride, rows, count);
    };
    add(p.gate_add, c);
    add(p.up_add, c + width);
  };
  const auto finish = [&](int64_t panel, float* c) {
    const int64_t first = panel * width;
    const int64_t count = std::min(width, selected.count - first);
    complete(first, count, c);
    ffn.swiglu(c, rows);
    if (core::present(p.norms)) {
      double sums[32] = {};
      ffn.add_squares(sums, c, rows, count);
      for (int64_t j = 0; j < count; ++j) {
        if (p.norms.dtype == FLASHU_F64) {
          static_cast<double*>(p.norms.data)[first + j] += sums[j];
        } else {
          float& total = static_cast<float*>(p.norms.data)[first + j];
          total = static_cast<float>(total + sums[j]);
        }
      }
    }
    const PackedRows* const packed_h = products.packed;
    if (packed_h == nullptr) {
      char* const to = static_cast<char*>(products.stored.data) + first * element_bytes(products.type);
      epilogue.store_rows[products.type](to, products.stored.stride, nullptr, 0, c, rows, count);
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

// Rows [first_row, first_row + rows) of the down half, from packed h.
void down_half(const FfnProblem& p, const FfnPlan& s, const PackedRows& a, int64_t first_row, int64_t rows,
               const Buffers& buffers) {
  const Selection& selected = s.selected;
  const Weights weights{p.type, p.int8, p.intermediate, selected.count, selected.first, selected.list()};
  const core::LinearPart part{p.w_down, p.width, p.down_scale, nullptr, p.residual, p.out};
  project({&part, 1, weights, FLASHU_EPILOGUE_NONE}, s.down, a, first_row, rows, buffers.slots, s.slots);
}

// A chunk of rows, in float or bf16.
void packed_rows(const FfnProblem& p, const FfnPlan& s, int64_t row, int64_t rows, const Buffers& buffers) {
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const PackedRows h{buffers.h, rows, slots_of(gemm, p.type, p.neurons), gemm.tile_rows, s.down.block_k};
  if (p.has_up) {
    const PackedRows x{buffers.x, rows, slots_of(gemm, p.type, p.hidden), gemm.tile_rows, s.up.block_k};
    pack_rows(gemm, x, row_of(p.x, row, p.type), p.type, p.x.stride, p.hidden);
    const Products to{{row_of(p.h, row, p.type), p.h.stride}, p.type, p.has_down ? &h : nullptr};
    up_half(p, s, x, row, rows, to, buffers);
  } else {
    pack_rows(gemm, h, row_of(p.h, row, p.type), p.type, p.h.stride, p.neurons);
  }
  if (p.has_down) down_half(p, s, h, row, rows, buffers);
}

// A chunk of rows of a whole FFN, as digits. h is not rounded to the storage type between the halves.
void digit_rows(const FfnProblem& p, const FfnPlan& s, int64_t row, int64_t rows, const Buffers& buffers) {
  const int32_t bits = unit_bits(p.type);
  const core::Matrix between{buffers.h, p.neurons};
  {
    const core::Matrix from{row_of(p.x, row, p.type), p.x.stride};
    const Digits x({from, p.type, bits, rows, p.hidden, p.hidden}, s.up.block_k, buffers.x);
    up_half(p, s, x.operand(), row, rows, {between, FLASHU_F32, nullptr}, buffers);
  }
  DigitProblem down{between, FLASHU_F32, bits, rows, p.neurons, p.neurons};
  if (s.selected.list() != nullptr) down.width = p.intermediate, down.columns = s.selected.list();
  if (s.windowed()) down.windows = &s.windows;
  const Digits h(down, s.down.block_k, buffers.h + align_floats(rows * p.neurons));
  down_half(p, s, h.operand(), row, rows, buffers);
}

}  // namespace

FfnPlan plan_ffn(const FfnProblem& p) {
  FfnPlan s;
  s.selected = resolve(p);
  s.digits = p.int8 && p.has_up && p.has_down && uses_digits(p.type, std::max(p.hidden, p.neurons));
  const GemmKernels& gemm = FLASHU_PICK_ISA(gemm_kernels);
  const core::GemmProblem up = s.digits ? digit_problem(gemm, p.rows, 2 * p.neurons, p.hidden)
                                        : gemm_problem(gemm, p.type, p.int8, p.rows, 2 * p.neurons, p.hidden);
  core::GemmProblem down = up;
  down.n = p.width;
  down.k = p.neurons;
  down.gathered = s.selected.list() != nullptr;
  s.up = core::choose_gemm_tiles(up);
  s.down = core::choose_gemm_tiles(down);
  // Both halves chunk alike: it depends on rows only.
  s.chunk = s.digits ? s.up.chunk_m / kDigits : s.up.chunk_m;
  const int64_t chunk = std::min(p.rows, s.chunk);
  if (s.digits) {
    if (down.gathered) {
      SelectedWindows windows(s.selected.list(), s.selected.count, p.intermediate);
      if (take_windows(p.rows, s.selected.count, windows)) s.windows = std::move(windows);
    }
    s.x_floats = Digits::floats(chunk, p.hidden);
    s.h_floats = align_floats(chunk * p.neurons) +
                 Digits::floats(chunk, p.neurons, s.windowed() ? &s.windows : nullptr);
  } else {
    if (p.has_up) s.x_floats = PackedRows::floats(chunk, slots_of(gemm, p.type, p.hidden), gemm.tile_rows);
    if (p.has_down) s.h_floats = PackedRows::floats(chunk, slots_of(gemm, p.type, p.neurons), gemm.tile_rows);
  }
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
  for (int64_t row = 0; row < p.rows; row += s.chunk) {
    const int64_t rows = std::min(s.chunk, p.rows - row);
    if (s.digits) {
      digit_rows(p, s, row, rows, buffers);
    } else {
      packed_rows(p, s, row, rows, buffers);
    }
  }
}

}  // namespace flashu::cpu
