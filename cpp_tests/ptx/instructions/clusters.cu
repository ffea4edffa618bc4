// Clusters of two blocks: arrivals at the other one's mbarrier and boxes for both that the machine must pass,
// and faults that it must name.
#include "faults.cuh"

namespace flashu::test {
namespace {

#define FLASHU_CLUSTER_FAULT(name) \
  __global__ void __cluster_dims__(2, 1, 1) name([[maybe_unused]] uint32_t* memory)

__device__ void meet() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ uint32_t rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ void arrive_at_other(uint64_t* bar) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(FLASHU_AT(bar)), "r"(rank() ^ 1));
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

// Warp 0 of each block waits for the other block's warp 1 again and again; warps pass the barrier at their
// own speed.
FLASHU_CLUSTER_FAULT(waits_for_the_other_block) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  meet();
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 32) arrive_at_other(&bar);
    if (threadIdx.x == 0) FLASHU_WAIT(&bar, round % 2);
    if (threadIdx.x < 32 && round < 2) asm volatile("bar.warp.sync -1;" ::: "memory");
    meet();
  }
}
FLASHU_CLUSTER_FAULT(warps_run_ahead) {
  meet();
  if (threadIdx.x < 32) memory[rank()] = rank();
  meet();
  memory[threadIdx.x + 2] = memory[rank() ^ 1];
}
FLASHU_CLUSTER_FAULT(arrives_before_they_met) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) FLASHU_INIT(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) arrive_at_other(&bar);
  meet();
}
FLASHU_CLUSTER_FAULT(arrives_when_the_other_has_ended) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) FLASHU_INIT(&bar, 1);
  meet();
  if (rank() == 0) return;
  volatile uint32_t* const counter = memory;
  for (int round = 0; round < 2000; ++round) counter[threadIdx.x] = counter[threadIdx.x] + 1;
  if (threadIdx.x == 0) arrive_at_other(&bar);
}
FLASHU_CLUSTER_FAULT(is_not_waited_for) {
  if (rank() == 0) meet();
  if (rank() == 1 && threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
}
// Block 0 copies to where block 1 has read, with and without having heard of it.
template <bool kOrdered>
FLASHU_CLUSTER_FAULT(copies_to_the_other_block) {
  __shared__ uint64_t full, read;
  __shared__ __align__(128) uint32_t values[64];
  if (threadIdx.x == 0) {
    FLASHU_INIT(&full, 1);
    FLASHU_INIT(&read, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  meet();
  if (threadIdx.x == 0 && rank() == 1) {
    memory[128] = *const_cast<volatile uint32_t*>(values);
    if (kOrdered) arrive_at_other(&read);
    FLASHU_EXPECT(&full, 256);
    FLASHU_WAIT(&full, 0);
    memory[129] = *const_cast<volatile uint32_t*>(values);
  }
  if (threadIdx.x == 0 && rank() == 0) {
    if (kOrdered) FLASHU_WAIT(&read, 0);
    uint32_t to, bar;
    asm("mapa.shared::cluster.u32 %0, %1, 1;" : "=r"(to) : "r"(FLASHU_AT(values)));
    asm("mapa.shared::cluster.u32 %0, %1, 1;" : "=r"(bar) : "r"(FLASHU_AT(&full)));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(to),
        "l"(memory), "r"(bar)
        : "memory");
  }
  meet();
}
TEST_P(Faults, BlocksOfACluster) {
  expect(waits_for_the_other_block, "", 2);
  expect(warps_run_ahead, "", 2);
  expect(arrives_before_they_met, "that may not have begun", 2);
  expect(arrives_when_the_other_has_ended, "that has ended", 2);
  expect(is_not_waited_for, "deadlock", 2);
  expect(copies_to_the_other_block<true>, "", 2);
  expect(copies_to_the_other_block<false>, "a race in shared memory", 2);
}

}  // namespace
}  // namespace flashu::test
