// Scheduler, blocks, meetings and asynchronous work of the SIMT emulator.
#include "simt/engine.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <sstream>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr std::size_t kStaticBytes = 64 << 10;
constexpr std::size_t kSharedLimit = 227 << 10;
constexpr std::size_t kSharedAlign = 1024;
constexpr unsigned kLanes = 32;
constexpr int kBarriers = 16;

struct Range {
  const char* begin;
  const char* end;
  std::shared_ptr<Deferred> copy;  // that writes there, or null: it is written
};

void poison([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(address, bytes);
#endif
}
void unpoison([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(address, bytes);
#endif
}

std::string at(const Place& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

}  // namespace

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

struct Block {
  Index index{};
  unsigned live = 0;
  std::vector<Thread*> threads;
  std::vector<Meeting> meetings;  // by warp and lowest lane of the mask
  Barrier barriers[kBarriers];
  char* dynamic = nullptr;
  std::size_t dynamic_bytes = 0;
  char* statics = nullptr;
  std::size_t statics_used = 0;
  std::map<const void*, std::size_t> sites;

  Block(std::size_t bytes) : dynamic_bytes(bytes) {
    dynamic = filled(bytes, kSharedAlign);
    statics = filled(kStaticBytes, 0);
  }
  ~Block() {
    unpoison(dynamic, dynamic_bytes + 2 * kSharedAlign);
    std::free(dynamic);
    std::free(statics);
  }
  Block(const Block&) = delete;

 private:
  // Reads of what was never written give NaN, and one byte too far is caught by AddressSanitizer.
  static char* filled(std::size_t bytes, std::size_t beyond) {
    const std::size_t rounded = (bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign + beyond;
    auto* memory = static_cast<char*>(std::aligned_alloc(kSharedAlign, std::max(rounded, kSharedAlign)));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    poison(memory + bytes, rounded - bytes);
    return memory;
  }
};

namespace {

// When asynchronous work of a kind runs: at once, at any time, or only when every thread waits for it.
enum class When { kAtOnce, kSometime, kLast };

// How a launch does its asynchronous work.
struct Manner {
  When of[4];   // by Kind
  int percent;  // chance that one piece of deferred work (kSometime) runs when a thread yields
};

// What goes wrong without a wait shows when one side is early and the other one late: data that comes late
// and is read early, memory that is read late and written again early. Chance alone seldom has both.
constexpr Manner kManners[] = {
    {{When::kSometime, When::kSometime, When::kSometime, When::kSometime}, 25},
    {{When::kAtOnce, When::kAtOnce, When::kLast, When::kLast}, 0},
    {{When::kLast, When::kLast, When::kAtOnce, When::kAtOnce}, 0},
    {{When::kSometime, When::kLast, When::kSometime, When::kLast}, 2},
    {{When::kLast, When::kLast, When::kLast, When::kLast}, 0},
    {{When::kSometime, When::kAtOnce, When::kSometime, When::kSometime}, 70},
};
constexpr const Manner& kLate = kManners[4];

struct Engine {
  Fiber host;
  Thread* current = nullptr;  // null on the host's own stack
  std::vector<Thread*> ready;
  std::vector<Thread*> waiting;
  std::vector<std::shared_ptr<Deferred>> sometime;
  std::vector<std::shared_ptr<Deferred>> last;  // loads only: nobody is woken by the others
  std::vector<std::unique_ptr<Fiber>> spare;
  Index grid{}, block{};
  const std::function<void()>* body = nullptr;
  std::uint64_t state = 1;
  std::uint64_t switches = 0;
  Manner manner = kLate;
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
__attribute__((noinline)) Engine& engine() {
  static thread_local Engine instance;
  return instance;
}

void run_one_of(std::vector<std::shared_ptr<Deferred>>& list) {
  const std::size_t i = settings().random ? engine().next_random() % list.size() : 0;
  const std::shared_ptr<Deferred> chosen = std::move(list[i]);
  if (settings().random) {
    list[i] = std::move(list.back());
    list.pop_back();
  } else {
    list.erase(list.begin());
  }
  complete(*chosen);
}

// The place in `ready` of the thread that goes on.
std::size_t next_ready(Engine& e) {
  if (!settings().random) return 0;
  std::size_t best = e.next_random() % e.ready.size();
  // The best of a few that chance offers: warps of low priority fall behind, but go on too.
  for (int i = 1; e.by_priority && i < 6; ++i) {
    const std::size_t other = e.next_random() % e.ready.size();
    if (e.ready[other]->priority > e.ready[best]->priority) best = other;
  }
  return best;
}

// Gives the processor to another thread, or to the host when none can run.
void leave(bool forever = false) {
  Engine& e = engine();
  if (!e.sometime.empty() && e.chance(e.manner.percent)) run_one_of(e.sometime);
  while (e.ready.empty() && !e.sometime.empty()) run_one_of(e.sometime);
  while (e.ready.empty() && !e.last.empty()) run_one_of(e.last);
  Thread* from = e.current;
  Thread* next = nullptr;
  if (e.error.empty() && !e.ready.empty()) {
    const std::size_t i = next_ready(e);
    next = e.ready[i];
    if (settings().random) {
      e.ready[i] = e.ready.back();
      e.ready.pop_back();
    } else {
      e.ready.erase(e.ready.begin());
    }
  }
  if (++e.switches > settings().switches) {
    e.error = "the limit of switches is reached; is this a livelock?";
    next = nullptr;
  }
  if (next == from && next != nullptr) return;
  e.current = next;
  Fiber& target = next != nullptr ? *next->fiber : e.host;
  Fiber& source = from != nullptr ? *from->fiber : e.host;
  source.switch_to(target, forever);
}

void park(const char* what, const Place& where, const void* key) {
  Thread& t = self();
  t.waiting_for = what;
  t.where = where;
  t.key = key;
  leave();
  t.waiting_for = nullptr;
  t.key = nullptr;
}

void make_ready(Thread* thread) { engine().ready.push_back(thread); }

void check_idle(const Groups& groups) {
  if (!groups.idle())
    fail(Place::current(), std::string("thread exits before it waited for its ") + groups.kind() + " groups");
}

// Thrown by fail() through the emulated thread, so that what the thread had allocated is freed.
struct Abandoned {};

bool run_body() {
  Engine& e = engine();
  try {
    order_acquire(&e.body);
    (*e.body)();
    order_release(&e.live);
    const Thread& t = self();
    for (const Groups* groups : {&t.copies, &t.bulks, &t.products}) check_idle(*groups);
    return true;
  } catch (const Abandoned&) {
    return false;
  }
}

void thread_main() {
  fiber_started();
  Engine& e = engine();
  const bool ended = run_body();
  unseen_begin();  // leave() ends it
  if (!ended) {
    leave(true);
    std::abort();
  }
  Thread& t = self();
  t.done = true;
  --e.live;
  --t.block->live;
  leave(true);
  std::abort();
}

std::string deadlock_report(const std::vector<std::unique_ptr<Thread>>& threads) {
  std::map<std::string, int> counts;
  for (const auto& thread : threads) {
    if (!thread->done)
      ++counts[std::string(thread->waiting_for ? thread->waiting_for : "?") + " at " + at(thread->where)];
  }
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [what, count] : counts) text << " " << count << " thread(s) in " << what << ";";
  return text.str();
}

// Runs the given blocks of the grid to their end, at the same time.
void run_wave(const std::vector<std::uint64_t>& blocks, std::size_t shared_bytes) {
  Engine& e = engine();
  std::vector<std::unique_ptr<Block>> wave;
  std::vector<std::unique_ptr<Thread>> threads;
  const unsigned count = e.block.x * e.block.y * e.block.z;
  for (const std::uint64_t number : blocks) {
    auto block = std::make_unique<Block>(shared_bytes);
    block->index = {static_cast<unsigned>(number % e.grid.x),
                    static_cast<unsigned>(number / e.grid.x % e.grid.y),
                    static_cast<unsigned>(number / e.grid.x / e.grid.y)};
    block->live = count;
    block->meetings.resize((count + kLanes - 1) / kLanes * kLanes);
    for (unsigned t = 0; t < count; ++t) {
      auto thread = std::make_unique<Thread>();
      thread->block = block.get();
      thread->linear = t;
      thread->priority = t % kLanes == 0 ? e.next_random() : block->threads[t / kLanes * kLanes]->priority;
      thread->index = {t % e.block.x, t / e.block.x % e.block.y, t / e.block.x / e.block.y};
      if (!e.spare.empty()) {
        thread->fiber = std::move(e.spare.back());
        e.spare.pop_back();
        thread->fiber->restart(thread_main);
      } else {
        thread->fiber = std::make_unique<Fiber>(kStackBytes, thread_main);
      }
      block->threads.push_back(thread.get());
      e.ready.push_back(thread.get());
      threads.push_back(std::move(thread));
    }
    e.live += count;
    wave.push_back(std::move(block));
  }
  leave();
  if (e.error.empty() && e.live > 0) e.error = deadlock_report(threads);
  const auto done = [](const std::shared_ptr<Deferred>& work) { return work->done; };
  if (e.error.empty() && !(std::all_of(e.sometime.begin(), e.sometime.end(), done) && e.last.empty()))
    e.error = "blocks end before their asynchronous work";
  for (auto& thread : threads) {
    if (stacks_are_reusable()) {
      e.spare.push_back(std::move(thread->fiber));
    } else if (!e.error.empty()) {
      static_cast<void>(thread->fiber.release());  // it is parked for good, in the middle of something
    }
  }
  e.ready.clear();
  e.waiting.clear();
  e.sometime.clear();
  e.last.clear();
  e.live = 0;
}

}  // namespace

Settings& settings() {
  static thread_local Settings value;
  return value;
}

// ---- the running thread

__attribute__((noinline)) Thread& self() { return *engine().current; }
Index thread_index() {
  const Unseen unseen;
  return self().index;
}
Index block_index() {
  const Unseen unseen;
  return self().block->index;
}
Index block_size() {
  const Unseen unseen;
  return engine().block;
}
Index grid_size() {
  const Unseen unseen;
  return engine().grid;
}
unsigned linear_thread() {
  const Unseen unseen;
  return self().linear;
}
unsigned lane() { return linear_thread() % kLanes; }
unsigned threads_in_block() {
  const Unseen unseen;
  return static_cast<unsigned>(self().block->threads.size());
}

void fail(const Place& where, const std::string& message) {
  Engine& e = engine();
  if (e.current == nullptr) throw Error(at(where) + ": " + message);
  const Unseen unseen;
  const Index b = e.current->block->index;
  std::ostringstream text;
  text << at(where) << " block (" << b.x << ", " << b.y << ", " << b.z << ") thread " << e.current->linear
       << ": " << message;
  e.error = text.str();
  throw Abandoned{};
}

void yield() {
  const Unseen unseen;
  make_ready(&self());
  leave();
}

void maybe_yield() {
  const Unseen unseen;
  if (engine().chance(settings().yield_percent)) yield();
}

void wait_for(const void* key, const char* what, const Place& where) {
  const Unseen unseen;
  engine().waiting.push_back(&self());
  park(what, where, key);
}

void wake(const void* key) {
  const Unseen unseen;
  auto& waiting = engine().waiting;
  const auto kept = std::partition(waiting.begin(), waiting.end(), [&](Thread* t) { return t->key != key; });
  for (auto it = kept; it != waiting.end(); ++it) make_ready(*it);
  waiting.erase(kept, waiting.end());
}

// ---- shared memory

char* dynamic_shared() {
  const Unseen unseen;
  return self().block->dynamic;
}

std::size_t dynamic_shared_bytes() {
  const Unseen unseen;
  return self().block->dynamic_bytes;
}

void* static_shared(const void* site, std::size_t bytes, const Place& where) {
  const Unseen unseen;
  Block& block = *self().block;
  const auto [entry, fresh] = block.sites.try_emplace(site, block.statics_used);
  if (fresh) {
    block.statics_used += (bytes + 127) / 128 * 128;
    if (block.statics_used > (48u << 10)) fail(where, "more than 48 KiB of static shared memory");
  }
  return block.statics + entry->second;
}

bool in_shared(const void* address, std::size_t bytes) {
  const Unseen unseen;
  const Block& block = *self().block;
  const auto* begin = static_cast<const char*>(address);
  return (begin >= block.dynamic && begin + bytes <= block.dynamic + block.dynamic_bytes) ||
         (begin >= block.statics && begin + bytes <= block.statics + kStaticBytes);
}

// ---- meetings

void barrier(int id, unsigned count, const Place& where) {
  const Unseen unseen;
  Block& block = *self().block;
  if (id < 0 || id >= kBarriers) fail(where, "barrier " + std::to_string(id) + ": expected 0 to 15");
  if (count == 0 || (count % kLanes != 0 && count != block.threads.size()) || count > block.threads.size())
    fail(where, "barrier of " + std::to_string(count) + " threads: expected whole warps of this block");
  Barrier& b = block.barriers[id];
  if (b.arrived > 0 && b.expected != count)
    fail(where, "barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads meets one of " +
                    std::to_string(b.expected));
  b.expected = count;
  // Two addresses, used in turn, keep the order of one meeting from reaching into the next.
  const void* passed = reinterpret_cast<const char*>(&b) + 1 + b.phase % 2;
  order_release(&b);
  if (++b.arrived < count) {
    b.waiting.push_back(&self());
    park("a barrier", where, nullptr);
  } else {
    order_acquire(&b);
    order_release(passed);
    b.arrived = 0;
    ++b.phase;
    for (Thread* t : std::exchange(b.waiting, {})) make_ready(t);
    maybe_yield();
  }
  order_acquire(passed);
}

void collective(std::uint32_t mask, const char* kind, void* mine, void (*meet)(void* const*, void*),
                void* context, bool fence, const Place& where) {
  const Unseen unseen;
  Thread& t = self();
  const unsigned lane = t.linear % kLanes;
  if ((mask >> lane & 1) == 0) fail(where, std::string(kind) + ": the calling lane is not in the mask");
  Meeting& m = t.block->meetings[t.linear / kLanes * kLanes + static_cast<unsigned>(std::countr_zero(mask))];
  if (m.arrived != 0 && (m.mask != mask || std::strcmp(m.kind, kind) != 0))
    fail(where, std::string("divergent warp: ") + kind + " meets " + m.kind);
  m.mask = mask;
  m.kind = kind;
  m.pointers[lane] = mine;
  m.threads[lane] = &t;
  m.arrived |= 1u << lane;
  const void* passed = reinterpret_cast<const char*>(&m) + 1 + m.phase % 2;
  if (fence) order_release(&m);
  if (m.arrived != mask) {
    park(kind, where, nullptr);
  } else {
    if (fence) order_acquire(&m);
    void* pointers[kLanes] = {};
    for (unsigned i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) pointers[i] = m.pointers[i];
    }
    meet(pointers, context);
    if (fence) order_release(passed);  // with what was waited for in there
    m.arrived = 0;
    ++m.phase;
    for (unsigned i = 0; i < kLanes; ++i) {
      if ((mask >> i & 1) && i != lane) make_ready(m.threads[i]);
    }
    maybe_yield();
  }
  if (fence) order_acquire(passed);
}

// ---- asynchronous work

std::shared_ptr<Deferred> defer(Kind kind, std::function<void()> work, std::shared_ptr<Deferred> after) {
  const Unseen unseen;
  Engine& e = engine();
  auto deferred = std::make_shared<Deferred>();
  deferred->work = std::move(work);
  deferred->after = std::move(after);
  order_release(deferred.get());
  switch (e.manner.of[static_cast<int>(kind)]) {
    case When::kAtOnce:
      complete(*deferred);
      break;
    case When::kSometime:
      e.sometime.push_back(deferred);
      break;
    case When::kLast:
      if (kind == Kind::kLoad) e.last.push_back(deferred);
      break;  // the others are done when their group is waited for
  }
  return deferred;
}

void complete(Deferred& deferred) {
  if (deferred.done) return;
  if (deferred.after) complete(*deferred.after);
  deferred.done = true;
  as_own_thread(
      [](void* context) {
        auto& own = *static_cast<Deferred*>(context);
        order_acquire(&own);  // what its issuer did before
        if (own.after) order_acquire(&own.after->done);
        own.work();
        order_release(&own.done);
      },
      &deferred);
  deferred.work = nullptr;
  deferred.after = nullptr;
}

void Groups::commit() {
  const Unseen unseen;
  committed_.push_back(std::exchange(open_, {}));
}

void Groups::wait(unsigned pending) {
  finish(pending);
  maybe_yield();
}

void Groups::finish(unsigned pending) {
  const Unseen unseen;
  while (committed_.size() > pending) {
    for (const auto& work : committed_.front()) {
      complete(*work);
      work->waited_for = true;
      order_acquire(&work->done);
    }
    committed_.erase(committed_.begin());
  }
}

Groups& copy_groups() { return self().copies; }
Groups& bulk_groups() { return self().bulks; }
Groups& product_groups() { return self().block->threads[self().linear / kLanes * kLanes]->products; }

void note_generic_write(const void* address, std::size_t bytes, std::shared_ptr<Deferred> copy) {
  const Unseen unseen;
  const auto* begin = static_cast<const char*>(address);
  std::vector<Range>& unfenced = self().unfenced;
  // Kernels without asynchronous readers never fence; the latest writes are enough to find a forgotten one.
  if (unfenced.size() == 512) unfenced.erase(unfenced.begin(), unfenced.begin() + 256);
  unfenced.push_back({begin, begin + bytes, std::move(copy)});
}

void fence_proxy_async() {
  const Unseen unseen;
  std::erase_if(self().unfenced,
                [](const Range& range) { return range.copy == nullptr || range.copy->waited_for; });
  self().unfenced_barriers.clear();
}

void note_initialised(const void* barrier) {
  const Unseen unseen;
  self().unfenced_barriers.push_back(barrier);
}

void fence_initialised() {
  const Unseen unseen;
  self().unfenced_barriers.clear();
}

void check_initialised(const void* barrier, const char* what, const Place& where) {
  const Unseen unseen;
  for (const Thread* thread : self().block->threads) {
    const auto& list = thread->unfenced_barriers;
    if (std::find(list.begin(), list.end(), barrier) != list.end())
      fail(where, std::string(what) + " uses an mbarrier whose initialisation was not fenced");
  }
}

void note_waited_for_previous() {
  const Unseen unseen;
  self().waited_for_previous = true;
  self().fenced_global = false;
}

void note_fenced_global() {
  const Unseen unseen;
  self().fenced_global = true;
}

bool fenced_global() {
  const Unseen unseen;
  return self().fenced_global;
}

bool waited_for_previous() {
  const Unseen unseen;
  return self().waited_for_previous;
}

void check_proxy(const void* address, std::size_t bytes, const char* what, const Place& where) {
  const Unseen unseen;
  const auto* begin = static_cast<const char*>(address);
  for (const Thread* thread : self().block->threads) {
    for (const Range& range : thread->unfenced) {
      if (range.begin < begin + bytes && begin < range.end)
        fail(where, std::string(what) + " reads shared memory that thread " + std::to_string(thread->linear) +
                        " wrote without fence.proxy.async");
    }
  }
}

// ---- launching

bool launch(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& body) {
  const Unseen unseen;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > kSharedLimit) {
    return false;
  }
  Engine& e = engine();
  if (e.current != nullptr) fail(Place::current(), "a kernel launches a kernel");
  const std::uint64_t number = settings().launches++;
  e.state = ((settings().seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xd1b54a32d192ed03ull) | 1;
  for (int i = 0; i < 4; ++i) e.next_random();  // numbers of neighbouring seeds look alike at first
  e.switches = 0;
  e.error.clear();
  e.grid = grid;
  e.block = block;
  e.body = &body;
  order_release(&e.body);
  // In turn, so that a few seeds or a few launches have all of them.
  e.manner = settings().random ? kManners[(settings().seed + number) % std::size(kManners)] : kLate;
  e.by_priority = e.next_random() % 2 != 0;
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (settings().random) {
    for (std::uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[e.next_random() % i]);
  }
  const std::uint64_t resident = std::max(1u, settings().resident);
  for (std::uint64_t first = 0; first < blocks && e.error.empty(); first += resident) {
    const std::uint64_t last = std::min(blocks, first + resident);
    run_wave({order.begin() + static_cast<std::ptrdiff_t>(first),
              order.begin() + static_cast<std::ptrdiff_t>(last)},
             shared_bytes);
  }
  e.body = nullptr;
  order_acquire(&e.live);
  if (!e.error.empty()) throw Error(std::exchange(e.error, {}));
  return true;
}

}  // namespace simt
