// Clusters: the barrier of all their threads, arrivals at other blocks' mbarriers, and boxes that come to
// several blocks, to each at a time of its own.
#pragma once

#include "cuda/primitives/tma.cuh"

namespace flashu::cuda {

FLASHU_DEVICE int cluster_rank() { return static_cast<int>(simt::cluster_rank()); }

FLASHU_DEVICE void cluster_barrier(FLASHU_WHERE_ONLY) { simt::cluster_barrier(where); }

FLASHU_DEVICE void mbarrier_arrive_at(Mbarrier* barrier, int rank FLASHU_WHERE) {
  const simt::Unseen unseen;
  auto* const there = static_cast<Mbarrier*>(simt::in_block(barrier, static_cast<unsigned>(rank), where));
  emulated::arrive(there, emulated::word_anywhere(there, where), where);
}

FLASHU_DEVICE void tma_load_multicast(void* to, const TensorMap& map, int column, int row, Mbarrier* barrier,
                                      uint32_t blocks FLASHU_WHERE) {
  emulated::check_load(to, map, column, where);
  const unsigned own = simt::cluster_rank();
  for (unsigned rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    void* const there = simt::in_block(to, rank, where);
    auto* const counts = static_cast<Mbarrier*>(simt::in_block(barrier, rank, where));
    emulated::begin_load(there, map, column, row, counts, rank == own, where);
  }
  simt::maybe_yield();
}

}  // namespace flashu::cuda
