// Meetings of threads: barriers of a block, and what the lanes of a warp do together.
#include <algorithm>
#include <bit>
#include <cstring>

#include "simt/state.hpp"

namespace simt {

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

}  // namespace simt
