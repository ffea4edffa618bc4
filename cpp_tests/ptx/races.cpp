// Vector clocks by warp, and meetings of the lanes within one.
#include "ptx/races.hpp"

namespace ptx {

namespace {

constexpr u32 kCell = 2;  // bytes

u32 first_cell(const Races::Access& a) { return a.at / kCell; }
u32 last_cell(const Races::Access& a) { return (a.at + a.bytes - 1) / kCell; }

}  // namespace

Races::Races(u32 bytes, std::size_t warps)
    : warps_(warps),
      clocks_(warps),
      meetings_(warps),
      writes_(bytes / kCell + 1),
      reads_(writes_.size() * warps) {
  if (warps >= kActors) throw Error("more warps in a cluster than the check for races has room for");
  for (std::size_t w = 0; w < warps; ++w) clocks_[w].of[w] = 1;
}

// ---- order

void Races::release(int warp, Clock& to) {
  Clock& own = clocks_[static_cast<std::size_t>(warp)];
  to.join(own);
  ++own.of[static_cast<std::size_t>(warp)];
}

void Races::meet(int warp, u32 mask, u32 live, u32 time) {
  Meetings& m = meetings_[static_cast<std::size_t>(warp)];
  if ((live & ~mask) == 0) {
    m.all = time;
    return;
  }
  for (std::size_t a = 0; a < 32; ++a) {
    for (std::size_t b = 0; b < 32; ++b) {
      if ((mask >> a & mask >> b & 1) != 0) m.pair[a][b] = time;
    }
  }
}

bool Races::met(int warp, int a, int b, u32 since) const {
  const Meetings& m = meetings_[static_cast<std::size_t>(warp)];
  return m.all >= since || m.pair[static_cast<std::size_t>(a)][static_cast<std::size_t>(b)] >= since;
}

Races::Barrier& Races::barrier_at(u32 offset) {
  const auto [found, fresh] = barriers_.try_emplace(offset);
  if (fresh) {
    const std::size_t actor = warps_ + barriers_.size() - 1;
    if (actor >= kActors) throw Error("more mbarriers than the check for races has room for");
    found->second.actor = static_cast<u8>(actor);
  }
  return found->second;
}

void Races::complete(u32 barrier) {
  Barrier& b = barrier_at(barrier);
  b.completed.join(b.arrived);
}

// ---- accesses

const char* Races::conflict(const Access& a, u32 cell, const Instruction** other) const {
  const auto lane_races = [&](int warp, int lane, u32 time) {
    return a.lane != kAllOfWarp && warp == a.warp && lane != a.lane && time != a.time &&
           !met(warp, a.lane, lane, time);
  };
  const Write& w = writes_[cell];
  if (w.by != nullptr && !(w.atomic && a.kind == Kind::kAtomic)) {
    *other = w.by;
    if (w.under_way) return "a copy there is under way";
    if (!seen(a.warp, w.actor, w.tick))
      return "a write there by another warp or copy is not ordered before it";
    if (lane_races(w.actor, w.lane, w.time))
      return "a write there by another lane of the warp is not ordered before it";
  }
  if (a.kind == Kind::kRead) return nullptr;
  for (std::size_t warp = 0; warp < warps_; ++warp) {
    const Read& r = read_of(cell, warp);
    if (r.lanes == 0) continue;
    *other = r.by;
    if (!seen(a.warp, static_cast<int>(warp), r.tick))
      return "a read there by another warp is not ordered before it";
    if (static_cast<int>(warp) != a.warp) continue;
    for (int l = 0; l < 32; ++l) {
      if ((r.lanes >> l & 1) != 0 && lane_races(a.warp, l, r.time))
        return "a read there by another lane of the warp is not ordered before it";
    }
  }
  return nullptr;
}

void Races::note(const Access& a, u32 cell, const Write& write) {
  if (a.kind != Kind::kRead) {
    writes_[cell] = write;
    return;
  }
  Read& r = reads_[cell * warps_ + static_cast<std::size_t>(a.warp)];
  const u32 lanes = a.lane == kAllOfWarp ? 0xffffffffu : 1u << a.lane;
  const bool fresh = a.lane == kAllOfWarp || meetings_[static_cast<std::size_t>(a.warp)].all >= r.time;
  r = {tick(a.warp), a.time, fresh && r.time != a.time ? lanes : r.lanes | lanes, a.by};
}

const char* Races::access(const Access& a, const Instruction** other) {
  const Write write{
      a.by,  tick(a.warp),           a.time, static_cast<u8>(a.warp), static_cast<u8>(std::max(a.lane, 0)),
      false, a.kind == Kind::kAtomic};
  for (u32 cell = first_cell(a); cell <= last_cell(a); ++cell) {
    if (const char* problem = conflict(a, cell, other)) return problem;
    note(a, cell, write);
  }
  return nullptr;
}

const char* Races::begin_copy(const Access& a, const Instruction** other) {
  const char* problem = access(a, other);
  for (u32 cell = first_cell(a); cell <= last_cell(a); ++cell) writes_[cell].under_way = true;
  return problem;
}

void Races::copy_done(const Access& a) {
  for (u32 cell = first_cell(a); cell <= last_cell(a); ++cell) {
    Write& w = writes_[cell];
    w.under_way = false;
    w.tick = tick(a.warp);
    w.time = a.time;
  }
}

const char* Races::bulk_write(const Access& a, u32 barrier, const Instruction** other) {
  Barrier& b = barrier_at(barrier);
  b.arrived.of[b.actor] = ++b.tick;
  const Write write{a.by, b.tick, a.time, b.actor, 0, false, false};
  for (u32 cell = first_cell(a); cell <= last_cell(a); ++cell) {
    if (const char* problem = conflict(a, cell, other)) return problem;
    note(a, cell, write);
  }
  return nullptr;
}

}  // namespace ptx
