// Warps: which lanes go on, divergence, and instructions of several lanes.
#include <algorithm>
#include <bit>

#include "ptx/machine.hpp"

namespace ptx {

namespace {

constexpr int kFairShare = 64;  // instructions of lanes that are not those furthest behind
constexpr u64 kRareTurn = 4096;

bool can_be_tried(const Warp& w, const Group& g) {
  return g.state == Group::kReady || (g.state == Group::kRetry && g.tried != w.turns);
}

// Where the group `pick` meets lanes that are ahead of it.
int next_meeting(const Warp& w, std::size_t pick) {
  int at = -1;
  for (const Group& g : w.groups) {
    if (g.state != Group::kAtBarrier && g.pc > w.groups[pick].pc && (at < 0 || g.pc < at)) at = g.pc;
  }
  return at;
}

}  // namespace

// Lets a warp execute at most `budget` instructions. False: none of its lanes could go on.
bool Machine::turn(Warp& w, int budget) {
  bool progress = false;
  ++w.turns;
  // Where instructions are counted lanes meet as early as they can, as on hardware; almost never otherwise,
  // for loops that wait for another lane.
  const bool fair = counter != nullptr ? w.turns % kRareTurn == 0 : chance(8);
  while (budget > 0 && w.live != 0) {
    std::size_t pick = pick_group(w, fair);
    if (pick == w.groups.size()) break;
    merge_groups(w, pick);
    progress |= advance(w, pick, fair ? kFairShare : budget, budget);
  }
  return progress;
}

// Those furthest behind, so that lanes meet again after a branch; now and then (`fair`) any.
std::size_t Machine::pick_group(Warp& w, bool fair) {
  std::size_t pick = w.groups.size();
  std::size_t candidates = 0;
  for (std::size_t n = 0; n < w.groups.size(); ++n) {
    if (!can_be_tried(w, w.groups[n])) continue;
    ++candidates;
    const bool first = pick == w.groups.size();
    if (first || (fair ? random() % candidates == 0 : w.groups[n].pc < w.groups[pick].pc)) pick = n;
  }
  return pick;
}

// Lanes at the same place as those picked go on with them.
void Machine::merge_groups(Warp& w, std::size_t& pick) {
  for (std::size_t n = 0; n < w.groups.size();) {
    const Group& g = w.groups[n];
    if (n == pick || g.pc != w.groups[pick].pc || g.state == Group::kAtBarrier) {
      ++n;
      continue;
    }
    w.groups[pick].mask |= g.mask;
    w.groups[pick].state = Group::kReady;
    w.groups.erase(w.groups.begin() + static_cast<std::ptrdiff_t>(n));
    if (pick > n) --pick;
  }
}

// The lanes of `mask` for which the instruction's predicate holds.
u32 Machine::guarded(Warp& w, const Instruction& i, u32 mask) {
  if (i.guard < 0) return mask;
  const u64* p = w.reg(i.guard);
  u32 on = 0;
  for (int l = 0; l < kLanes; ++l) on |= static_cast<u32>(p[l] & 1) << l;
  return mask & (i.guard_negated ? ~on : on);
}

// Executes instructions of one group until it splits, waits or meets others.
bool Machine::advance(Warp& w, std::size_t pick, int budget_of_group, int& budget) {
  bool progress = false;
  const int meeting = next_meeting(w, pick);
  while (budget > 0 && budget_of_group > 0) {
    Group& g = w.groups[pick];
    const Instruction& i = kernel->code[static_cast<std::size_t>(g.pc)];
    const u32 mask = guarded(w, i, g.mask);
    --budget;
    --budget_of_group;
    ++steps;
    if (mask == 0 || unit_of(i.op) != Unit::kWarp) {
      if (counter != nullptr) counter->issued(*this, w, i, mask);
      if (mask != 0) execute(w, i, mask);
      ++g.pc;
      progress = true;
      if (g.pc == meeting) break;
      continue;
    }
    if (i.op == Op::kBra) {
      ++i.executed;
      if (counter != nullptr) counter->issued(*this, w, i, mask);
      progress = true;
      if (branch(w, pick, i, mask)) break;
      continue;
    }
    if (i.op == Op::kRet || i.op == Op::kExit) {
      if (counter != nullptr) counter->issued(*this, w, i, mask);
      leave(w, pick, mask);
      return true;
    }
    // Of several lanes together: those that do not take part go on alone.
    if (mask != g.mask) {
      const Group rest{g.mask & ~mask, g.pc + 1};
      g.mask = mask;
      w.groups.push_back(rest);
    }
    if (together(w, pick, i)) {
      ++i.executed;
      if (counter != nullptr) counter->issued(*this, w, i, mask);
      return true;
    }
    w.groups[pick].state = Group::kRetry;
    w.groups[pick].tried = w.turns;
    ++budget;  // others of this warp may go on: a turn that ends here would look like a deadlock
    break;
  }
  return progress;
}

// True where other lanes may be further behind now.
bool Machine::branch(Warp& w, std::size_t pick, const Instruction& i, u32 mask) {
  Group& g = w.groups[pick];
  if (mask == g.mask) {
    g.pc = i.target;
    return w.groups.size() > 1;
  }
  const Group rest{g.mask & ~mask, g.pc + 1};
  g.mask = mask;
  g.pc = i.target;
  w.groups.push_back(rest);
  return true;
}

void Machine::leave(Warp& w, std::size_t pick, u32 mask) {
  Group& g = w.groups[pick];
  w.live &= ~mask;
  g.mask &= ~mask;
  ++g.pc;
  if (g.mask == 0) w.groups.erase(w.groups.begin() + static_cast<std::ptrdiff_t>(pick));
  if (w.live == 0) {
    for (int b = 0; b < 16; ++b) release_barrier(*w.block, b);
  }
}

// What each lane executes for itself.
void Machine::execute(Warp& w, const Instruction& i, u32 mask) {
  ++i.executed;
  if (w.any_in_flight) check_in_flight(w, i, mask);
  switch (unit_of(i.op)) {
    case Unit::kArithmetic:
      return arithmetic(w, i, mask);
    case Unit::kBits:
      return bits(w, i, mask);
    case Unit::kConvert:
      return convert(w, i, mask);
    default:
      return memory(w, i, mask);
  }
}

// What lanes execute together, or wait for. False: not yet.
bool Machine::together(Warp& w, std::size_t group, const Instruction& i) {
  Group& g = w.groups[group];
  if (w.any_in_flight) check_in_flight(w, i, g.mask);
  switch (i.op) {
    case Op::kBar:
      return barrier(w, g, i);
    case Op::kBarCluster:
      return cluster_barrier(w, g, i);
    case Op::kBarWarp:
    case Op::kShfl:
    case Op::kVote:
    case Op::kMatch:
    case Op::kRedux:
    case Op::kElect:
      return collective(w, group, i);
    case Op::kActivemask:
      for (int l = 0; l < kLanes; ++l) {
        if (g.mask >> l & 1) w.target(i.operands[0])[l] = g.mask;
      }
      break;
    case Op::kMbarrier:
      if (!mbarrier(w, i, g.mask)) return false;
      break;
    case Op::kTrap:
      fail(w, i, "trap", std::countr_zero(g.mask));
    case Op::kWgmma:
    case Op::kLdmatrix:
    case Op::kStmatrix:
    case Op::kMma:
    case Op::kSetmaxnreg:
      if (!whole_warp(w, i, g.mask)) return false;
      break;
    default:
      refuse(w, i);
  }
  g.state = Group::kReady;
  ++g.pc;
  return true;
}

// Instructions that all lanes of a warp execute at once.
bool Machine::whole_warp(Warp& w, const Instruction& i, u32 mask) {
  if (mask != w.live) return false;
  if (mask != kAllLanes) fail(w, i, "not all lanes of the warp are there");
  switch (i.op) {
    case Op::kWgmma:
      return wgmma(w, i);
    case Op::kLdmatrix:
      ldmatrix(w, i);
      break;
    case Op::kStmatrix:
      stmatrix(w, i);
      break;
    case Op::kMma:
      mma(w, i);
      break;
    default:
      return setmaxnreg(w, i);
  }
  return true;
}

// Waits until other warps have given back what this one takes.
bool Machine::setmaxnreg(Warp& w, const Instruction& i) {
  const auto wanted = static_cast<s64>(i.operands[0].value());
  if (wanted % 8 != 0 || wanted < 24 || wanted > 256) fail(w, i, "setmaxnreg: what it does not take");
  if (w.register_share == 0) fail(w, i, "setmaxnreg: ignored in a kernel without launch bounds");
  const s64 change = wanted - w.register_share;
  if (i.has("dec") ? change > 0 : change < 0)
    fail(w, i, "setmaxnreg: not in this direction from " + std::to_string(w.register_share));
  if (change * kLanes > w.block->spare_registers) return false;
  w.block->spare_registers -= change * kLanes;
  w.register_share = wanted;
  return true;
}

}  // namespace ptx
