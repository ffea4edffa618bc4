// Clusters: blocks that run at the same time and reach each other's shared memory (sm_90). In a launch
// without one a block is a cluster of its own.
#pragma once

#include "cuda/primitives/tma.cuh"

namespace flashu::cuda {

// Of the block in its cluster; blocks that follow each other along x are one.
FLASHU_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of the cluster meet; what they wrote before is seen after. Before the first one another block
// may not have begun, and after the last one none may be used: it may have ended.
FLASHU_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at the barrier at the same place in block `rank` of the cluster: says that reads by wgmma that were
// waited for are over, and hands over nothing that threads wrote. For that it would have to release at the
// cluster's scope, which ptxas (13.0.88) makes a fence of the whole device, for every arrival.
FLASHU_DEVICE void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

// One thread: the box comes to the same place in every block of the cluster whose bit is set in `blocks`, and
// is counted by the barrier at the same place there.
FLASHU_DEVICE void tma_load_multicast(void* to, const TensorMap& map, int column, int row, Mbarrier* barrier,
                                      uint32_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map.map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

}  // namespace flashu::cuda
