// mbarriers: arrivals and bytes are counted in shared memory, a phase completes when both are there (sm_90).
#pragma once

#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

using Mbarrier = uint64_t;

#if FLASHU_EMULATED
namespace emulated {

// What the 8 bytes hold here: pending counts arrivals still missing, bytes those still to come.
struct MbarrierWord {
  uint64_t phase : 1;
  uint64_t pending : 20;
  uint64_t count : 20;
  int64_t bytes : 21;
  uint64_t initialised : 2;
};
static_assert(sizeof(MbarrierWord) == sizeof(Mbarrier));

inline MbarrierWord& word(Mbarrier* barrier, const simt::Place& where) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || !simt::in_shared(barrier, 8))
    simt::fail(where, "mbarrier: expected 8 aligned bytes of shared memory");
  auto& state = *reinterpret_cast<MbarrierWord*>(barrier);
  if (state.initialised != 2) simt::fail(where, "mbarrier: used before it was initialised");
  return state;
}

inline void settle(Mbarrier* barrier) {
  auto& state = *reinterpret_cast<MbarrierWord*>(barrier);
  if (state.pending != 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = state.count;
  simt::wake(barrier);
}

// Bytes that a copy engine has written; called outside any thread.
inline void complete_bytes(Mbarrier* barrier, int bytes) {
  const simt::Unseen unseen;
  simt::order_release(barrier);
  reinterpret_cast<MbarrierWord*>(barrier)->bytes -= bytes;
  settle(barrier);
}

}  // namespace emulated
#endif

// One thread initialises; others may use it after a barrier of the block.
FLASHU_DEVICE void mbarrier_init(Mbarrier* barrier, int count FLASHU_WHERE) {
#if FLASHU_EMULATED
  const simt::Unseen unseen;
  if (!simt::in_shared(barrier, 8)) simt::fail(where, "mbarrier: expected shared memory");
  emulated::MbarrierWord state{};
  state.pending = state.count = static_cast<uint64_t>(count);
  state.initialised = 2;
  std::memcpy(barrier, &state, sizeof state);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
#endif
}

// Makes initialised barriers visible to the asynchronous proxy.
FLASHU_DEVICE void mbarrier_init_fence() {
#if !FLASHU_EMULATED
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

FLASHU_DEVICE void mbarrier_arrive(Mbarrier* barrier FLASHU_WHERE) {
#if FLASHU_EMULATED
  const simt::Unseen unseen;
  emulated::MbarrierWord& state = emulated::word(barrier, where);
  simt::order_release(barrier);
  if (state.pending == 0) simt::fail(where, "mbarrier: more arrivals than it was initialised for");
  --state.pending;
  emulated::settle(barrier);
  simt::maybe_yield();
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and makes the phase wait for `bytes` of asynchronous copies.
FLASHU_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes FLASHU_WHERE) {
#if FLASHU_EMULATED
  const simt::Unseen unseen;
  emulated::word(barrier, where).bytes += bytes;
  mbarrier_arrive(barrier, where);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Returns when the phase of this parity is complete (a fresh barrier is in phase 0, and its phase 1 counts as
// complete).
FLASHU_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity FLASHU_WHERE) {
#if FLASHU_EMULATED
  const simt::Unseen unseen;
  while (static_cast<int>(emulated::word(barrier, where).phase) == parity)
    simt::wait_for(barrier, "an mbarrier wait", where);
  simt::order_acquire(barrier);
  simt::maybe_yield();
#else
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "FLASHU_WAIT_%=:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra FLASHU_WAIT_%=;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace flashu::cuda
