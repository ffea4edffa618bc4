// The left operand of products with int8 weights where the CPU multiplies bytes: rows in fixed point, as
// digits. Sums of digits are whole numbers and exact, so a row's result depends on the row and the weights
// alone, however the work is cut.
#pragma once

#include <cstdint>
#include <vector>

#include "core/matrix.hpp"
#include "cpu/digit_kernels.hpp"
#include "cpu/packed_rows.hpp"
#include "flashu/flashu.h"

namespace flashu::cpu {

// Whether rows of this storage type and `k` values are multiplied with int8 weights by digits. It must not
// depend on the number of rows.
bool uses_digits(int32_t type, int64_t k);

// Up to so many rows are multiplied straight from the weights; with more of them packing pays.
inline constexpr int64_t kDirectRows = 16;

// The windows of a row of weights that hold at least one of the selected columns.
struct SelectedWindows {
  std::vector<int32_t> offsets;  // of these windows, ascending
  std::vector<int32_t> place;    // of every window of a row, among them

  SelectedWindows() = default;
  SelectedWindows(const int32_t* columns, int64_t count, int64_t width);
  int64_t values() const { return static_cast<int64_t>(offsets.size()) * kWindow; }
};

// Rows that become digits, and what they are multiplied with.
struct DigitProblem {
  core::Matrix x;
  int32_t type;  // of x
  int32_t bits;  // how many bits below a row's root mean square its unit lies
  int64_t rows, k;
  bool direct;    // straight from the weights
  int64_t width;  // of a row of weights, from where K begins
  // Direct, and K is a list of columns: rows of weights are read whole, and the other columns meet zeros.
  const int32_t* columns = nullptr;
  const SelectedWindows* windows = nullptr;
};

// Four bits more than numbers of the storage type have.
inline int32_t unit_bits(int32_t type) { return type == FLASHU_BF16 ? 12 : 15; }

class Digits {
 public:
  // Floats of memory that so many rows need. windows: as in a problem.
  static int64_t floats(int64_t rows, int64_t k, bool direct, const SelectedWindows* windows = nullptr);

  Digits(const DigitProblem& problem, int64_t block_k, float* memory);

  const DigitKernels& kernels() const { return kernels_; }
  const DigitProblem& problem() const { return problem_; }
  PackedRows operand() const;

  // Straight from rows of weights, see DigitKernels::dot; all rows, in tiles.
  void dot(float* c, const void* const* rows, const void* const* ahead) const;

  // Sums of digits as multiply and dot leave them -> products c[r * panel_columns + j], in place. Rows that
  // are not finite are multiplied in float, with rows of weights at their first value, or as a list of
  // `columns` finds it.
  void combine(float* c, const void* const* rows, const int32_t* columns) const;

 private:
  DigitPlanes planes(int64_t row) const { return {planes_ + row * kDigits * pitch_, pitch_}; }
  void split(int64_t row);
  void pack() const;

  const DigitKernels& kernels_;
  DigitProblem problem_;
  int64_t block_k_;
  int64_t pitch_;
  float* units_;      // [rows]
  int32_t* offsets_;  // [rows, kDigits]
  int8_t* planes_;    // [rows, kDigits, pitch]
  float* spread_;     // [rows, pitch], if there are windows
  float* packed_;     // if not direct
};

}  // namespace flashu::cpu
