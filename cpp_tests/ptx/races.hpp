// Happens-before in the shared memory of the blocks of a cluster, one behind the other: two accesses to a
// place, one of them a write, must be ordered by a barrier, an mbarrier or a wait, in whatever order they
// happened here.
#pragma once

#include <algorithm>
#include <array>

#include "ptx/program.hpp"

namespace ptx {

// Who accesses shared memory: the warps of the cluster, and for each mbarrier the bulk copies that it counts.
constexpr int kActors = 64;

// How much of each actor's work has been seen.
struct Clock {
  std::array<u32, kActors> of{};
  void join(const Clock& other) {
    for (std::size_t a = 0; a < kActors; ++a) of[a] = std::max(of[a], other.of[a]);
  }
};

class Races {
 public:
  Races(u32 bytes, std::size_t warps);

  enum class Kind : u8 { kRead, kWrite, kAtomic };
  static constexpr int kAllOfWarp = -1;  // as a lane: what the warp does as one, wgmma
  struct Access {
    int warp;
    int lane;
    u32 at, bytes;
    Kind kind;
    u32 time;  // when the instruction is executed
    const Instruction* by;
  };
  // Notes it; returns what is not ordered before it, or null. `problem` says what kind it is of.
  const char* access(const Access&, const Instruction** other);
  // The same for a write that is under way until copy_done(): cp.async.
  const char* begin_copy(const Access&, const Instruction** other);
  void copy_done(const Access&);
  // For a write that an mbarrier tells of: a bulk copy.
  const char* bulk_write(const Access&, u32 barrier, const Instruction** other);

  // What a warp has done is published to `to`; what it does from now on is not.
  void release(int warp, Clock& to);
  void acquire(int warp, const Clock& from) { clocks_[static_cast<std::size_t>(warp)].join(from); }
  // Lanes of a warp see what the others of them did.
  void meet(int warp, u32 mask, u32 live, u32 time);
  // What warps publish at the barrier of the cluster. One clock for all its rounds: a warp that waits late
  // sees more than it may.
  Clock& cluster() { return cluster_; }
  // mbarriers, by their offset
  void arrive(int warp, u32 barrier) { release(warp, barrier_at(barrier).arrived); }
  void complete(u32 barrier);  // a phase
  void wait(int warp, u32 barrier) { acquire(warp, barrier_at(barrier).completed); }

 private:
  struct Write {
    const Instruction* by = nullptr;  // null: never
    u32 tick = 0, time = 0;
    u8 actor = 0, lane = 0;
    bool under_way = false, atomic = false;
  };
  struct Read {
    u32 tick = 0, time = 0;
    u32 lanes = 0;  // that read then, or before and have not met since
    const Instruction* by = nullptr;
  };
  struct Barrier {
    u8 actor = 0;
    u32 tick = 0;
    Clock arrived, completed;
  };
  struct Meetings {
    u32 all = 0;  // when all lanes met last
    std::array<std::array<u32, 32>, 32> pair{};
  };
  Barrier& barrier_at(u32 offset);
  const char* conflict(const Access&, u32 cell, const Instruction** other) const;
  bool met(int warp, int a, int b, u32 since) const;
  void note(const Access&, u32 cell, const Write& write);
  u32 tick(int warp) const {
    return clocks_[static_cast<std::size_t>(warp)].of[static_cast<std::size_t>(warp)];
  }
  bool seen(int warp, int actor, u32 tick) const {
    return clocks_[static_cast<std::size_t>(warp)].of[static_cast<std::size_t>(actor)] >= tick;
  }
  const Read& read_of(u32 cell, std::size_t warp) const { return reads_[cell * warps_ + warp]; }

  std::size_t warps_;
  std::vector<Clock> clocks_;
  std::vector<Meetings> meetings_;
  std::vector<Write> writes_;  // of two bytes each
  std::vector<Read> reads_;    // of each warp
  std::map<u32, Barrier> barriers_;
  Clock cluster_;
};

}  // namespace ptx
