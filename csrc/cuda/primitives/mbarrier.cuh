// mbarriers: arrivals and bytes are counted in shared memory, a phase completes when both are there (sm_90).
#pragma once

#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

using Mbarrier = uint64_t;

// One thread initialises; others may use it after a barrier of the block.
FLASHU_DEVICE void mbarrier_init(Mbarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy.
FLASHU_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FLASHU_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for `bytes` of asynchronous copies.
FLASHU_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Returns when `phase` (0 or 1, in turn) is complete. A fresh barrier is in phase 0, and its phase 1 counts
// as complete.
FLASHU_DEVICE void mbarrier_wait(Mbarrier* barrier, int phase) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "FLASHU_WAIT_%=:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra FLASHU_WAIT_%=;\n\t}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

}  // namespace flashu::cuda
