// cp.async.bulk without tensor maps, and the groups that bulk stores are waited for by.
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

void Machine::bulk(Warp& w, const Instruction& i, u32 mask) {
  lanes(mask, [&](int l) {
    if (i.has("commit_group")) {
      ++w.bulk.open[l];
    } else if (i.has("wait_group")) {
      w.bulk.finish(l, static_cast<u32>(i.operands[0].value()));
    } else {
      bulk_lane(w, i, l);
    }
  });
}

// cp.async.bulk.{prefetch...,tensor.Nd.to.from...,to.from...}
void Machine::bulk_lane(Warp& w, const Instruction& i, int lane) {
  if (i.has("prefetch")) return;
  if (i.text.find("im2col") != std::string::npos || i.text.find("reduce") != std::string::npos) refuse(w, i);
  const bool tensor = i.has("tensor");
  const std::size_t to = tensor ? 4 : 2;
  const bool load = i.modifiers[to].starts_with("shared");
  if (tensor) {
    const int rank = i.modifiers[3][0] - '0';
    return load ? tensor_load(w, i, lane, rank) : tensor_store(w, i, lane, rank);
  }
  if (load && i.modifiers[to + 1] != "global") refuse(w, i);
  return load ? bulk_load(w, i, lane) : bulk_store(w, i, lane);
}

// [to], [from], bytes, [mbarrier]
void Machine::bulk_load(Warp& w, const Instruction& i, int lane) {
  const auto value = [&](std::size_t n) {
    return w.values(i.operands[n])[lane] + static_cast<u64>(i.operands[n].offset);
  };
  const auto bytes = static_cast<u32>(value(2));
  const u64 to = value(0), from = value(1);
  if (to % 16 != 0 || from % 16 != 0 || bytes % 16 != 0) fail(w, i, "bulk copy: misaligned", lane);
  Block* block = nullptr;
  u8* p = shared_at(w, i, to, bytes, &block);
  u8* barrier = shared_at(w, i, value(3), 8);
  global(w, i, lane, from, bytes, By::kBulkRead);
  if (counter != nullptr) counter->bulk(from, bytes, true);
  note_bulk_write(w, i, lane, *block, block->offset(p), bytes, block->offset(barrier));
  const auto run = [this, p, from, bytes, barrier, block] {
    std::memcpy(p, reinterpret_cast<const u8*>(from), bytes);
    complete_bytes(*block, barrier, bytes);
  };
  if (now()) return run();
  std::memset(p, 0xff, bytes);  // until it is there
  loads.push_back({block, run, &i});
}

// [to], [from], bytes
void Machine::bulk_store(Warp& w, const Instruction& i, int lane) {
  const auto value = [&](std::size_t n) {
    return w.values(i.operands[n])[lane] + static_cast<u64>(i.operands[n].offset);
  };
  const auto bytes = static_cast<u32>(value(2));
  const u64 to = value(0), from = value(1);
  if (to % 16 != 0 || from % 16 != 0 || bytes % 16 != 0) fail(w, i, "bulk copy: misaligned", lane);
  u8* p = shared_at(w, i, from, bytes);
  global(w, i, lane, to, bytes, By::kBulkWrite);
  if (counter != nullptr) counter->bulk(to, bytes, false);
  check_async_read(w, i, *w.block, w.block->offset(p), bytes);
  Block& block = *w.block;
  const bool late = !now();
  const auto write = [p, to, bytes] { std::memcpy(reinterpret_cast<u8*>(to), p, bytes); };
  if (!late) write();
  note_access(w, i, lane, block, block.offset(p), bytes, Races::Kind::kRead);
  const auto run = [=, this, &w, &i, &block] {
    if (late) write();
    note_access(w, i, lane, block, block.offset(p), bytes, Races::Kind::kRead);
  };
  w.bulk.items.push_back({lane, w.bulk.open[lane], run, &i});
}

}  // namespace ptx
