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

// Three bits more than numbers of the storage type have. Rounding to the unit is then far less than rounding
// a result to the type: its rms is at most 2^-12.8 (2^-15.8) of the row's. See DigitKernels::unit.
inline int32_t unit_bits(int32_t type) { return type == FLASHU_BF16 ? 11 : 14; }

// The windows of a row of weights that hold at least one of the selected columns.
struct SelectedWindows {
  std::vector<int32_t> offsets;  // of these windows, ascending
  std::vector<int32_t> place;    // of every window of a row, among them

  SelectedWindows() = default;
  SelectedWindows(const int32_t* columns, int64_t count, int64_t width);
  int64_t values() const { return static_cast<int64_t>(offsets.size()) * kWindow; }
};

// Whether `rows` rows meet whole windows of a list's columns, and zeros for the columns between, rather than
// the listed ones brought together, which costs about what 25 rows cost. Both give the same sums.
inline bool take_windows(int64_t rows, int64_t columns, const SelectedWindows& windows) {
  return rows * (windows.values() - columns) <= 25 * columns;
}

// Rows that become digits, and which weights they meet.
struct DigitProblem {
  core::Matrix x;
  int32_t type;  // of x
  int32_t bits;  // how many bits below a row's root mean square its unit lies: see DigitKernels::unit
  int64_t rows, k;
  int64_t width;                             // of a row of weights, from where K begins
  const int32_t* columns = nullptr;          // K is these of a row's columns
  const SelectedWindows* windows = nullptr;  // of columns, if they are not brought together
};

class Digits {
 public:
  // Floats of memory that so many rows need, or fewer. windows: as in a problem.
  static int64_t floats(int64_t rows, int64_t k, const SelectedWindows* windows = nullptr);

  Digits(const DigitProblem& problem, int64_t block_k, float* memory);
  Digits(const Digits&) = delete;  // operands point to it
  Digits& operator=(const Digits&) = delete;

  // Rows of the problem, each as kDigits rows, in tiles.
  PackedRows operand() const;
  // One tile of rows is multiplied straight from the weights, several from packed panels.
  bool direct() const { return problem_.rows <= kDigitRows && !picked(); }
  auto multiply() const { return kernels_.multiply; }

  // Packs rows of weights for slots [slot, slot + slots); next: rows of the next panel, or null.
  void pack_panel(float* out, const void* const* rows, const void* const* next, int64_t slot,
                  int64_t slots) const;

  // The products of a tile of rows with rows of weights as `multiply` leaves them.
  void dot(float* c, const void* const* rows, const void* const* next) const;

  // Sums of digits as multiply and dot leave them -> products c[r * panel_columns + j], in place. Numbers of
  // x that digits do not hold are multiplied in float and added.
  void combine(float* c, const void* const* rows) const;

 private:
  bool picked() const { return problem_.columns != nullptr && problem_.windows == nullptr; }
  DigitPlanes planes(int64_t row) const { return {planes_ + row * kDigits * pitch_, pitch_}; }
  Windows windows(int64_t first, int64_t count) const { return {offsets_ + first, count, problem_.width}; }
  void split(int64_t row);
  void pack_rows() const;

  const DigitKernels& kernels_;
  DigitProblem problem_;
  int64_t block_k_;
  int64_t pitch_;              // digits of a row, whole windows
  std::vector<uint8_t> held_;  // of every row, whether digits hold all its numbers
  std::vector<int32_t> all_;   // windows of a range of columns
  const int32_t* offsets_;     // of windows
  float* units_;               // [rows]
  int32_t* corrections_;       // [rows, kDigits]
  int8_t* planes_;             // [rows, kDigits, pitch]
  float* spread_;              // [rows, pitch], if there are windows of a list
  float* packed_;              // if not direct
};

}  // namespace flashu::cpu
