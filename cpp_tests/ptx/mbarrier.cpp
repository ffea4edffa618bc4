// mbarriers: arrivals and bytes that a phase waits for.
#include <bit>
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

constexpr u64 kMagic = 2;
constexpr s64 kMost = (1 << 20) - 1;  // arrivals, and bytes that are expected

// The phase is complete when nothing is missing.
void store_word(Block& block, u8* p, MbarrierWord m) {
  if (m.pending == 0 && m.bytes == 0) {
    m.phase ^= 1;
    m.pending = m.count;
    if (block.races != nullptr) block.races->complete(block.races_at + block.offset(p));
  }
  std::memcpy(p, &m, sizeof m);
}

Block& block_of(Warp& w, const u8* p) {
  for (Block* b : *w.block->cluster) {
    if (b->holds(p)) return *b;
  }
  return *w.block;
}

}  // namespace

MbarrierWord load_mbarrier(const u8* at) {
  MbarrierWord m;
  std::memcpy(&m, at, sizeof m);
  if (m.magic != kMagic) throw Error("mbarrier: not initialised, or overwritten");
  return m;
}

void Machine::complete_bytes(Block& block, u8* barrier, s64 bytes) {
  MbarrierWord m = load_mbarrier(barrier);
  if (m.bytes - bytes < -kMost) throw Error("mbarrier: too many bytes before they are expected");
  m.bytes -= bytes;
  store_word(block, barrier, m);
}

u8* Machine::mbarrier_at(Warp& w, const Instruction& i, const Operand& o, int lane) {
  const u64 at = w.values(o)[lane] + static_cast<u64>(o.offset);
  if (at % 8 != 0) fail(w, i, "mbarrier: misaligned", lane);
  if (i.space != Space::kGeneric) return shared_at(w, i, at, 8);
  for (Block* b : *w.block->cluster) {
    if (b->holds(reinterpret_cast<const void*>(at))) return reinterpret_cast<u8*>(at);
  }
  fail(w, i, "mbarrier: not in shared memory", lane);
}

// False: it waits.
bool Machine::mbarrier(Warp& w, const Instruction& i, u32 mask) {
  const std::string& what = i.modifiers[0];
  if (what == "try_wait" || what == "test_wait") return mbarrier_wait(w, i, mask);
  lanes(mask, [&](int l) {
    if (what == "init") {
      const u64 count = w.values(i.operands[1])[l] & 0xffffffffu;
      if (count < 1 || count > static_cast<u64>(kMost)) fail(w, i, "mbarrier: count", l);
      MbarrierWord m{};
      m.count = m.pending = count & kMost;
      m.magic = kMagic;
      std::memcpy(mbarrier_at(w, i, i.operands[0], l), &m, sizeof m);
    } else if (what == "inval") {
      std::memset(mbarrier_at(w, i, i.operands[0], l), 0, 8);
    } else if (what == "arrive" || what == "expect_tx" || what == "complete_tx") {
      mbarrier_arrive(w, i, l);
    } else {
      refuse(w, i);
    }
  });
  return true;
}

// mbarrier.{try_wait,test_wait}[.parity] done, [barrier], state or parity
bool Machine::mbarrier_wait(Warp& w, const Instruction& i, u32 mask) {
  const u64* state = w.values(i.operands[2]);
  const bool by_parity = i.has("parity");
  u32 done = 0;
  lanes(mask, [&](int l) {
    try {
      const MbarrierWord m = load_mbarrier(mbarrier_at(w, i, i.operands[1], l));
      if (by_parity && (state[l] & 0xffffffffu) > 1)
        fail(w, i, "mbarrier: a parity that is neither 0 nor 1", l);
      done |= static_cast<u32>(m.phase != (by_parity ? state[l] & 1 : state[l] >> 63)) << l;
    } catch (const Error& e) {
      fail(w, i, e.what(), l);
    }
  });
  // try_wait may give up; the machine lets it do so now and then, so that loops around it are run.
  const bool gives_up = settings.when == When::kRandom && chance(64);
  if (done != mask && i.modifiers[0] == "try_wait" && !gives_up) return false;
  lanes(mask, [&](int l) {
    w.target(i.operands[0])[l] = done >> l & 1;
    u8* at = mbarrier_at(w, i, i.operands[1], l);
    if ((done >> l & 1) != 0 && w.block->races != nullptr)
      w.block->races->wait(w.actor, w.block->races_at + w.block->offset(at));
  });
  return true;
}

// mbarrier.arrive[.expect_tx] [state,] [barrier] [, count or bytes]; mbarrier.{expect_tx,complete_tx}
// [barrier], bytes
void Machine::mbarrier_arrive(Warp& w, const Instruction& i, int lane) {
  const bool arrives = i.modifiers[0] == "arrive";
  const bool expects = i.has("expect_tx");
  const std::size_t first = i.operands[0].kind == Operand::kMemory ? 0 : 1;
  u8* at = mbarrier_at(w, i, i.operands[first], lane);
  try {
    MbarrierWord m = load_mbarrier(at);
    if (i.operands[0].kind == Operand::kRegister) w.target(i.operands[0])[lane] = u64{m.phase} << 63;
    const bool more = i.operands.size() > first + 1;
    const s64 extra = more ? static_cast<s64>(w.values(i.operands[first + 1])[lane] & 0xffffffffu) : 1;
    if (expects && m.bytes + extra > kMost) fail(w, i, "mbarrier: more bytes than it counts", lane);
    if (expects) m.bytes += extra;
    if (i.has("complete_tx")) m.bytes -= extra;
    const auto arrivals = static_cast<u64>(!arrives ? 0 : expects ? 1 : extra);
    if (m.pending < arrivals) fail(w, i, "mbarrier: more arrivals than it is for", lane);
    m.pending -= arrivals;
    Block& block = block_of(w, at);
    if (arrives && block.races != nullptr) block.races->arrive(w.actor, block.races_at + block.offset(at));
    store_word(block, at, m);
  } catch (const Error& e) {
    fail(w, i, e.what(), lane);
  }
}

}  // namespace ptx
