// Scheduler, blocks and launches of the SIMT emulator.
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

#include "simt/state.hpp"

namespace simt {

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr std::size_t kSharedLimit = 227 << 10;
constexpr std::size_t kSharedAlign = 1024;

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

// Reads of what was never written give NaN, and one byte too far is caught by AddressSanitizer.
char* filled(std::size_t bytes, std::size_t beyond) {
  const std::size_t rounded = (bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign + beyond;
  auto* memory = static_cast<char*>(std::aligned_alloc(kSharedAlign, std::max(rounded, kSharedAlign)));
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  poison(memory + bytes, rounded - bytes);
  return memory;
}

}  // namespace

Block::Block(std::size_t bytes) : dynamic_bytes(bytes) {
  dynamic = filled(bytes, kSharedAlign);
  statics = filled(kStaticBytes, 0);
}
Block::~Block() {
  unpoison(dynamic, dynamic_bytes + 2 * kSharedAlign);
  std::free(dynamic);
  std::free(statics);
}

std::string at(const Place& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

__attribute__((noinline)) Engine& engine() {
  static thread_local Engine instance;
  return instance;
}

namespace {

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
  leave_cluster(*t.block->cluster);
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

// Runs the given clusters of the grid to their end, at the same time.
void run_wave(const std::vector<std::uint64_t>& clusters, std::size_t shared_bytes) {
  Engine& e = engine();
  std::vector<std::unique_ptr<Cluster>> together;
  std::vector<std::unique_ptr<Block>> wave;
  std::vector<std::unique_ptr<Thread>> threads;
  const unsigned count = e.block.x * e.block.y * e.block.z;
  for (std::uint64_t i = 0; i < clusters.size() * e.cluster; ++i) {
    const auto rank = static_cast<unsigned>(i % e.cluster);
    const std::uint64_t number = clusters[i / e.cluster] * e.cluster + rank;
    if (rank == 0) together.push_back(std::make_unique<Cluster>());
    auto block = std::make_unique<Block>(shared_bytes);
    block->cluster = together.back().get();
    block->rank = rank;
    block->cluster->blocks.push_back(block.get());
    block->cluster->live += count;
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
    e.running.push_back(block.get());
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
  e.running.clear();
  e.sometime.clear();
  e.last.clear();
  e.live = 0;
}

}  // namespace

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

// ---- launching

bool launch(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& body,
            unsigned cluster) {
  const Unseen unseen;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > kSharedLimit || cluster == 0 || cluster > 8 ||
      grid.x % cluster != 0) {
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
  e.cluster = cluster;
  e.body = &body;
  order_release(&e.body);
  // In turn, so that a few seeds or a few launches have all of them.
  e.manner = settings().random ? kManners[(settings().seed + number) % std::size(kManners)] : kLate;
  e.by_priority = e.next_random() % 2 != 0;
  const std::uint64_t clusters = blocks / cluster;
  std::vector<std::uint64_t> order(clusters);
  for (std::uint64_t i = 0; i < clusters; ++i) order[i] = i;
  if (settings().random) {
    for (std::uint64_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[e.next_random() % i]);
  }
  const std::uint64_t resident = std::max(1u, settings().resident / cluster);
  for (std::uint64_t first = 0; first < clusters && e.error.empty(); first += resident) {
    const std::uint64_t last = std::min(clusters, first + resident);
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
