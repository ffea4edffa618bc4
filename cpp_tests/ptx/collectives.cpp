// Instructions by which the lanes of a warp exchange values: shfl, vote, match, redux, elect, and bar.warp.
#include <algorithm>
#include <bit>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

// The lanes of `mask` that name a set of lanes of which none is missing; 0: all sets miss some.
u32 Machine::meeting(Warp& w, const Instruction& i, u32 mask) {
  const u64* members = w.values(i.operands.back());
  for (int l = 0; l < kLanes; ++l) {
    if ((mask >> l & 1) == 0) continue;
    const auto wanted = static_cast<u32>(members[l]);
    if ((wanted >> l & 1) == 0) fail(w, i, "a lane is not in its own member mask", l);
    u32 same = 0;
    lanes(mask, [&](int x) { same |= static_cast<u32>(static_cast<u32>(members[x]) == wanted) << x; });
    if ((wanted & w.live & ~same) == 0) return same;
  }
  return 0;
}

bool Machine::collective(Warp& w, std::size_t group, const Instruction& i) {
  const u32 mask = w.groups[group].mask;
  const u32 here = meeting(w, i, mask);
  if (here == 0) return false;
  if (here != mask) {
    w.groups.push_back(Group{mask & ~here, w.groups[group].pc, Group::kRetry});
    w.groups[group].mask = here;
  }
  switch (i.op) {
    case Op::kShfl:
      shfl(w, i, here);
      break;
    case Op::kVote:
      vote(w, i, here);
      break;
    case Op::kRedux:
      redux(w, i, here);
      break;
    case Op::kMatch:
      match(w, i, here);
      break;
    case Op::kElect:
      elect(w, i, here);
      break;
    default:  // bar.warp, which alone orders memory
      if (w.block->races != nullptr) w.block->races->meet(w.actor, here, w.live, static_cast<u32>(steps));
  }
  ++w.groups[group].pc;
  w.groups[group].state = Group::kReady;
  return true;
}

void Machine::shfl(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const u64* b = w.values(i.operands[2]);
  const u64* c = w.values(i.operands[3]);
  u64 result[kLanes];
  bool valid[kLanes];
  lanes(mask, [&](int l) {
    // Names as in the documentation.
    const int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(c[l] & 31);
    const int segmask = static_cast<int>(c[l] >> 8 & 31);
    const int max_lane = (l & segmask) | (cval & ~segmask), min_lane = l & segmask;
    int j = min_lane | (bval & ~segmask);
    if (i.has("up")) j = l - bval;
    if (i.has("down")) j = l + bval;
    if (i.has("bfly")) j = l ^ bval;
    valid[l] = i.has("up") ? j >= max_lane : j <= max_lane;
    if (!valid[l]) j = l;
    if ((mask >> j & 1) == 0) fail(w, i, "shfl from a lane that does not take part", l);
    result[l] = a[j] & 0xffffffffu;
  });
  const Operand& to = i.operands[0];
  lanes(mask, [&](int l) {
    if (to.kind != Operand::kSink) w.target(to)[l] = result[l];
    if (to.second >= 0) w.reg(to.second)[l] = valid[l] ? 1 : 0;
  });
}

void Machine::vote(Warp& w, const Instruction& i, u32 mask) {
  const Operand& p = i.operands[1];
  u32 yes = 0;
  lanes(mask, [&](int l) { yes |= static_cast<u32>((w.values(p)[l] & 1) ^ (p.negated ? 1 : 0)) << l; });
  u64 r = yes == 0 || yes == mask ? 1 : 0;  // uni
  if (i.has("ballot")) r = yes;
  if (i.has("all")) r = yes == mask ? 1 : 0;
  if (i.has("any")) r = yes != 0 ? 1 : 0;
  lanes(mask, [&](int l) { w.target(i.operands[0])[l] = r; });
}

void Machine::redux(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const int first = std::countr_zero(mask);
  auto r = static_cast<u32>(a[first]);
  const bool sign = i.type == Type::kS32;
  lanes(mask & ~(1u << first), [&](int l) {
    const auto v = static_cast<u32>(a[l]);
    const bool less = sign ? static_cast<s32>(v) < static_cast<s32>(r) : v < r;
    if (i.has("add")) {
      r += v;
    } else if (i.has("and")) {
      r &= v;
    } else if (i.has("or")) {
      r |= v;
    } else if (i.has("xor")) {
      r ^= v;
    } else if (less == i.has("min")) {
      r = v;
    }
  });
  lanes(mask, [&](int l) { w.target(i.operands[0])[l] = r; });
}

void Machine::elect(Warp& w, const Instruction& i, u32 mask) {
  const int leader = std::countr_zero(mask);
  const Operand& to = i.operands[0];
  lanes(mask, [&](int l) {
    if (to.kind == Operand::kRegister) w.target(to)[l] = static_cast<u64>(leader);
    if (to.second >= 0) w.reg(to.second)[l] = l == leader ? 1 : 0;
  });
}

void Machine::match(Warp& w, const Instruction& i, u32 mask) {
  const u64* a = w.values(i.operands[1]);
  const Operand& to = i.operands[0];
  u64 r[kLanes];
  lanes(mask, [&](int l) {
    u32 same = 0;
    lanes(mask, [&](int x) { same |= static_cast<u32>(a[x] == a[l]) << x; });
    r[l] = !i.has("all") ? same : same == mask ? mask : 0;
  });
  lanes(mask, [&](int l) {
    w.target(to)[l] = r[l];
    if (to.second >= 0) w.reg(to.second)[l] = r[l] == mask ? 1 : 0;
  });
}

}  // namespace ptx
