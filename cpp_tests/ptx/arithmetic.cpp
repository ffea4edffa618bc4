// Arithmetic on integers and floats, comparison and selection.
#include <algorithm>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

bool is_half(Type t) {
  return t == Type::kF16 || t == Type::kBf16 || t == Type::kF16x2 || t == Type::kBf16x2;
}
bool is_float(Type t) { return t == Type::kF32 || t == Type::kF64 || is_half(t); }

// The destination and up to three sources; a source that is not there is the first one.
struct Operands {
  const u64 *a, *b, *c;
  u64* d;
  Operands(Warp& w, const Instruction& i) {
    const std::size_t n = i.operands.size();
    a = w.values(i.operands[1]);
    b = n > 2 ? w.values(i.operands[2]) : a;
    c = n > 3 ? w.values(i.operands[3]) : a;
    d = w.target(i.operands[0]);
  }
};

// Inexact results get an odd last bit, so that rounding them once more to 16 bits is right.
float round_to_odd(double v) {
  const auto nearest = static_cast<float>(v);
  if (static_cast<double>(nearest) == v || !std::isfinite(nearest)) return nearest;
  const float toward_zero =
      std::fabs(static_cast<double>(nearest)) > std::fabs(v) ? std::nextafter(nearest, 0.0f) : nearest;
  return std::bit_cast<float>(std::bit_cast<u32>(toward_zero) | 1u);
}

// f(a, b, c) for f16, bf16 and pairs of them: exactly, with one rounding at the end.
template <class F>
void half_op(Warp& w, const Instruction& i, u32 mask, F&& f) {
  const Operands o(w, i);
  const bool pair = i.type == Type::kF16x2 || i.type == Type::kBf16x2;
  const bool brain = i.type == Type::kBf16 || i.type == Type::kBf16x2;
  lanes(mask, [&](int l) {
    u64 r = 0;
    for (int shift = 0; shift < (pair ? 32 : 16); shift += 16) {
      const auto in = [&](const u64* p) {
        const auto v = static_cast<u16>(p[l] >> shift);
        return static_cast<double>(brain ? bf16_to_float(v) : half_to_float(v));
      };
      const float v = round_to_odd(f(in(o.a), in(o.b), in(o.c)));
      r |= u64{brain ? float_to_bf16(v) : float_to_half(v)} << shift;
    }
    o.d[l] = r;
  });
}

// f(a, b, c) for any floating type; false for others.
template <class F>
bool float_op(Warp& w, const Instruction& i, u32 mask, F&& f) {
  if (!is_float(i.type)) return false;
  if (is_half(i.type)) {
    half_op(w, i, mask, f);
    return true;
  }
  const Operands o(w, i);
  const RoundingMode mode(i.rounding);
  if (i.type == Type::kF64) {
    lanes(mask,
          [&](int l) { o.d[l] = put(f(get<double>(o.a[l]), get<double>(o.b[l]), get<double>(o.c[l]))); });
    return true;
  }
  const auto in = [&](u64 v) { return i.ftz ? flush(get<float>(v)) : get<float>(v); };
  lanes(mask, [&](int l) {
    float r = f(in(o.a[l]), in(o.b[l]), in(o.c[l]));
    if (i.ftz) r = flush(r);
    if (i.sat) r = std::isnan(r) ? 0.0f : std::min(std::max(r, 0.0f), 1.0f);
    o.d[l] = std::isnan(r) ? 0x7fffffffu : put(r);
  });
  return true;
}

// f(a, b, c) for any integer type; false for others.
template <class F>
bool int_op(Warp& w, const Instruction& i, u32 mask, F&& f) {
  const Operands o(w, i);
  return with_int(i.type, [&](auto t) {
    using T = decltype(t);
    lanes(mask,
          [&](int l) { o.d[l] = put(static_cast<T>(f(get<T>(o.a[l]), get<T>(o.b[l]), get<T>(o.c[l])))); });
  });
}

// mul and mad of integers: the low half, the high half, or all of the product.
bool multiply(Warp& w, const Instruction& i, u32 mask) {
  const Operands o(w, i);
  const bool add = i.op == Op::kMad;
  return with_int(i.type, [&](auto t) {
    using T = decltype(t);
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    lanes(mask, [&](int l) {
      const Wide p = static_cast<Wide>(get<T>(o.a[l])) * static_cast<Wide>(get<T>(o.b[l]));
      if (i.wide) {
        const u64 r = static_cast<u64>(p) + (add ? o.c[l] : 0);
        o.d[l] = sizeof(T) == 2 ? r & 0xffffffffu : r;
        return;
      }
      const u64 r = static_cast<u64>(i.hi ? p >> (8 * sizeof(T)) : p);
      o.d[l] = put(static_cast<T>(r + (add ? static_cast<u64>(get<T>(o.c[l])) : 0)));
    });
  });
}

template <class T>
T divided(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<u64>(a));
  return static_cast<T>(a / b);
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}

// As documented: a divisor above 2^126 gives zero.
template <class T>
T divided_approximately(T a, T b) {
  if (std::fabs(b) > 0x1p126f && std::fabs(b) < 0x1p128) return std::isinf(a) ? static_cast<T>(NAN) : T(0);
  return a / b;
}

template <class T>
T smallest(const Instruction& i, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (i.has("NaN") && (std::isnan(a) || std::isnan(b))) return static_cast<T>(NAN);
  }
  return ptx_min(a, b);
}

template <class T>
T largest(const Instruction& i, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (i.has("NaN") && (std::isnan(a) || std::isnan(b))) return static_cast<T>(NAN);
  }
  return ptx_max(a, b);
}

bool joined(Boolean with, bool a, bool b) {
  switch (with) {
    case Boolean::kAnd:
      return a && b;
    case Boolean::kOr:
      return a || b;
    case Boolean::kXor:
      return a != b;
    default:
      return a;
  }
}

bool setp(Warp& w, const Instruction& i, u32 mask) {
  const Operand& to = i.operands[0];
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const bool joins = i.boolean != Boolean::kNone;
  const u64* c = joins ? w.values(i.operands[3]) : a;
  const bool negated = joins && i.operands[3].negated;
  u64* p = to.kind == Operand::kSink ? nullptr : w.target(to);
  u64* q = to.second >= 0 ? w.reg(to.second) : nullptr;
  const auto finish = [&](int l, bool r) {
    const bool other = ((c[l] & 1) != 0) != negated;
    if (p != nullptr) p[l] = joined(i.boolean, r, other) ? 1 : 0;
    if (q != nullptr) q[l] = joined(i.boolean, !r, other) ? 1 : 0;
  };
  if (i.type == Type::kF16 || i.type == Type::kBf16) {
    const auto in = [&](u64 v) { return element(i.type, static_cast<u16>(v)); };
    lanes(mask, [&](int l) { finish(l, compare(i.comparison, in(a[l]), in(b[l]))); });
    return true;
  }
  const auto f = [&](auto t) {
    using T = decltype(t);
    lanes(mask, [&](int l) { finish(l, compare(i.comparison, get<T>(a[l]), get<T>(b[l]))); });
  };
  return with_int(i.type, f) || with_float(i.type, f);
}

bool set(Warp& w, const Instruction& i, u32 mask) {
  if (i.boolean != Boolean::kNone) return false;
  const Operands o(w, i);
  const u64 yes = i.type_before == Type::kF32 ? put(1.0f) : 0xffffffffu;
  const auto f = [&](auto t) {
    using T = decltype(t);
    lanes(mask, [&](int l) { o.d[l] = compare(i.comparison, get<T>(o.a[l]), get<T>(o.b[l])) ? yes : 0; });
  };
  return with_int(i.type, f) || with_float(i.type, f);
}

bool testp(Warp& w, const Instruction& i, u32 mask) {
  const Operands o(w, i);
  return with_float(i.type, [&](auto t) {
    using T = decltype(t);
    lanes(mask, [&](int l) {
      const T v = get<T>(o.a[l]);
      o.d[l] = i.has("finite")       ? std::isfinite(v)
               : i.has("infinite")   ? std::isinf(v)
               : i.has("number")     ? !std::isnan(v)
               : i.has("notanumber") ? std::isnan(v)
               : i.has("normal")     ? std::isnormal(v)
                                     : std::fpclassify(v) == FP_SUBNORMAL;
    });
  });
}

bool select(Warp& w, const Instruction& i, u32 mask) {
  const Operands o(w, i);
  if (i.op == Op::kSelp) {
    const u64 negated = i.operands[3].negated ? 1 : 0;
    lanes(mask, [&](int l) { o.d[l] = ((o.c[l] ^ negated) & 1) != 0 ? o.a[l] : o.b[l]; });
    return true;
  }
  const bool real = i.type == Type::kF32;  // of what decides
  lanes(mask,
        [&](int l) { o.d[l] = (real ? get<float>(o.c[l]) >= 0 : get<s32>(o.c[l]) >= 0) ? o.a[l] : o.b[l]; });
  return true;
}

// What is approximate on hardware is exact here.
bool special_function(Warp& w, const Instruction& i, u32 mask) {
  switch (i.op) {
    case Op::kRcp:
      return float_op(w, i, mask, [](auto a, auto, auto) { return 1 / a; });
    case Op::kSqrt:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::sqrt(a); });
    case Op::kRsqrt:
      return float_op(w, i, mask, [](auto a, auto, auto) { return 1 / std::sqrt(a); });
    case Op::kEx2:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::exp2(a); });
    case Op::kLg2:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::log2(a); });
    case Op::kSin:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::sin(a); });
    case Op::kCos:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::cos(a); });
    default:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::tanh(a); });
  }
}

bool float_arithmetic(Warp& w, const Instruction& i, u32 mask) {
  switch (i.op) {
    case Op::kAdd:
      return float_op(w, i, mask, [](auto a, auto b, auto) { return a + b; });
    case Op::kSub:
      return float_op(w, i, mask, [](auto a, auto b, auto) { return a - b; });
    case Op::kMul:
      return float_op(w, i, mask, [](auto a, auto b, auto) { return a * b; });
    case Op::kMad:
    case Op::kFma:
      return float_op(w, i, mask, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
    case Op::kDiv:
      if (i.approx)
        return float_op(w, i, mask, [](auto a, auto b, auto) { return divided_approximately(a, b); });
      return float_op(w, i, mask, [](auto a, auto b, auto) { return a / b; });
    case Op::kNeg:
      return float_op(w, i, mask, [](auto a, auto, auto) { return -a; });
    case Op::kAbs:
      return float_op(w, i, mask, [](auto a, auto, auto) { return std::fabs(a); });
    case Op::kMin:
      return float_op(w, i, mask, [&](auto a, auto b, auto) { return smallest(i, a, b); });
    case Op::kMax:
      return float_op(w, i, mask, [&](auto a, auto b, auto) { return largest(i, a, b); });
    case Op::kCopysign:
      return float_op(w, i, mask, [](auto a, auto b, auto) { return std::copysign(b, a); });
    default:
      return special_function(w, i, mask);
  }
}

bool int_arithmetic(Warp& w, const Instruction& i, u32 mask) {
  const auto u = [](auto v) { return static_cast<u64>(v); };
  switch (i.op) {
    case Op::kAdd:
      return int_op(w, i, mask, [&](auto a, auto b, auto) { return u(a) + u(b); });
    case Op::kSub:
      return int_op(w, i, mask, [&](auto a, auto b, auto) { return u(a) - u(b); });
    case Op::kMul:
    case Op::kMad:
      return multiply(w, i, mask);
    case Op::kDiv:
      return int_op(w, i, mask, [](auto a, auto b, auto) { return divided(a, b); });
    case Op::kRem:
      return int_op(w, i, mask, [](auto a, auto b, auto) { return remainder(a, b); });
    case Op::kNeg:
      return int_op(w, i, mask, [&](auto a, auto, auto) { return 0 - u(a); });
    case Op::kAbs:
      return int_op(w, i, mask, [&](auto a, auto, auto) { return a < 0 ? 0 - u(a) : u(a); });
    case Op::kMin:
      return int_op(w, i, mask, [](auto a, auto b, auto) { return std::min(a, b); });
    case Op::kMax:
      return int_op(w, i, mask, [](auto a, auto b, auto) { return std::max(a, b); });
    case Op::kSad:
      return int_op(w, i, mask,
                    [&](auto a, auto b, auto c) { return u(c) + (a < b ? u(b) - u(a) : u(a) - u(b)); });
    default:
      return false;
  }
}

}  // namespace

void Machine::arithmetic(Warp& w, const Instruction& i, u32 mask) {
  bool known = false;
  switch (i.op) {
    case Op::kSetp:
      known = setp(w, i, mask);
      break;
    case Op::kSet:
      known = set(w, i, mask);
      break;
    case Op::kTestp:
      known = testp(w, i, mask);
      break;
    case Op::kSelp:
    case Op::kSlct:
      known = select(w, i, mask);
      break;
    default:
      known = is_float(i.type) ? float_arithmetic(w, i, mask) : int_arithmetic(w, i, mask);
  }
  if (!known) refuse(w, i);
}

}  // namespace ptx
