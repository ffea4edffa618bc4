// Kernels of products of int8 weights with activations in fixed point: whole numbers of 24 bits in three
// digits to the base 256, of which the CPU adds 64 products with weights at a time (AVX512-VNNI). One table
// per CPU instruction set.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "cpu/gemm_kernels.hpp"

namespace flashu::cpu {

inline constexpr int kDigits = 3;
inline constexpr int kDigitRows = 4;           // rows of a register tile: 12 rows of digits
inline constexpr int kDigitValues = 4;         // k in a 32-bit slot
inline constexpr int64_t kWindow = 64;         // weights of one vector
inline constexpr float kDigitLimit = 0x1p22f;  // of a count of units: three digits hold it
// Sums of so many products of digits and weights, each at most 2^14, are below 2^31.
inline constexpr int64_t kMaxDigitK = (int64_t{1} << 17) - 1;

// The digits of some rows, [row][digit][pitch], the lowest digit first, zero from k to pitch.
struct DigitPlanes {
  const int8_t* data;
  int64_t pitch;  // bytes, whole windows
};

// Parts of a row of weights that are read one after another: kWindow bytes from each offset on, but none from
// byte `width` of the row on.
struct Windows {
  const int32_t* offsets;
  int64_t count;
  int64_t width;
};

// What will be read next and is fetched meanwhile: rows (or null), and parts of them.
struct Ahead {
  const void* const* rows;
  Windows windows;
};

struct DigitKernels {
  bool present;  // the CPU has the instructions

  // x[k], k < count -> the exponent of the power of two in which the row is counted: 2^bits of it are at most
  // the row's root mean square, or that of the row without a few outliers: weights may be small or zero where
  // those lie. What is not finite does not count; 0 for a row of zeros.
  float (*unit[kStorageTypes])(const void* x, int64_t count, int32_t bits);

  // x[k] / 2^unit rounded, k < count -> a row's planes. corrections[digit]: what 128 times its digits come
  // to, which weights + 128 add to the sums. Returns whether they hold all numbers: those that are not below
  // kDigitLimit units, or NaN, are zero.
  bool (*split[kStorageTypes])(int8_t* planes, int64_t pitch, int32_t* corrections, const void* x,
                               int64_t count, float unit);

  // planes of rows <= kDigitRows -> tile order, out[s * 12 + digit * kDigitRows + r], s < slots.
  void (*pack_rows)(float* out, const DigitPlanes& planes, int64_t first_slot, int64_t slots, int64_t rows);

  // Weights + 128 of a panel's rows, out[s * panel_columns + c], a whole window after another.
  void (*pack_panel)(float* out, const void* const* source, const Windows& windows, const Ahead& ahead);

  // The same of listed columns of rows of `width` bytes. Behind the last one, up to a whole window, lies what
  // zeros are multiplied with.
  void (*pack_columns)(float* out, const void* const* source, const int32_t* columns, int64_t count,
                       int64_t width);

  // c[(digit * n + r) * panel_columns + j] (+)= sum over slots of a and (weights + 128), in int32 modulo
  // 2^32, for n = rows / kDigits. Digits that are zero for a while cost nothing if they are the highest.
  void (*multiply)(float* c, const float* a, const float* b, int64_t slots, int32_t rows, bool first);

  // The same for rows <= kDigitRows of x straight from the weights, nothing packed. next: rows of the next
  // call, or null.
  void (*dot)(float* c, const DigitPlanes& planes, const void* const* source, const void* const* next,
              const Windows& windows, int32_t rows);

  // Sums of digits as multiply leaves them -> out[r * panel_columns + j], the products in float. out may be
  // c, or lie before it.
  void (*combine)(float* out, const float* c, const int32_t* corrections, const float* units, int32_t rows);
};
FLASHU_DECLARE_ISA(DigitKernels, digit_kernels)

}  // namespace flashu::cpu
