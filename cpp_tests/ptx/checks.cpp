// Rules that break no result at once: fences between the proxies, the order of accesses to shared memory, and
// registers that wgmma still uses.
#include "ptx/machine.hpp"

namespace ptx {

void Machine::wrote_shared(Warp& w, int lane, Block& b, const u8* at, u32 bytes) {
  if (!kernel->uses_async_proxy || !settings.check_proxy) return;
  const u32 first = b.offset(at);
  for (u32 granule = first / 16; granule <= (first + bytes - 1) / 16; ++granule) {
    b.dirty[granule] = static_cast<u32>(w.thread(lane)) + 1;
    w.unfenced.push_back({granule, lane});
  }
}

void Machine::check_async_read(Warp& w, const Instruction& i, Block& b, u32 at, u32 bytes) {
  if (!settings.check_proxy) return;
  for (u32 granule = at / 16; granule <= (at + bytes - 1) / 16; ++granule) {
    if (b.dirty[granule] == 0) continue;
    fail(w, i,
         "the asynchronous proxy reads shared memory at " + std::to_string(granule * 16) + " that thread " +
             std::to_string(b.dirty[granule] - 1) + " wrote without fence.proxy.async");
  }
}

void Machine::fence_proxy(Warp& w, u32 mask) {
  std::erase_if(w.unfenced, [&](const auto& write) {
    const auto& [granule, lane] = write;
    if ((mask >> lane & 1) == 0) return false;
    u32& dirty = w.block->dirty[granule];
    if (dirty == static_cast<u32>(w.thread(lane)) + 1) dirty = 0;
    return true;
  });
}

// ---- order of accesses

Races::Access Machine::access_of(Warp& w, const Instruction& i, int lane, u32 at, u32 bytes,
                                 Races::Kind kind) const {
  return {w.actor, lane, at, bytes, kind, static_cast<u32>(steps), &i};
}

void Machine::report_race(Warp& w, const Instruction& i, int lane, u32 at, const char* problem,
                          const Instruction* other) const {
  if (problem == nullptr) return;
  fail(w, i, "a race in shared memory at " + std::to_string(at) + ": " + problem + "\n  " + where(*other),
       lane);
}

void Machine::note_access(Warp& w, const Instruction& i, int lane, Block& b, u32 at, u32 bytes,
                          Races::Kind kind) {
  if (b.races == nullptr) return;
  const Instruction* other = nullptr;
  const char* problem = b.races->access(access_of(w, i, lane, b.races_at + at, bytes, kind), &other);
  report_race(w, i, lane, at, problem, other);
}

// cp.async of a lane: when it begins, and when it is waited for.
void Machine::note_copy(Warp& w, const Instruction& i, int lane, Block& b, u32 at, u32 bytes, bool done) {
  if (b.races == nullptr) return;
  const Races::Access access = access_of(w, i, lane, b.races_at + at, bytes, Races::Kind::kWrite);
  if (done) return b.races->copy_done(access);
  const Instruction* other = nullptr;
  const char* problem = b.races->begin_copy(access, &other);
  report_race(w, i, lane, at, problem, other);
}

void Machine::note_bulk_write(Warp& w, const Instruction& i, int lane, Block& b, u32 at, u32 bytes,
                              u32 barrier) {
  if (b.races == nullptr) return;
  const Instruction* other = nullptr;
  const Races::Access access = access_of(w, i, lane, b.races_at + at, bytes, Races::Kind::kWrite);
  const char* problem = b.races->bulk_write(access, b.races_at + barrier, &other);
  report_race(w, i, lane, at, problem, other);
}

// ---- wgmma

void Machine::check_in_flight(Warp& w, const Instruction& i, u32 mask) {
  if (i.op == Op::kWgmma) return;
  const auto& o = i.operands;
  if (i.op == Op::kMov && o.size() == 2 && o[0].kind == Operand::kRegister &&
      o[1].kind == Operand::kRegister) {
    // ptxas gives both the same register; the sums keep being under way.
    u32& to = w.in_flight[static_cast<std::size_t>(o[0].index)];
    const u32 from = w.in_flight[static_cast<std::size_t>(o[1].index)];
    if ((to != 0 || from != 0) && !w.product_events.empty())
      w.product_events.push_back({0, o[0].index, o[1].index, mask});
    to = from;
    return;
  }
  const auto look = [&](const Operand& operand, bool written) {
    if (operand.index < 0 || w.in_flight[static_cast<std::size_t>(operand.index)] == 0) return;
    fail(w, i, std::string(written ? "writes" : "reads") + " a register of sums while wgmma is under way");
  };
  for (std::size_t n = 0; n < o.size(); ++n) {
    look(o[n], n == 0 && i.op != Op::kSt);
    for (const Operand& s : o[n].sub) look(s, false);
  }
}

}  // namespace ptx
