// What the emulator's own files share: threads, blocks, clusters and the scheduler's state.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/engine.hpp"

namespace simt {

inline constexpr std::size_t kStaticBytes = 64 << 10;  // of a block's static shared memory
inline constexpr unsigned kLanes = 32;
inline constexpr int kBarriers = 16;

struct Range {
  const char* begin;
  const char* end;
  std::shared_ptr<Deferred> copy;  // that writes there, or null: it is written
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block = nullptr;
  unsigned linear = 0;
  Index index{};
  bool done = false;
  const char* waiting_for = nullptr;
  const void* key = nullptr;
  Place where;
  Groups copies{"cp.async"};
  Groups bulks{"cp.async.bulk"};
  Groups products{"wgmma"};
  std::vector<Range> unfenced;  // generic writes that the asynchronous proxy may not see
  std::vector<const void*> unfenced_barriers;
  std::uint64_t priority = 0;  // the same for all threads of a warp
  bool waited_for_previous = false;
  bool fenced_global = false;  // since then
};

// Lanes of a warp that are meeting.
struct Meeting {
  std::uint32_t mask = 0;
  std::uint32_t arrived = 0;
  unsigned phase = 0;
  const char* kind = nullptr;
  void* pointers[kLanes] = {};
  Thread* threads[kLanes] = {};
};

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
};

// Blocks that run at the same time and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  unsigned live = 0;  // threads that have not ended
  Barrier barrier;
  bool met = false;  // all its blocks have begun, and everybody may know it
};

struct Block {
  Index index{};
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in it
  unsigned live = 0;
  std::vector<Thread*> threads;
  std::vector<Meeting> meetings;  // by warp and lowest lane of the mask
  Barrier barriers[kBarriers];
  char* dynamic = nullptr;
  std::size_t dynamic_bytes = 0;
  char* statics = nullptr;
  std::size_t statics_used = 0;
  std::map<const void*, std::size_t> sites;

  explicit Block(std::size_t bytes);
  ~Block();
  Block(const Block&) = delete;
};
// When asynchronous work of a kind runs: at once, at any time, or only when every thread waits for it.
enum class When { kAtOnce, kSometime, kLast };

// How a launch does its asynchronous work.
struct Manner {
  When of[4];   // by Kind
  int percent;  // chance that one piece of deferred work (kSometime) runs when a thread yields
};

struct Engine {
  Fiber host;
  Thread* current = nullptr;  // null on the host's own stack
  std::vector<Thread*> ready;
  std::vector<Thread*> waiting;
  std::vector<Block*> running;
  std::vector<std::shared_ptr<Deferred>> sometime;
  std::vector<std::shared_ptr<Deferred>> last;  // loads only: nobody is woken by the others
  std::vector<std::unique_ptr<Fiber>> spare;
  Index grid{}, block{};
  unsigned cluster = 1;  // blocks of one
  const std::function<void()>* body = nullptr;
  std::uint64_t state = 1;
  std::uint64_t switches = 0;
  Manner manner{};
  bool by_priority = false;  // some warps run far ahead of the others
  unsigned live = 0;
  std::string error;

  std::uint64_t next_random() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  bool chance(int percent) { return settings().random && static_cast<int>(next_random() % 100) < percent; }
};

// One per OS thread: fibers never move between them, so emulations on several threads do not meet.
Engine& engine();

std::string at(const Place& where);  // "file:line"

// Gives the processor to another thread until make_ready(); `what` appears in the report of a deadlock.
void park(const char* what, const Place& where, const void* key);
void make_ready(Thread* thread);

// A thread of the cluster has ended, which its barrier does not wait for any more.
void leave_cluster(Cluster& cluster);

}  // namespace simt
