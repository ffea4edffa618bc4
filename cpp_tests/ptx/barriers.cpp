// Barriers of a block and of a cluster.
#include <bit>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

// bar[.cta].{sync,arrive} id[, count]; bar.red.op d, id[, count], p
struct BarrierOperands {
  const Operand* id;
  const Operand* count = nullptr;
  const Operand* value = nullptr;

  explicit BarrierOperands(const Instruction& i) {
    const auto& o = i.operands;
    const bool reduces = i.has("red");
    id = &o[reduces ? 1 : 0];
    if (reduces) value = &o.back();
    if (reduces ? o.size() == 4 : o.size() > 1) count = &o[reduces ? 2 : 1];
  }
};

}  // namespace

bool Machine::barrier(Warp& w, Group& g, const Instruction& i) {
  // "bar" is "barrier" with .aligned: all lanes of the warp execute it at once.
  const bool aligned = i.text.find("barrier") == std::string::npos || i.has("aligned");
  if (aligned && g.mask != w.live) return false;
  const BarrierOperands o(i);
  const int first = std::countr_zero(g.mask);
  const u64 id = w.values(*o.id)[first];
  const u32 expected = o.count != nullptr ? static_cast<u32>(w.values(*o.count)[first]) : 0;
  if (id > 15) fail(w, i, "a barrier beyond 15");
  if (expected % kLanes != 0) fail(w, i, "a barrier for a part of a warp");
  Block::Barrier& b = w.block->barriers[id];
  if (b.arrived != 0 && b.expected != expected) fail(w, i, "a barrier with different numbers of threads");
  b.expected = expected;
  if (w.block->races != nullptr) w.block->races->release(w.actor, b.clock);
  b.arrived += kLanes;
  if (expected != 0 && b.arrived > expected) fail(w, i, "more threads at a barrier than it is for");
  if (o.value != nullptr) {
    lanes(g.mask, [&](int l) {
      const bool v = ((w.values(*o.value)[l] & 1) != 0) != o.value->negated;
      b.sum += v ? 1 : 0;
      b.all = b.all && v;
      b.any = b.any || v;
    });
  }
  if (i.has("arrive")) {
    ++g.pc;
    g.state = Group::kReady;
  } else {
    g.state = Group::kAtBarrier;
    g.barrier = static_cast<int>(id);
  }
  release_barrier(*w.block, static_cast<int>(id));
  return true;
}

void Machine::release_barrier(Block& block, int id) {
  Block::Barrier& b = block.barriers[id];
  if (b.arrived == 0) return;
  u32 expected = b.expected;
  if (expected == 0) {  // all threads that have not ended
    for (const Warp& w : block.warps) expected += w.live != 0 ? kLanes : 0;
  }
  if (b.arrived < expected) return;
  for (Warp& w : block.warps) {
    for (Group& g : w.groups) {
      if (g.state != Group::kAtBarrier || g.barrier != id) continue;
      const Instruction& i = kernel->code[static_cast<std::size_t>(g.pc)];
      if (i.has("red")) {
        const u64 v = i.has("popc") ? b.sum : i.has("and") ? b.all : b.any;
        lanes(g.mask, [&](int l) { w.target(i.operands[0])[l] = v; });
      }
      if (block.races != nullptr) {
        block.races->acquire(w.actor, b.clock);
        block.races->meet(w.actor, g.mask, w.live, static_cast<u32>(steps));
      }
      g.state = Group::kReady;
      ++g.pc;
    }
  }
  b = Block::Barrier{};
}

// Waits until every warp of the cluster that has not ended has arrived as often as this one. Lanes of a warp
// that arrive apart are let meet first, with .aligned or without.
bool Machine::cluster_barrier(Warp& w, Group& g, const Instruction& i) {
  if (g.mask != w.live) return false;
  if (i.has("arrive")) {
    ++w.cluster_rounds;
    if (w.block->races != nullptr) w.block->races->release(w.actor, w.block->races->cluster());
  } else {
    for (const Block* b : *w.block->cluster) {
      for (const Warp& x : b->warps) {
        if (x.live != 0 && x.cluster_rounds < w.cluster_rounds) return false;
      }
    }
    if (Races* const races = w.block->races.get(); races != nullptr) {
      races->acquire(w.actor, races->cluster());
      races->meet(w.actor, g.mask, w.live, static_cast<u32>(steps));
    }
  }
  g.state = Group::kReady;
  ++g.pc;
  return true;
}

// Before the cluster has met another block may not have begun, and its memory is gone when it has ended.
void Machine::check_other_block(Warp& w, const Instruction& i, const Block& other) const {
  if (&other == w.block) return;
  if (w.cluster_rounds == 0) fail(w, i, "shared memory of a block of the cluster that may not have begun");
  if (other.ended()) fail(w, i, "shared memory of a block of the cluster that has ended");
}

}  // namespace ptx
