// The packed GEMM's loops: rows packed once, weight panels packed per thread, a callback for what comes out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/divide_up.hpp"
#include "core/for_ops.hpp"
#include "core/matrix.hpp"
#include "core/parallel.hpp"
#include "core/tiles.hpp"
#include "cpu/digits.hpp"
#include "cpu/gemm_kernels.hpp"
#include "cpu/packed_rows.hpp"
#include "flashu/flashu.h"

namespace flashu::cpu {

inline constexpr int64_t kMaxPanelColumns = 64;  // of any instruction set

inline int64_t element_bytes(int32_t type) { return type == FLASHU_F32 ? 4 : 2; }

// Where a row of a matrix of storage type `type` (flashu_dtype) begins.
inline char* row_of(const core::Matrix& matrix, int64_t row, int32_t type) {
  return static_cast<char*>(matrix.data) + row * matrix.stride * element_bytes(type);
}

// The same of a matrix of weights, which may be int8.
inline char* weight_row(const core::Matrix& matrix, int64_t row, int32_t type, bool int8) {
  return static_cast<char*>(matrix.data) + row * matrix.stride * (int8 ? 1 : element_bytes(type));
}

// Slots that hold `k` values of a row.
inline int64_t slots_of(const GemmKernels& kernels, int32_t type, int64_t k) {
  return divide_up(k, kernels.slot_values[type]);
}

// [m, k] x [k, n] in one range of K, on all threads; what the choice of tiles is asked.
inline core::GemmProblem gemm_problem(const GemmKernels& kernels, int32_t type, bool int8, int64_t m,
                                      int64_t n, int64_t k) {
  return {m,
          n,
          k,
          int8 ? 1 : element_bytes(type),
          kernels.slot_values[type],
          core::num_threads(),
          kernels.tile_rows,
          kernels.panel_columns,
          false};
}

// A table of the choices of tiles for [m, k] x [k, n] of a storage type (flashu_dtype) on this CPU. threads:
// 0 for those of the backend.
FLASHU_FOR_OPS std::string explain_gemm(int64_t m, int64_t n, int64_t k, int32_t type, bool gathered,
                                        int64_t threads);

// The same where every row of x is kDigits rows of digits.
inline core::GemmProblem digit_problem(const GemmKernels& kernels, int64_t m, int64_t n, int64_t k) {
  core::GemmProblem problem = gemm_problem(kernels, FLASHU_BF16, true, m * kDigits, n, k);
  problem.slot_values = kDigitValues;
  problem.tile_rows = kDigits * kDigitRows;
  return problem;
}

// Below this many multiplications another thread costs more than it brings (about 10 us of work).
inline constexpr double kWorkPerSlot = 400e3;

// How many tasks share so many multiplications.
inline int64_t slots_for(double multiplications) {
  return std::clamp<int64_t>(static_cast<int64_t>(multiplications / kWorkPerSlot), 1, core::num_threads());
}

// To fetch and pack a weight takes as long as to multiply so many rows with it.
inline constexpr double kRowsPerPack = 8;

// How many tasks share the product of so many rows with so many weights.
inline int64_t slots_for(int64_t rows, double weights) {
  return slots_for((static_cast<double>(rows) + kRowsPerPack) * weights);
}

// Packs x[r * stride + i], i < k, of storage type `type` (flashu_dtype), tiles split over threads.
void pack_rows(const GemmKernels& kernels, const PackedRows& packed, const void* x, int32_t type,
               int64_t stride, int64_t k);

// Floats of scratch that one thread needs in multiply_panels.
inline int64_t panel_scratch_floats(const GemmKernels& kernels, const core::GemmTiles& tiles) {
  const int64_t chunk = divide_up(tiles.chunk_m, kernels.tile_rows) * kernels.tile_rows;
  const int64_t panel = align_floats(tiles.block_k * kernels.panel_columns);
  return tiles.panels * (panel + align_floats(chunk * kernels.panel_columns));
}

// The right operand: panels of panel_columns rows of weights, each row of which holds its K values.
struct Weights {
  int32_t type;            // flashu_dtype of x
  bool int8;               // else of that type
  int64_t width;           // elements of a row, to stay inside it
  int64_t k;               // of the product
  int64_t first;           // K is [first, first + k) of a row
  const int32_t* columns;  // or these of its columns, where given

  int64_t bytes() const { return int8 ? 1 : element_bytes(type); }     // of an element
  int32_t kind() const { return int8 ? kStorageTypes + type : type; }  // see kWeightKinds
};

// The rows of one panel of weights, moved to where a product's K begins.
struct PanelRows {
  const void* row[kMaxPanelColumns];

  // The same rows so many bytes further.
  PanelRows from(const GemmKernels& kernels, int64_t bytes) const {
    PanelRows moved;
    for (int64_t j = 0; j < kernels.panel_columns; ++j)
      moved.row[j] = static_cast<const char*>(row[j]) + bytes;
    return moved;
  }
};

// For panels in [0, num_panels): multiplies the packed rows with each panel and calls
//   finish(panel, c): c[r * panel_columns + j] for r < rows, in tiles of tile_rows rows one after another;
// of digits: for rows of their problem.
// rows_of(panel, rows) names the panel's rows of weights. `slots` tasks run at once, each with its own
// scratch of panel_scratch_floats(). Every panel belongs to one task, so the split does not change results.
template <class RowsOf, class Finish>
void multiply_panels(const GemmKernels& kernels, const core::GemmTiles& tiles, const PackedRows& a,
                     int64_t num_panels, const Weights& weights, float* scratch, int64_t slots,
                     const RowsOf& rows_of, const Finish& finish) {
  const int64_t columns = kernels.panel_columns;
  const int64_t panel_floats = align_floats(tiles.block_k * columns);
  const int64_t product_floats = align_floats(a.tiles() * a.tile_rows * columns);
  const int64_t block_tiles = divide_up(tiles.block_m, a.tile_rows);
  const Digits* const digits = a.digits;
  const bool direct =
      digits != nullptr ? digits->direct() : a.rows == 1 && weights.columns == nullptr && weights.k > 0;

  const auto panel_rows = [&](int64_t panel) {
    PanelRows rows;
    rows_of(panel, rows.row);
    return weights.columns != nullptr ? rows : rows.from(kernels, weights.first * weights.bytes());
  };
  // One row, or a few of digits: the weights pass once from memory through registers.
  const auto multiply_direct = [&](int64_t panel, int64_t end, float* product) {
    const PanelRows rows = panel_rows(panel);
    const PanelRows next = panel_rows(std::min(panel + 1, end - 1));
    const void* const* const ahead = panel + 1 < end ? next.row : nullptr;
    if (digits != nullptr) return digits->dot(product, rows.row, ahead);
    kernels.multiply_row[weights.kind()](product, a.data, rows.row, ahead, weights.k);
  };
  // Packs `count` slots from slot `s` on, while the following ones of the same rows are fetched, or the first
  // of the next panel.
  const auto pack = [&](int64_t panel, int64_t s, int64_t count, int64_t end, float* out) {
    const PanelRows rows = panel_rows(panel);
    const bool more = panel + tiles.panels < end;
    const PanelRows next = panel_rows(more ? panel + tiles.panels : panel);
    if (digits != nullptr) return digits->pack_panel(out, rows.row, more ? next.row : nullptr, s, count);
    const int64_t values = kernels.slot_values[weights.type];
    const int64_t begin = s * values;
    const int64_t k = std::min(count * values, weights.k - begin);
    if (weights.columns != nullptr) {
      const int32_t* const columns = weights.columns + begin;
      return kernels.pack_columns[weights.kind()](out, rows.row, columns, k, weights.width);
    }
    const PanelRows here = rows.from(kernels, begin * weights.bytes());
    const bool ends = begin + k == weights.k;
    const PanelRows ahead = ends ? next : here.from(kernels, k * weights.bytes());
    kernels.pack_panel[weights.kind()](out, here.row, more || !ends ? ahead.row : nullptr, k);
  };
  const auto multiply = digits != nullptr ? digits->multiply() : kernels.multiply[weights.type];
  const auto multiply_block = [&](int64_t panel, int64_t block, int64_t end, float* panels, float* products) {
    if (a.slots == 0) std::fill_n(products, block * product_floats, 0.0f);
    for (int64_t s = 0; s < a.slots; s += tiles.block_k) {
      const int64_t count = std::min(tiles.block_k, a.slots - s);
      for (int64_t p = 0; p < block; ++p) pack(panel + p, s, count, end, panels + p * panel_floats);
      for (int64_t t = 0; t < a.tiles(); t += block_tiles) {
        const int64_t last_tile = std::min(a.tiles(), t + block_tiles);
        for (int64_t p = 0; p < block; ++p) {
          for (int64_t tile = t; tile < last_tile; ++tile) {
            multiply(products + p * product_floats + tile * a.tile_rows * columns, a.at(tile, s),
                     panels + p * panel_floats, count, static_cast<int32_t>(a.rows_in(tile)), s == 0);
          }
        }
      }
    }
  };
  core::parallel_for(0, slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      float* panels = scratch + slot * panel_scratch_floats(kernels, tiles);
      float* products = panels + tiles.panels * panel_floats;
      const int64_t end = num_panels * (slot + 1) / slots;
      for (int64_t panel = num_panels * slot / slots; panel < end; panel += tiles.panels) {
        const int64_t block = std::min(tiles.panels, end - panel);
        if (direct) {
          for (int64_t p = 0; p < block; ++p) multiply_direct(panel + p, end, products + p * product_floats);
        } else {
          multiply_block(panel, block, end, panels, products);
        }
        for (int64_t p = 0; p < block; ++p) {
          float* const c = products + p * product_floats;
          if (digits != nullptr) digits->combine(c, panel_rows(panel + p).row);
          finish(panel + p, c);
        }
      }
    }
  });
}

}  // namespace flashu::cpu
