// Conversions to and from 16-bit floats.
#include "ptx/numbers.hpp"

namespace ptx {

float half_to_float(u16 h) { return static_cast<float>(std::bit_cast<_Float16>(h)); }

// To nearest even, or toward zero; NaN is 0x7fff.
u16 float_to_half(float f, Rounding rounding) {
  if (std::isnan(f)) return 0x7fff;
  const auto nearest = static_cast<_Float16>(f);
  const auto h = std::bit_cast<u16>(nearest);
  const bool beyond = std::fabs(static_cast<float>(nearest)) > std::fabs(f);
  return rounding == Rounding::kZero && beyond ? static_cast<u16>(h - 1) : h;
}

u16 float_to_bf16(float f, Rounding rounding) {
  if (std::isnan(f)) return 0x7fff;
  const auto bits = std::bit_cast<u32>(f);
  const u32 up = rounding == Rounding::kZero ? 0 : 0x7fff + (bits >> 16 & 1);
  return static_cast<u16>((bits + up) >> 16);
}

}  // namespace ptx
