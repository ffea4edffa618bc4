// Addresses: which memory they are in, and whether the kernel may use it.
#include <cstdio>

#include "ptx/machine.hpp"

namespace ptx {

namespace {

// Addresses of shared memory: the offset in the block's window, and above it 1 + the rank of another block.
constexpr int kRankShift = 24;
constexpr u32 kOffset = (1u << kRankShift) - 1;

std::map<u64, u64>& allocations() {  // end -> begin
  static std::map<u64, u64> all;
  return all;
}

bool within(const void* p, const std::vector<u8>& memory) {
  return reinterpret_cast<u64>(p) - reinterpret_cast<u64>(memory.data()) < memory.size();
}

}  // namespace

void note_allocation(const void* p, std::size_t bytes) {
  allocations()[reinterpret_cast<u64>(p) + bytes] = reinterpret_cast<u64>(p);
}

bool forget_allocation(const void* p) {
  for (auto a = allocations().begin(); a != allocations().end(); ++a) {
    if (a->second != reinterpret_cast<u64>(p)) continue;
    allocations().erase(a);
    return true;
  }
  return false;
}

bool find_allocation(u64 at, u64* low, u64* high) {
  const auto f = allocations().upper_bound(at);
  if (f == allocations().end() || at < f->second) return false;
  *low = f->second;
  *high = f->first;
  return true;
}

u8* Machine::shared_at(Warp& w, const Instruction& i, u64 at, u32 bytes, Block** whose) {
  const auto address = static_cast<u32>(at);
  Block* b = w.block;
  if (const u32 tag = address >> kRankShift; tag != 0) {
    if (tag > b->cluster->size()) fail(w, i, "an address of shared memory of no block in the cluster");
    b = (*b->cluster)[tag - 1];
    check_other_block(w, i, *b);
  }
  const u32 offset = address & kOffset;
  if (offset < kSharedBase || offset + bytes > b->shared_bytes) {
    fail(w, i,
         "shared memory: offset " + std::to_string(offset) + ", " + std::to_string(bytes) + " bytes, of " +
             std::to_string(b->shared_bytes));
  }
  if (whose != nullptr) *whose = b;
  return b->shared + offset;
}

// Memory that was allocated or belongs to the module.
u8* Machine::global(Warp& w, const Instruction& i, int lane, u64 at, u32 bytes, By by) {
  auto* p = reinterpret_cast<u8*>(at);
  const bool writes = by == By::kWrite || by == By::kBulkWrite;
  const bool same = at >= w.last_low && at + bytes <= w.last_high;
  if (same && !launch->overlaps && (w.last_written || !writes)) return p;
  u64 low, high;
  if (find_allocation(at, &low, &high) && at + bytes <= high) {
    if (launch->overlaps) check_kernels_before(w, i, lane, low, by);
    if (by == By::kBulkWrite) written.by_bulk_stores.insert(low);
    if (by == By::kWrite) written.by_threads.insert(low);
    w.last_written = by == By::kWrite || (w.last_written && low == w.last_low);
    w.last_low = low;
    w.last_high = high;
    return p;
  }
  for (const auto& [name, g] : kernel->module->globals) {
    if (p >= g.data && p + bytes <= g.data + std::max<std::size_t>(g.size, 16)) return p;
  }
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(at));
  fail(w, i,
       std::string(writes ? "a write" : "a read") + " of global memory outside every allocation: " + text,
       lane);
}

// A launch that may overlap others touches nothing of theirs before it has waited for them, and TMA sees what
// their threads wrote only after a proxy fence (docs/hardware.md).
void Machine::check_kernels_before(Warp& w, const Instruction& i, int lane, u64 allocation, By by) {
  if (!launch->before.holds(allocation)) return;
  if ((w.waited >> lane & 1) == 0)
    fail(w, i, "global memory that the kernel before wrote, without griddepcontrol.wait of this thread",
         lane);
  if (by == By::kBulkRead && settings.check_proxy && launch->before.by_threads.contains(allocation) &&
      (w.fenced_global >> lane & 1) == 0) {
    fail(w, i, "a bulk copy of what threads of the kernel before wrote, without fence.proxy.async.global",
         lane);
  }
}

u8* Machine::address(Warp& w, const Instruction& i, int lane, Space space, u64 at, u32 bytes,
                     Races::Kind kind) {
  const bool write = kind != Races::Kind::kRead;
  if (at % bytes != 0)
    fail(w, i, "misaligned address " + std::to_string(at) + " for " + std::to_string(bytes) + " bytes", lane);
  if (space == Space::kShared) {
    Block* whose = nullptr;
    u8* p = shared_at(w, i, at, bytes, &whose);
    note_access(w, i, lane, *whose, whose->offset(p), bytes, kind);
    if (write) wrote_shared(w, lane, *whose, p, bytes);
    return p;
  }
  auto* p = reinterpret_cast<u8*>(at);
  if (space == Space::kParam || space == Space::kLocal || space == Space::kConst) return p;
  if (space == Space::kGeneric) {
    if (within(p, kernel->param_memory) || within(p, w.local)) return p;
    for (Block* b : *w.block->cluster) {
      if (!b->holds(p)) continue;
      note_access(w, i, lane, *b, b->offset(p), bytes, kind);
      if (write) wrote_shared(w, lane, *b, p, bytes);
      return p;
    }
  }
  return global(w, i, lane, at, bytes, write ? By::kWrite : By::kRead);
}

}  // namespace ptx
