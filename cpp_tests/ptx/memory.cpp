// Loads, stores and atomic operations; conversions of addresses; fences.
#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

constexpr u64 kOffset = 0xffffff;  // of an address of shared memory, see addresses.cpp

bool is_signed(Type t) { return t == Type::kS8 || t == Type::kS16 || t == Type::kS32; }

// The value that atom or red leaves behind.
template <class T>
T combined(const Instruction& i, T old, T x, T swap, bool* known) {
  if (i.has("add")) return static_cast<T>(old + x);
  if (i.has("min")) return ptx_min(old, x);
  if (i.has("max")) return ptx_max(old, x);
  if (i.has("exch")) return x;
  if (i.has("cas")) return old == x ? swap : old;
  if constexpr (std::is_integral_v<T>) {
    if (i.has("and")) return old & x;
    if (i.has("or")) return old | x;
    if (i.has("xor")) return old ^ x;
    if (i.has("inc")) return old >= x ? T(0) : static_cast<T>(old + 1);
    if (i.has("dec")) return old == 0 || old > x ? x : static_cast<T>(old - 1);
  }
  *known = false;
  return old;
}

void load(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const Operand& from = i.operands[1];
  const u64* a = w.values(from);
  const int each = size_of(i.type), shift = 64 - 8 * each;
  const bool one = i.operands[0].kind != Operand::kVector;
  u64* d[8];
  for (std::size_t v = 0; v < i.vector; ++v) {
    const Operand& o = one ? i.operands[0] : i.operands[0].sub[v];
    d[v] = o.kind == Operand::kSink ? nullptr : w.target(o);
  }
  lanes(mask, [&](int l) {
    const u8* p = m.address(w, i, l, i.space, a[l] + static_cast<u64>(from.offset),
                            static_cast<u32>(each * i.vector), Races::Kind::kRead);
    for (int v = 0; v < i.vector; ++v) {
      if (d[v] == nullptr) continue;
      u64 r = 0;
      std::memcpy(&r, p + v * each, static_cast<std::size_t>(each));
      if (is_signed(i.type)) r = static_cast<u64>(static_cast<s64>(r << shift) >> shift);
      d[v][l] = r;
    }
  });
}

void store(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const Operand& to = i.operands[0];
  const u64* a = w.values(to);
  const auto each = static_cast<std::size_t>(size_of(i.type));
  const bool one = i.operands[1].kind != Operand::kVector;
  lanes(mask, [&](int l) {
    u8* p = m.address(w, i, l, i.space, a[l] + static_cast<u64>(to.offset), static_cast<u32>(each * i.vector),
                      Races::Kind::kWrite);
    for (std::size_t v = 0; v < i.vector; ++v)
      std::memcpy(p + v * each, &w.values(one ? i.operands[1] : i.operands[1].sub[v])[l], each);
  });
}

void atomic(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const std::size_t first = i.op == Op::kAtom ? 1 : 0;
  const Operand& at = i.operands[first];
  const Operand& value = i.operands[first + 1];
  if (value.kind == Operand::kVector) m.refuse(w, i);
  const u64* a = w.values(at);
  const u64* b = w.values(value);
  const u64* c = i.operands.size() > first + 2 ? w.values(i.operands[first + 2]) : b;
  u64* d = first == 1 && i.operands[0].kind == Operand::kRegister ? w.target(i.operands[0]) : nullptr;
  bool known = true;
  const auto f = [&](auto t) {
    using T = decltype(t);
    lanes(mask, [&](int l) {
      u8* p =
          m.address(w, i, l, i.space, a[l] + static_cast<u64>(at.offset), sizeof(T), Races::Kind::kAtomic);
      T old;
      std::memcpy(&old, p, sizeof(T));
      const T left = combined(i, old, get<T>(b[l]), get<T>(c[l]), &known);
      std::memcpy(p, &left, sizeof(T));
      if (d != nullptr) d[l] = put(old);
    });
  };
  if ((!with_int(i.type, f) && !with_float(i.type, f)) || !known) m.refuse(w, i);
}

// Generic addresses are those of the host; shared ones are offsets in a block's window.
void convert_address(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  if (i.space != Space::kShared) return lanes(mask, [&](int l) { d[l] = a[l]; });
  const u64 base = reinterpret_cast<u64>(w.block->shared);
  if (!i.has("to")) return lanes(mask, [&](int l) { d[l] = (a[l] & 0xffffffffu) + base; });
  lanes(mask, [&](int l) {
    u64 r = a[l] - base;
    for (const Block* b : *w.block->cluster) {
      if (b != w.block && b->holds(reinterpret_cast<const void*>(a[l])))
        r = (a[l] - reinterpret_cast<u64>(b->shared)) | u64{b->rank + 1} << 24;
    }
    d[l] = r & 0xffffffffu;
  });
}

void is_space(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  u64* d = w.target(i.operands[0]);
  lanes(mask, [&](int l) {
    const bool shared = w.block->holds(reinterpret_cast<const void*>(a[l]));
    const bool local = a[l] - reinterpret_cast<u64>(w.local.data()) < w.local.size();
    d[l] = i.space == Space::kShared ? shared : i.space == Space::kGlobal ? !shared && !local : local;
  });
}

// The same place in the shared memory of another block of the cluster.
void map_address(Machine& m, Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* rank = w.values(i.operands[2]);
  u64* d = w.target(i.operands[0]);
  lanes(mask, [&](int l) {
    if (rank[l] >= w.block->cluster->size()) m.fail(w, i, "a rank beyond the cluster", l);
    const Block& other = *(*w.block->cluster)[rank[l]];
    d[l] = i.space == Space::kShared
               ? (a[l] & kOffset) | (rank[l] + 1) << 24
               : a[l] - reinterpret_cast<u64>(w.block->shared) + reinterpret_cast<u64>(other.shared);
  });
}

}  // namespace

void Machine::memory(Warp& w, const Instruction& i, u32 mask) {
  switch (i.op) {
    case Op::kLd:
      return load(*this, w, i, mask);
    case Op::kSt:
      return store(*this, w, i, mask);
    case Op::kAtom:
    case Op::kRed:
      return atomic(*this, w, i, mask);
    case Op::kCvta:
      return convert_address(w, i, mask);
    case Op::kIsspacep:
      return is_space(w, i, mask);
    case Op::kMapa:
      return map_address(*this, w, i, mask);
    case Op::kCreatepolicy:
      return lanes(mask, [&](int l) { w.target(i.operands[0])[l] = 0; });
    case Op::kCpAsync:
      return copy(w, i, mask);
    case Op::kCpAsyncBulk:
      return bulk(w, i, mask);
    case Op::kFence:
      if (i.text.find("proxy.async") == std::string::npos) return;
      if (i.has("global") || i.space == Space::kGeneric) w.fenced_global |= mask & w.waited;
      if (i.space != Space::kGlobal) fence_proxy(w, mask);
      return;
    case Op::kGriddepcontrol:
      if (i.has("wait")) w.waited |= mask;
      return;
    default:
      return;  // what has no effect here
  }
}

}  // namespace ptx
