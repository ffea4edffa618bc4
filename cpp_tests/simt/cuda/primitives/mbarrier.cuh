// mbarriers: the 8 bytes of shared memory hold what they count, and every rule of their use is checked.
#pragma once

#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

using Mbarrier = uint64_t;

namespace emulated {

// What the 8 bytes hold here: pending counts arrivals still missing, bytes those still to come, unasked those
// of them that no copy was begun for yet. The last two are below zero where another block of the cluster
// copies before this one expects it.
struct MbarrierWord {
  uint64_t phase : 1;
  uint64_t pending : 11;
  uint64_t count : 11;
  int64_t bytes : 20;
  int64_t unasked : 19;
  uint64_t initialised : 2;
};
static_assert(sizeof(MbarrierWord) == sizeof(Mbarrier));

inline MbarrierWord& word_anywhere(Mbarrier* barrier, const simt::Place& where) {
  auto& state = *reinterpret_cast<MbarrierWord*>(barrier);
  if (state.initialised != 2) simt::fail(where, "mbarrier: used before it was initialised");
  return state;
}

// Of this block.
inline MbarrierWord& word(Mbarrier* barrier, const simt::Place& where) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || !simt::in_shared(barrier, 8))
    simt::fail(where, "mbarrier: expected 8 aligned bytes of shared memory");
  return word_anywhere(barrier, where);
}

inline void settle(Mbarrier* barrier) {
  auto& state = *reinterpret_cast<MbarrierWord*>(barrier);
  if (state.pending != 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = state.count;
  simt::wake(barrier);
}

inline void arrive(Mbarrier* barrier, MbarrierWord& state, const simt::Place& where) {
  simt::order_release(barrier);
  if (state.pending == 0) simt::fail(where, "mbarrier: more arrivals than it was initialised for");
  --state.pending;
  settle(barrier);
  simt::maybe_yield();
}

// A copy of so many bytes begins. The hardware lets bytes come before they are expected; in its own block the
// kernels here do not, since a phase without them would then depend on who arrives last. Copies from another
// block of the cluster cannot know.
inline void ask_bytes(Mbarrier* barrier, int bytes, bool own, const simt::Place& where) {
  simt::check_initialised(barrier, "TMA", where);
  MbarrierWord& state = word_anywhere(barrier, where);
  if (own && state.unasked < bytes)
    simt::fail(where, "mbarrier: a copy of " + std::to_string(bytes) + " bytes, expected are " +
                          std::to_string(state.unasked));
  state.unasked -= bytes;
}

// Bytes that a copy engine has written; called outside any thread.
inline void complete_bytes(Mbarrier* barrier, int bytes) {
  const simt::Unseen unseen;
  simt::order_release(barrier);
  reinterpret_cast<MbarrierWord*>(barrier)->bytes -= bytes;
  settle(barrier);
}

}  // namespace emulated

FLASHU_DEVICE void mbarrier_init(Mbarrier* barrier, int count FLASHU_WHERE) {
  const simt::Unseen unseen;
  if (!simt::in_shared(barrier, 8)) simt::fail(where, "mbarrier: expected shared memory");
  if (count < 1 || count > 1024) simt::fail(where, "mbarrier: expected 1 to 1024 arrivals");
  emulated::MbarrierWord state{};
  state.pending = state.count = static_cast<uint64_t>(count);
  state.initialised = 2;
  std::memcpy(barrier, &state, sizeof state);
  simt::note_initialised(barrier);
}

FLASHU_DEVICE void mbarrier_init_fence() { simt::fence_initialised(); }

FLASHU_DEVICE void mbarrier_arrive(Mbarrier* barrier FLASHU_WHERE) {
  const simt::Unseen unseen;
  emulated::arrive(barrier, emulated::word(barrier, where), where);
}

FLASHU_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes FLASHU_WHERE) {
  const simt::Unseen unseen;
  emulated::MbarrierWord& state = emulated::word(barrier, where);
  state.bytes += bytes;
  state.unasked += bytes;
  mbarrier_arrive(barrier, where);
}

FLASHU_DEVICE void mbarrier_wait(Mbarrier* barrier, int phase FLASHU_WHERE) {
  const simt::Unseen unseen;
  while (static_cast<int>(emulated::word(barrier, where).phase) == phase)
    simt::wait_for(barrier, "an mbarrier wait", where);
  simt::order_acquire(barrier);
  simt::maybe_yield();
}

}  // namespace flashu::cuda
