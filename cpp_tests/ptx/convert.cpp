// cvt.
#include <limits>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

bool is_float(Type t) {
  return t == Type::kF16 || t == Type::kBf16 || t == Type::kF32 || t == Type::kF64 || t == Type::kTf32;
}

double to_integer(Rounding rounding, double v) {
  switch (rounding) {
    case Rounding::kIntZero:
    case Rounding::kZero:
      return std::trunc(v);
    case Rounding::kIntDown:
    case Rounding::kDown:
      return std::floor(v);
    case Rounding::kIntUp:
    case Rounding::kUp:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

// The number in a register, exactly.
double number(const Instruction& i, Type from, u64 v) {
  switch (from) {
    case Type::kF16:
    case Type::kBf16:
      return element(from, static_cast<u16>(v));
    case Type::kF32:
      return i.ftz ? flush(get<float>(v)) : get<float>(v);
    default:
      return get<double>(v);
  }
}

template <class T>
u64 clamped(double v) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(v)) return put(sizeof(T) == 8 ? Limits::min() : T(0));
  if (v <= static_cast<double>(Limits::min())) return put(Limits::min());
  return put(v >= static_cast<double>(Limits::max()) ? Limits::max() : static_cast<T>(v));
}

// Two floats to a pair; the first source is the upper half.
void to_pair(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  u64* d = w.target(i.operands[0]);
  const bool brain = i.type_before == Type::kBf16x2, relu = i.has("relu");
  const auto one = [&](u64 v) {
    const float f = relu && get<float>(v) < 0 ? 0.0f : get<float>(v);
    return u64{brain ? float_to_bf16(f, i.rounding) : float_to_half(f, i.rounding)};
  };
  lanes(mask, [&](int l) { d[l] = one(a[l]) << 16 | one(b[l]); });
}

bool int_to_int(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  bool known = false;
  with_int(i.type, [&](auto s) {
    using S = decltype(s);
    known = with_int(i.type_before, [&](auto t) {
      using T = decltype(t);
      constexpr __int128 kLow = std::numeric_limits<T>::min(), kHigh = std::numeric_limits<T>::max();
      lanes(mask, [&](int l) {
        const __int128 v = get<S>(a[l]);
        d[l] = put(static_cast<T>(!i.sat ? v : v < kLow ? kLow : v > kHigh ? kHigh : v));
      });
    });
  });
  return known;
}

bool float_to_int(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  return with_int(i.type_before, [&](auto t) {
    using T = decltype(t);
    lanes(mask, [&](int l) { d[l] = clamped<T>(to_integer(i.rounding, number(i, i.type, a[l]))); });
  });
}

u64 float_bits(Type to, Rounding rounding, float f) {
  switch (to) {
    case Type::kF32:
      return std::isnan(f) ? 0x7fffffffu : put(f);
    case Type::kTf32:
      return (std::bit_cast<u32>(f) + 0x1000u) & ~0x1fffu;
    case Type::kF16:
      return float_to_half(f, rounding);
    default:
      return float_to_bf16(f, rounding);
  }
}

bool int_to_float(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  const RoundingMode mode(i.rounding);
  return with_int(i.type, [&](auto s) {
    using S = decltype(s);
    lanes(mask, [&](int l) {
      const S v = get<S>(a[l]);
      d[l] = i.type_before == Type::kF64 ? put(static_cast<double>(v))
                                         : float_bits(i.type_before, i.rounding, static_cast<float>(v));
    });
  });
}

void float_to_float(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  const RoundingMode mode(i.rounding);
  lanes(mask, [&](int l) {
    double v = number(i, i.type, a[l]);
    if (i.rounding >= Rounding::kIntNearest && i.rounding <= Rounding::kIntUp) v = to_integer(i.rounding, v);
    if (i.sat) v = std::isnan(v) ? 0 : std::fmin(std::fmax(v, 0.0), 1.0);
    if (i.has("relu") && v < 0) v = 0;
    if (i.type_before == Type::kF64) {
      d[l] = put(v);
      return;
    }
    const auto f = static_cast<float>(v);
    d[l] = float_bits(i.type_before, i.rounding, i.ftz && i.type_before == Type::kF32 ? flush(f) : f);
  });
}

}  // namespace

// cvt.rounding.to.from d, a
void Machine::convert(Warp& w, const Instruction& i, u32 mask) {
  const Type to = i.type_before, from = i.type;
  if (to == Type::kBf16x2 || to == Type::kF16x2) return to_pair(w, i, mask);
  bool known = true;
  if (is_float(from) && is_float(to)) {
    float_to_float(w, i, mask);
  } else if (is_float(from)) {
    known = float_to_int(w, i, mask);
  } else if (is_float(to)) {
    known = int_to_float(w, i, mask);
  } else {
    known = int_to_int(w, i, mask);
  }
  if (!known) refuse(w, i);
}

}  // namespace ptx
