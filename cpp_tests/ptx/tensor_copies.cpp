// cp.async.bulk.tensor: boxes of a tensor in global memory from and to shared memory.
#include <bit>
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

constexpr u32 kOffset = 0xffffff;  // of an address of shared memory, see addresses.cpp
constexpr int kMostDimensions = 5;

struct Coordinates {
  s64 of[kMostDimensions] = {};
};

// One element of a box.
struct Element {
  u32 shared;   // offset in the block's window
  u64 global;   // address
  bool inside;  // of the tensor
  bool tail;    // past the end of its row, in the row's last 16 bytes
};

template <class F>
void each_element(const TensorMap& map, const Coordinates& first, u32 box_at, F&& f) {
  u32 n[kMostDimensions] = {};
  for (u32 linear = 0;; ++linear) {
    Element e{swizzled(box_at + linear * map.element_bytes, map.swizzle), map.base, true, false};
    for (int r = 0; r < map.rank; ++r) {
      const s64 x = first.of[r] + static_cast<s64>(n[r]) * map.steps[r];
      const bool within = x >= 0 && static_cast<u64>(x) < map.sizes[r];
      if (r == 0 && x >= 0 && !within) {
        e.tail = static_cast<u64>(x) * map.element_bytes / 16 == (map.sizes[0] - 1) * map.element_bytes / 16;
      } else if (!within) {
        e.tail = false;
      }
      e.inside = e.inside && within;
      e.global += static_cast<u64>(x) * (r == 0 ? map.element_bytes : map.strides[r - 1]);
    }
    f(e);
    int r = 0;
    while (r < map.rank && ++n[r] == map.box[r]) n[r++] = 0;
    if (r == map.rank) return;
  }
}

u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.element_bytes;
  for (int r = 0; r < map.rank; ++r) bytes *= map.box[r];
  return bytes;
}

u64 value(Warp& w, const Operand& o, int lane) { return w.values(o)[lane] + static_cast<u64>(o.offset); }

TensorMap map_of(Machine& m, Warp& w, const Instruction& i, const Operand& o, int lane, int rank) {
  const u64 at = value(w, o, lane);
  if (at % 64 != 0) m.fail(w, i, "a tensor map that is not aligned to 64 bytes", lane);
  TensorMap map;
  std::memcpy(&map, reinterpret_cast<const u8*>(at), sizeof map);
  if (map.magic != kTensorMapMagic) m.fail(w, i, "not a tensor map", lane);
  if (map.rank != rank || static_cast<int>(o.sub.size()) != rank)
    m.fail(w, i, "a tensor map of another rank", lane);
  if (map.interleave != 0) m.refuse(w, i);
  return map;
}

Coordinates coordinates_of(Machine& m, Warp& w, const Instruction& i, const Operand& o, int lane,
                           const TensorMap& map) {
  Coordinates c;
  for (std::size_t r = 0; r < o.sub.size(); ++r) c.of[r] = static_cast<s32>(w.values(o.sub[r])[lane]);
  // Found on H100 by users of other compilers (docs/hardware.md, H1).
  if (m.settings.check_tma && c.of[0] * map.element_bytes % 16 != 0) {
    m.fail(w, i,
           "an innermost coordinate that is no multiple of 16 bytes: an illegal instruction on hardware",
           lane);
  }
  return c;
}

void check_box(Machine& m, Warp& w, const Instruction& i, u64 address, int lane) {
  if (address % 128 != 0) m.fail(w, i, "a box that is not aligned to 128 bytes", lane);
}

}  // namespace

u32 swizzled(u32 address, int width) {
  const u32 keep = width == 128 ? 7 : width == 64 ? 3 : width == 32 ? 1 : 0;
  return address ^ (((address >> 7) & keep) << 4);
}

// [to], [map, {coordinates}], [mbarrier] [, blocks]
void Machine::tensor_load(Warp& w, const Instruction& i, int lane, int rank) {
  const TensorMap map = map_of(*this, w, i, i.operands[1], lane, rank);
  const Coordinates first = coordinates_of(*this, w, i, i.operands[1], lane, map);
  const u32 bytes = box_bytes(map);
  const u64 to = value(w, i.operands[0], lane), barrier = value(w, i.operands[2], lane);
  check_box(*this, w, i, to, lane);
  u64 low, high;
  if (launch->overlaps && find_allocation(map.base, &low, &high))
    check_kernels_before(w, i, lane, low, By::kBulkRead);
  Block *home = nullptr, *barrier_home = nullptr;
  const auto box_at = static_cast<u32>(to & kOffset);
  shared_at(w, i, to, bytes, &home);
  shared_at(w, i, barrier, 8, &barrier_home);
  const bool multicast = i.has("multicast::cluster");
  const u32 blocks = multicast ? static_cast<u32>(value(w, i.operands[3], lane)) & 0xffff : 1u << home->rank;
  if (counter != nullptr) counter->box(map, first.of, true, static_cast<u32>(std::popcount(blocks)));
  for (u32 rank_of = 0; blocks >> rank_of != 0; ++rank_of) {
    if ((blocks >> rank_of & 1) == 0) continue;
    if (rank_of >= w.block->cluster->size()) fail(w, i, "multicast to a block that is not there", lane);
    Block* block = multicast ? (*w.block->cluster)[rank_of] : home;
    check_other_block(w, i, *block);
    Block* barrier_block = multicast ? block : barrier_home;
    u8* at = barrier_block->shared + (barrier & kOffset);
    note_bulk_write(w, i, lane, *block, box_at, bytes, barrier_block->offset(at));
    const auto run = [this, map, first, block, barrier_block, box_at, at, bytes, &w, &i, lane] {
      if (block->ended()) fail(w, i, "a box comes to a block that has ended", lane);
      if (settings.values)
        each_element(map, first, box_at, [&](const Element& e) {
          if (e.inside) {
            std::memcpy(block->shared + e.shared, reinterpret_cast<const u8*>(e.global), map.element_bytes);
          } else {
            std::memset(block->shared + e.shared, map.fill != 0 ? 0xff : 0, map.element_bytes);
          }
          block->dirty[e.shared / 16] = 0;
        });
      try {
        complete_bytes(*barrier_block, at, bytes);
      } catch (const Error& e) {
        fail(w, i, e.what(), lane);
      }
    };
    if (now()) {
      run();
      continue;
    }
    std::memset(block->shared + box_at, 0xff, bytes);  // until it is there
    loads.push_back({block, run, &i});
  }
}

// [map, {coordinates}], [from]
void Machine::tensor_store(Warp& w, const Instruction& i, int lane, int rank) {
  const TensorMap map = map_of(*this, w, i, i.operands[0], lane, rank);
  const Coordinates first = coordinates_of(*this, w, i, i.operands[0], lane, map);
  const u32 bytes = box_bytes(map);
  const u64 from = value(w, i.operands[1], lane);
  check_box(*this, w, i, from, lane);
  Block& block = *w.block;
  const u32 box_at = block.offset(shared_at(w, i, from, bytes));
  check_async_read(w, i, block, box_at, bytes);
  if (counter != nullptr) counter->box(map, first.of, false, 1);
  const auto write = [this, map, first, &block, box_at, &w, &i, lane] {
    if (settings.values)
      each_element(map, first, box_at, [&](const Element& e) {
        // Whole chunks of 16 bytes are written, also where a row ends within one (docs/hardware.md, H2).
        if (!e.inside && !(e.tail && settings.check_tma)) return;
        global(w, i, lane, e.global, map.element_bytes, By::kBulkWrite);
        std::memcpy(reinterpret_cast<u8*>(e.global), block.shared + e.shared, map.element_bytes);
      });
  };
  const bool late = !now();
  if (!late) write();
  note_access(w, i, lane, block, box_at, bytes, Races::Kind::kRead);
  const auto run = [this, write, late, &w, &i, lane, &block, box_at, bytes] {
    if (late) write();
    note_access(w, i, lane, block, box_at, bytes, Races::Kind::kRead);
  };
  w.bulk.items.push_back({lane, w.bulk.open[lane], run, &i});
}

}  // namespace ptx
