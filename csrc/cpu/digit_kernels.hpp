// Kernels of products of int8 weights with activations in fixed point: whole numbers of 24 bits in three
// digits to the base 256, of which the CPU adds 64 products with weights at a time (AVX512-VNNI). One table
// per CPU instruction set.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "cpu/gemm_kernels.hpp"

namespace flashu::cpu {

inline constexpr int kDigits = 3;
inline constexpr int kDigitRows = 4;    // rows of a register tile: 12 rows of digits
inline constexpr int kDigitValues = 4;  // k in a 32-bit slot
inline constexpr int64_t kWindow = 64;  // weights of one vector
// Sums of so many products of digits and weights, each at most 2^14, are below 2^31.
inline constexpr int64_t kMaxDigitK = (int64_t{1} << 17) - 1;

// The digits of some rows, [row][digit][pitch], the lowest digit first, zero from k to pitch.
struct DigitPlanes {
  const int8_t* data;
  int64_t pitch;  // bytes, whole windows
};

// Where along the rows of weights digits lie: window i at byte i * kWindow, or at offsets[i]. Nothing is read
// from byte `width` of a row on.
struct Windows {
  const int32_t* offsets;
  int64_t count;
  int64_t width;
};

// What a pass over a panel of weights fetches: its share of the next panel's rows (null where there is none).
// A single pass fetches its own next rows too.
struct Ahead {
  const void* const* rows;
  int64_t pass, passes;
};

struct DigitKernels {
  bool present;  // the CPU has the instructions

  // x[k], k < count -> the exponent of the unit that the row is counted in; 0 for a row of zeros, NaN for one
  // that is not finite.
  float (*unit[kStorageTypes])(const void* x, int64_t count, int32_t bits);

  // x[k] / 2^unit rounded, k < count -> one row of planes, and what its weights' offset of 128 adds to the
  // sums.
  void (*split[kStorageTypes])(int8_t* planes, int64_t pitch, int32_t* offsets, const void* x, int64_t count,
                               float unit);

  // planes of rows <= kDigitRows -> tile order, out[s * 12 + digit * kDigitRows + r], s < slots.
  void (*pack_rows)(float* out, const DigitPlanes& planes, int64_t first_slot, int64_t slots, int64_t rows);

  // As GemmKernels has them, of weights + 128.
  void (*pack_panel)(float* out, const void* const* source, const void* const* ahead, int64_t count);
  void (*pack_columns)(float* out, const void* const* source, const int32_t* columns, int64_t count,
                       int64_t width);

  // c[(digit * n + r) * panel_columns + j] (+)= sum over slots of a and (weights + 128), in int32 modulo
  // 2^32, for n = rows / kDigits. Digits that are zero for a while cost nothing if they are the highest.
  void (*multiply)(float* c, const float* a, const float* b, int64_t slots, int32_t rows, bool first);

  // The same for rows / kDigits rows of x straight from the weights, nothing packed.
  void (*dot)(float* c, const DigitPlanes& planes, const void* const* source, const Ahead& ahead,
              const Windows& windows, int32_t rows);

  // Sums of digits as multiply leaves them -> out[r * panel_columns + j], the products in float. out may be
  // c, or lie before it.
  void (*combine)(float* out, const float* c, const int32_t* offsets, const float* units, int32_t rows);
};
FLASHU_DECLARE_ISA(DigitKernels, digit_kernels)

}  // namespace flashu::cpu
