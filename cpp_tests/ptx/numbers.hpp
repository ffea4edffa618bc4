// Values of registers as numbers: types, rounding, comparison.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "ptx/program.hpp"

namespace ptx {

// The low bytes of a register as a T, and a T as a register's value.
template <class T>
T get(u64 v) {
  T t;
  std::memcpy(&t, &v, sizeof t);
  return t;
}
template <class T>
u64 put(T t) {
  if constexpr (std::is_same_v<T, bool>) return t;
  u64 v = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) return static_cast<u64>(static_cast<s64>(t));
  std::memcpy(&v, &t, sizeof t);
  return v;
}

// f(lane) for every lane of the mask.
template <class F>
void lanes(u32 mask, F&& f) {
  if (mask == 0xffffffffu) {
    for (int l = 0; l < 32; ++l) f(l);
  } else {
    for (u32 m = mask; m != 0; m &= m - 1) f(std::countr_zero(m));
  }
}

inline float flush(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

// Rounds float and double arithmetic while it lives.
struct RoundingMode {
  explicit RoundingMode(Rounding mode) : mode_(mode) {
    if (mode_ == Rounding::kZero) std::fesetround(FE_TOWARDZERO);
    if (mode_ == Rounding::kDown) std::fesetround(FE_DOWNWARD);
    if (mode_ == Rounding::kUp) std::fesetround(FE_UPWARD);
  }
  ~RoundingMode() {
    if (mode_ != Rounding::kNearest) std::fesetround(FE_TONEAREST);
  }
  RoundingMode(const RoundingMode&) = delete;

 private:
  Rounding mode_;
};

template <class T>
T ptx_min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
T ptx_max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  }
  return a < b ? b : a;
}

// f(T{}) for the C++ type of an integer type; false for others.
template <class F>
bool with_int(Type t, F&& f) {
  switch (t) {
    case Type::kB8:
    case Type::kU8:
      f(u8{});
      return true;
    case Type::kS8:
      f(s8{});
      return true;
    case Type::kB16:
    case Type::kU16:
      f(u16{});
      return true;
    case Type::kS16:
      f(s16{});
      return true;
    case Type::kB32:
    case Type::kU32:
      f(u32{});
      return true;
    case Type::kS32:
      f(s32{});
      return true;
    case Type::kB64:
    case Type::kU64:
      f(u64{});
      return true;
    case Type::kS64:
      f(s64{});
      return true;
    default:
      return false;
  }
}
template <class F>
bool with_float(Type t, F&& f) {
  if (t == Type::kF32) {
    f(float{});
    return true;
  }
  if (t == Type::kF64) {
    f(double{});
    return true;
  }
  return false;
}

// By the index of the comparison's name in opcodes.cpp.
template <class T>
bool compare(int c, T a, T b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  switch (c) {
    case 0:
      return !unordered && a == b;
    case 1:
      return !unordered && a != b;
    case 2:
    case 6:
      return !unordered && a < b;
    case 3:
    case 7:
      return !unordered && a <= b;
    case 4:
    case 8:
      return !unordered && a > b;
    case 5:
    case 9:
      return !unordered && a >= b;
    case 10:
      return unordered || a == b;
    case 11:
      return unordered || a != b;
    case 12:
      return unordered || a < b;
    case 13:
      return unordered || a <= b;
    case 14:
      return unordered || a > b;
    case 15:
      return unordered || a >= b;
    case 16:
      return !unordered;
    case 17:
      return unordered;
  }
  return false;
}

float half_to_float(u16);
u16 float_to_half(float, Rounding = Rounding::kNearest);
inline float bf16_to_float(u16 v) { return std::bit_cast<float>(u32{v} << 16); }
u16 float_to_bf16(float, Rounding = Rounding::kNearest);
// A 16-bit value of type f16 or bf16.
inline float element(Type t, u16 v) { return t == Type::kBf16 ? bf16_to_float(v) : half_to_float(v); }

inline float as_float(u64 v) { return std::bit_cast<float>(static_cast<u32>(v)); }
inline u64 as_bits(float f) { return std::bit_cast<u32>(f); }

}  // namespace ptx
