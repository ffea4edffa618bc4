// Logic, shifts, bit fields and moves.
#include <algorithm>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

u64 low_bits(u32 bits) { return bits >= 64 ? ~u64{0} : (u64{1} << bits) - 1; }
u32 bits_of(Type t) { return t == Type::kPred ? 1 : static_cast<u32>(size_of(t)) * 8; }
bool is_signed(Type t) { return t == Type::kS32 || t == Type::kS64; }

// mov of a register to elements of a vector, {a, b} = d, or back.
void unpack(Warp& w, const Instruction& i, u32 mask) {
  const auto& to = i.operands[0].sub;
  const u32 bits = bits_of(i.type) / static_cast<u32>(to.size());
  u64 copy[kLanes];
  std::copy_n(w.values(i.operands[1]), kLanes, copy);
  for (u32 n = 0; n < to.size(); ++n) {
    if (to[n].kind == Operand::kSink) continue;
    u64* d = w.target(to[n]);
    lanes(mask, [&](int l) { d[l] = copy[l] >> (bits * n) & low_bits(bits); });
  }
}
void pack(Warp& w, const Instruction& i, u32 mask) {
  const auto& from = i.operands[1].sub;
  const u32 bits = bits_of(i.type) / static_cast<u32>(from.size());
  u64 r[kLanes] = {};
  for (u32 n = 0; n < from.size(); ++n) {
    const u64* a = w.values(from[n]);
    lanes(mask, [&](int l) { r[l] |= (a[l] & low_bits(bits)) << (bits * n); });
  }
  u64* d = w.target(i.operands[0]);
  lanes(mask, [&](int l) { d[l] = r[l]; });
}

void move(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  if (i.operands[0].kind == Operand::kVector) return unpack(w, i, mask);
  if (i.operands[1].kind == Operand::kVector) return pack(w, i, mask);
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  if (a == nullptr || i.operands[1].negated) m.refuse(w, i);
  lanes(mask, [&](int l) { d[l] = a[l]; });
}

void logic(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  const u64 keep = low_bits(bits_of(i.type));
  if (i.op == Op::kNot) return lanes(mask, [&](int l) { d[l] = ~a[l] & keep; });
  if (i.op == Op::kCnot) return lanes(mask, [&](int l) { d[l] = (a[l] & keep) == 0 ? 1 : 0; });
  const u64* b = w.values(i.operands[2]);
  const u64 na = i.operands[1].negated ? 1 : 0, nb = i.operands[2].negated ? 1 : 0;
  switch (i.op) {
    case Op::kAnd:
      return lanes(mask, [&](int l) { d[l] = (a[l] ^ na) & (b[l] ^ nb) & keep; });
    case Op::kOr:
      return lanes(mask, [&](int l) { d[l] = ((a[l] ^ na) | (b[l] ^ nb)) & keep; });
    case Op::kXor:
      return lanes(mask, [&](int l) { d[l] = (a[l] ^ na ^ b[l] ^ nb) & keep; });
    default:
      m.refuse(w, i);
  }
}

void shift(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  u64* d = w.target(i.operands[0]);
  const bool known = with_int(i.type, [&](auto t) {
    using T = decltype(t);
    constexpr u32 kBits = sizeof(T) * 8;
    lanes(mask, [&](int l) {
      const auto n = static_cast<u32>(b[l]);
      const T v = get<T>(a[l]);
      const T out =
          i.op == Op::kShr && v < 0 ? static_cast<T>(-1) : T(0);  // what shifting by all bits leaves
      const T in = n >= kBits ? out : i.op == Op::kShl ? static_cast<T>(a[l] << n) : static_cast<T>(v >> n);
      d[l] = put(in);
    });
  });
  if (!known) m.refuse(w, i);
}

void funnel_shift(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const u64* c = w.values(i.operands[3]);
  u64* d = w.target(i.operands[0]);
  const bool left = i.has("l"), wrap = i.has("wrap");
  lanes(mask, [&](int l) {
    const auto wanted = static_cast<u32>(c[l]);
    const u32 n = wrap ? wanted & 31 : std::min(wanted, 32u);
    const u64 both = (b[l] & 0xffffffffu) << 32 | (a[l] & 0xffffffffu);
    d[l] = (left ? both << n >> 32 : both >> n) & 0xffffffffu;
  });
}

void lop3(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const u64* c = w.values(i.operands[3]);
  const auto table = static_cast<u32>(i.operands[4].value());
  u64* d = w.target(i.operands[0]);
  lanes(mask, [&](int l) {
    const auto x = static_cast<u32>(a[l]), y = static_cast<u32>(b[l]), z = static_cast<u32>(c[l]);
    u32 r = 0;
    for (u32 n = 0; n < 8; ++n) {
      if ((table >> n & 1) != 0)
        r |= ((n & 4) != 0 ? x : ~x) & ((n & 2) != 0 ? y : ~y) & ((n & 1) != 0 ? z : ~z);
    }
    d[l] = r;
  });
}

void prmt(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  if (i.modifiers.size() != 1) m.refuse(w, i);  // f4e, b4e, ...
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const u64* c = w.values(i.operands[3]);
  u64* d = w.target(i.operands[0]);
  lanes(mask, [&](int l) {
    const u64 both = (b[l] & 0xffffffffu) << 32 | (a[l] & 0xffffffffu);
    u32 r = 0;
    for (int n = 0; n < 4; ++n) {
      const u32 selector = static_cast<u32>(c[l]) >> (4 * n) & 15;
      u32 byte = static_cast<u32>(both >> (8 * (selector & 7))) & 255;
      if ((selector & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;  // the sign, in all bits
      r |= byte << (8 * n);
    }
    d[l] = r;
  });
}

void bfe(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const u64* c = w.values(i.operands[3]);
  u64* d = w.target(i.operands[0]);
  const u32 bits = bits_of(i.type);
  lanes(mask, [&](int l) {
    const u32 pos = static_cast<u32>(b[l]) & 255, length = static_cast<u32>(c[l]) & 255;
    const u64 v = a[l] & low_bits(bits);
    const u32 end = std::min(pos + length, bits);
    const bool sign = is_signed(i.type) && length != 0 && (v >> (end == 0 ? 0 : end - 1) & 1) != 0;
    u64 r = 0;
    for (u32 n = 0; n < bits; ++n) {
      const bool inside = n < length && pos + n < bits;
      r |= (inside ? v >> (pos + n) & 1 : u64{sign}) << n;
    }
    d[l] = r;
  });
}

void bfi(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const u64* c = w.values(i.operands[3]);
  const u64* e = w.values(i.operands[4]);
  u64* d = w.target(i.operands[0]);
  const u32 bits = bits_of(i.type);
  lanes(mask, [&](int l) {
    const u32 pos = static_cast<u32>(c[l]) & 255, length = static_cast<u32>(e[l]) & 255;
    u64 r = b[l];
    for (u32 n = 0; n < length && pos + n < bits; ++n)
      r = (r & ~(u64{1} << (pos + n))) | (a[l] >> n & 1) << (pos + n);
    d[l] = r & low_bits(bits);
  });
}

void count(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  const auto bits = static_cast<int>(bits_of(i.type));
  const u64 keep = low_bits(static_cast<u32>(bits));
  lanes(mask, [&](int l) {
    u64 v = a[l] & keep;
    switch (i.op) {
      case Op::kPopc:
        d[l] = static_cast<u64>(std::popcount(v));
        break;
      case Op::kClz:
        d[l] = static_cast<u64>(std::countl_zero(v) - (64 - bits));
        break;
      case Op::kBfind: {
        if (is_signed(i.type) && (v >> (bits - 1) & 1) != 0) v = ~v & keep;
        const int top = 63 - std::countl_zero(v);
        d[l] = v == 0 ? 0xffffffffu : static_cast<u64>(i.has("shiftamt") ? bits - 1 - top : top);
        break;
      }
      case Op::kBrev: {
        u64 r = 0;
        for (int n = 0; n < bits; ++n) r |= (v >> n & 1) << (bits - 1 - n);
        d[l] = r;
        break;
      }
      default:
        m.refuse(w, i);
    }
  });
}

}  // namespace

void Machine::bits(Warp& w, const Instruction& i, u32 mask) {
  switch (i.op) {
    case Op::kMov:
      return move(*this, w, i, mask);
    case Op::kShl:
    case Op::kShr:
      return shift(*this, w, i, mask);
    case Op::kShf:
      return funnel_shift(w, i, mask);
    case Op::kLop3:
      return lop3(w, i, mask);
    case Op::kPrmt:
      return prmt(*this, w, i, mask);
    case Op::kBfe:
      return bfe(w, i, mask);
    case Op::kBfi:
      return bfi(w, i, mask);
    case Op::kPopc:
    case Op::kClz:
    case Op::kBfind:
    case Op::kBrev:
      return count(*this, w, i, mask);
    default:
      return logic(*this, w, i, mask);
  }
}

}  // namespace ptx
