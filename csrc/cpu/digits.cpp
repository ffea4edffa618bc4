// Rows as digits: fixed point, order of tiles, and numbers that digits do not hold.
#include "cpu/digits.hpp"

#include <cmath>

#include "core/parallel.hpp"
#include "core/typed.hpp"
#include "cpu/gemm.hpp"

namespace flashu::cpu {
namespace {

constexpr int64_t kTileRows = kDigits * kDigitRows;
constexpr int64_t kWindowSlots = kWindow / kDigitValues;

int64_t pitch_of(int64_t k, const SelectedWindows* windows) {
  return windows == nullptr ? divide_up(k, kWindow) * kWindow : windows->values();
}

}  // namespace

bool uses_digits(int32_t type, int64_t k) {
  return type != FLASHU_F32 && k <= kMaxDigitK && FLASHU_PICK_ISA(digit_kernels).present;
}

SelectedWindows::SelectedWindows(const int32_t* columns, int64_t count, int64_t width)
    : place(static_cast<size_t>(divide_up(width, kWindow)), -1) {
  for (int64_t i = 0; i < count; ++i) place[static_cast<size_t>(columns[i] / kWindow)] = 0;
  for (size_t window = 0; window < place.size(); ++window) {
    if (place[window] < 0) continue;
    place[window] = static_cast<int32_t>(offsets.size());
    offsets.push_back(static_cast<int32_t>(static_cast<int64_t>(window) * kWindow));
  }
}

int64_t Digits::floats(int64_t rows, int64_t k, const SelectedWindows* windows) {
  const int64_t pitch = pitch_of(k, windows);
  return align_floats(rows) + align_floats(rows * kDigits) + rows * kDigits * pitch / 4 +
         (windows == nullptr ? 0 : rows * pitch) +
         PackedRows::floats(rows * kDigits, pitch / kDigitValues, kTileRows);
}

Digits::Digits(const DigitProblem& problem, int64_t block_k, float* memory)
    : kernels_(FLASHU_PICK_ISA(digit_kernels)),
      problem_(problem),
      block_k_(block_k),
      pitch_(pitch_of(problem.k, problem.windows)),
      held_(static_cast<size_t>(problem.rows)),
      units_(memory),
      corrections_(reinterpret_cast<int32_t*>(units_ + align_floats(problem.rows))),
      planes_(reinterpret_cast<int8_t*>(corrections_ + align_floats(problem.rows * kDigits))),
      spread_(reinterpret_cast<float*>(planes_ + problem.rows * kDigits * pitch_)),
      packed_(spread_ + (problem.windows == nullptr ? 0 : problem.rows * pitch_)) {
  for (int64_t at = 0; problem.columns == nullptr && at < problem.k; at += kWindow)
    all_.push_back(static_cast<int32_t>(at));
  offsets_ = problem.windows != nullptr ? problem.windows->offsets.data() : all_.data();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(problem.k, 1));
  core::parallel_for(0, problem.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) split(row);
  });
  if (!direct()) pack_rows();
}

void Digits::split(int64_t row) {
  const void* from = row_of(problem_.x, row, problem_.type);
  int32_t type = problem_.type;
  int64_t count = problem_.k;
  // Of the row as it is: zeros between its values would change the order of a sum.
  const float unit = units_[row] = kernels_.unit[type](from, count, problem_.bits);
  if (problem_.windows != nullptr) {
    float* const spread = spread_ + row * pitch_;
    std::fill_n(spread, pitch_, 0.0f);
    core::with_type(type, [&](auto tag) {
      const auto* const values = static_cast<const decltype(tag)*>(from);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t column = problem_.columns[i];
        const int64_t window = problem_.windows->place[static_cast<size_t>(column / kWindow)];
        spread[window * kWindow + column % kWindow] = to_float(values[i]);
      }
    });
    from = spread, type = FLASHU_F32, count = pitch_;
  }
  held_[static_cast<size_t>(row)] = kernels_.split[type](planes_ + row * kDigits * pitch_, pitch_,
                                                         corrections_ + row * kDigits, from, count, unit);
}

PackedRows Digits::operand() const {
  return {packed_, problem_.rows * kDigits, pitch_ / kDigitValues, kTileRows, block_k_, this};
}

void Digits::pack_rows() const {
  const PackedRows to = operand();
  core::parallel_for(0, to.tiles(), 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      for (int64_t slot = 0; slot < to.slots; slot += block_k_)
        kernels_.pack_rows(to.at(tile, slot), planes(tile * kDigitRows), slot,
                           std::min(block_k_, to.slots - slot), to.rows_in(tile) / kDigits);
    }
  });
}

void Digits::pack_panel(float* out, const void* const* rows, const void* const* next, int64_t slot,
                        int64_t slots) const {
  if (picked()) {
    const int64_t begin = slot * kDigitValues;
    const int64_t count = std::min(slots * kDigitValues, problem_.k - begin);
    return kernels_.pack_columns(out, rows, problem_.columns + begin, count, problem_.width);
  }
  const int64_t first = slot / kWindowSlots, count = slots / kWindowSlots;
  const int64_t left = pitch_ / kWindow - first - count;
  const bool ends = left == 0;
  const Ahead ahead{ends ? next : rows,
                    windows(ends ? 0 : first + count, ends ? count : std::min(count, left))};
  kernels_.pack_panel(out, rows, windows(first, count), ahead);
}

void Digits::dot(float* c, const void* const* rows, const void* const* next) const {
  kernels_.dot(c, planes(0), rows, next, windows(0, pitch_ / kWindow), static_cast<int32_t>(problem_.rows));
}

void Digits::combine(float* c, const void* const* rows) const {
  const int64_t panel_columns = FLASHU_PICK_ISA(gemm_kernels).panel_columns;
  for (int64_t row = 0; row < problem_.rows; row += kDigitRows) {
    const auto count = static_cast<int32_t>(std::min<int64_t>(kDigitRows, problem_.rows - row));
    kernels_.combine(c + row * panel_columns, c + row * kDigits * panel_columns, corrections_ + row * kDigits,
                     units_ + row, count);
  }
  for (int64_t row = 0; row < problem_.rows; ++row) {
    if (held_[static_cast<size_t>(row)] != 0) continue;
    // In double, which holds this power of two whatever the unit is.
    const double limit = std::ldexp(double{kDigitLimit}, static_cast<int>(units_[row]));
    core::with_type(problem_.type, [&](auto tag) {
      const auto* const x = reinterpret_cast<const decltype(tag)*>(row_of(problem_.x, row, problem_.type));
      for (int64_t k = 0; k < problem_.k; ++k) {
        const float value = to_float(x[k]);
        if (std::fabs(double{value}) < limit) continue;  // NaN is not
        const int64_t column = problem_.columns == nullptr ? k : problem_.columns[k];
        for (int64_t j = 0; j < panel_columns; ++j)
          c[row * panel_columns + j] += value * to_float(static_cast<const int8_t*>(rows[j])[column]);
      }
    });
  }
}

}  // namespace flashu::cpu
