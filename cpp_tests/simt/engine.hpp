// The SIMT emulator: runs a CUDA grid on the CPU, one fiber per CUDA thread, in an order that a seed decides.
//
// What is emulated is what a kernel may rely on, and nothing more: threads run in any order, barriers and
// warp collectives are the only meetings, asynchronous copies and products happen late and in any order,
// shared memory begins as NaN. Whatever breaks a rule stops the launch with an Error that says where.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/fiber.hpp"

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Place = std::source_location;

struct Index {
  unsigned x, y, z;
};

// How the next launches of this OS thread run.
struct Settings {
  std::uint64_t seed = 1;
  std::uint64_t launches = 0;           // counted up by launch(): each one has its own random sequence
  bool random = true;                   // false: threads in order, asynchronous work as late as may be
  unsigned resident = 2;                // blocks that run at the same time, whole clusters at least
  int yield_percent = 25;               // how often a thread that could go on lets others go first
  std::uint64_t switches = 1ull << 36;  // more is taken for a livelock
  // The device that the host code sees.
  int multiprocessors = 3;
  int capability = 90;
  int driver = 13000;
  int runtime = 13000;
};
Settings& settings();

struct Thread;
struct Warp;
struct Block;

// The kinds of asynchronous work. A launch picks for each whether it is done at once, at some time or as late
// as a wait allows, so that every kind meets the others both early and late.
enum class Kind { kLoad, kCopy, kProduct, kStore };  // TMA to shared memory, cp.async, wgmma, TMA from it

// Work that a copy engine or a tensor core does some time after it was asked for. Runs without a stack of its
// own, so it must not wait; `done` says whether it ran.
struct Deferred {
  std::function<void()> work;
  std::shared_ptr<Deferred> after;  // what must be done before, or null
  bool done = false;
  bool waited_for = false;  // by Groups::wait(): its issuer may rely on it
};

// ---- the running thread

Thread& self();
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
unsigned linear_thread();  // within its block
unsigned lane();           // within its warp
unsigned threads_in_block();

// Stops the launch: "file:line block (x, y, z) thread t: message".
[[noreturn]] void fail(const Place& where, const std::string& message);

// Lets other threads go first, now or with the probability in the settings.
void yield();
void maybe_yield();

// Parks the thread until wake(key); `what` appears in the report of a deadlock.
void wait_for(const void* key, const char* what, const Place& where);
void wake(const void* key);

// ---- shared memory

char* dynamic_shared();
std::size_t dynamic_shared_bytes();
// The block's variable that belongs to `site`, NaN at first.
void* static_shared(const void* site, std::size_t bytes, const Place& where);
// Whether [address, address + bytes) lies in the block's dynamic or static shared memory.
bool in_shared(const void* address, std::size_t bytes);

// ---- meetings

// bar.sync id, count: `count` threads meet; memory accesses before are seen after.
void barrier(int id, unsigned count, const Place& where);

// All lanes of `mask` meet, each with a pointer to something of its own; the last to come runs
// meet(pointers, context), pointers[lane] being null outside the mask. Orders memory only where `fence`.
void collective(std::uint32_t mask, const char* kind, void* mine,
                void (*meet)(void* const* pointers, void* context), void* context, bool fence,
                const Place& where);

template <class Meet>
void collective(std::uint32_t mask, const char* kind, void* mine, const Meet& meet, bool fence,
                const Place& where) {
  collective(
      mask, kind, mine,
      [](void* const* pointers, void* context) { (*static_cast<const Meet*>(context))(pointers); },
      const_cast<void*>(static_cast<const void*>(&meet)), fence, where);
}

// ---- clusters

unsigned cluster_rank();  // of the block in its cluster
unsigned cluster_size();

// All threads of the cluster meet, but those that have ended.
void cluster_barrier(const Place& where);

// The same place in the shared memory of block `rank` of the cluster. Before the cluster has met that block
// may not have begun, and its memory is gone when it has ended: both are errors, for the own block too.
void* in_block(void* address, unsigned rank, const Place& where);
// For work that is done later: the same error where the block at whose address it writes has ended by then.
void check_lives(const void* address, const char* what, const Place& where);

// ---- asynchronous work

// Does `work` at any time from now on, in any order with other work that does not stand `after` it. Only
// loads may wake threads; the others may be done no sooner than Groups::wait() asks for it.
std::shared_ptr<Deferred> defer(Kind kind, std::function<void()> work,
                                std::shared_ptr<Deferred> after = nullptr);

// Does it now unless it is done.
void complete(Deferred& deferred);

// Groups of asynchronous work that a thread commits and waits for; one set for each kind of instruction.
class Groups {
 public:
  explicit Groups(const char* kind) : kind_(kind) {}
  void add(std::shared_ptr<Deferred> work) { open_.push_back(std::move(work)); }
  void commit();
  // Returns when at most `pending` of the committed groups are not done.
  void wait(unsigned pending);
  // The same without a chance for others to go first.
  void finish(unsigned pending);
  bool idle() const { return open_.empty() && committed_.empty(); }
  // What the instructions remember from one to the next.
  std::shared_ptr<void>& memory() { return memory_; }
  const char* kind() const { return kind_; }

 private:
  const char* kind_;
  std::vector<std::shared_ptr<Deferred>> open_;
  std::vector<std::vector<std::shared_ptr<Deferred>>> committed_;
  std::shared_ptr<void> memory_;
};
Groups& copy_groups();     // cp.async
Groups& bulk_groups();     // cp.async.bulk, from shared memory
Groups& product_groups();  // wgmma, of the whole warp

// Writes by ordinary instructions that the asynchronous proxy (wgmma, bulk copies) may not see yet. Only
// writes of emulated instructions (stmatrix, cp.async) are known here, plain stores are not. A fence is for
// writes that have happened, so not for a `copy` that was not waited for.
void note_generic_write(const void* address, std::size_t bytes, std::shared_ptr<Deferred> copy = nullptr);
void fence_proxy_async();
void check_proxy(const void* address, std::size_t bytes, const char* what, const Place& where);

// The same for mbarriers that were initialised, which have a fence of their own.
void note_initialised(const void* barrier);
void fence_initialised();
void check_initialised(const void* barrier, const char* what, const Place& where);

// That the thread waited for the kernel before its own (griddepcontrol), and whether it did.
void note_waited_for_previous();
bool waited_for_previous();
// That it made what that kernel stored visible to the tensor memory accelerator since, and whether it did.
void note_fenced_global();
bool fenced_global();

// ---- launching, from the host

// Runs body() once for every thread of the grid. Returns false for a grid that no device would take. cluster:
// blocks of one, neighbours along x.
bool launch(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& body,
            unsigned cluster = 1);

}  // namespace simt
