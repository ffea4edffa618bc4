// Races in shared memory that the machine must find, each beside the same accesses in order.
#include "faults.cuh"

namespace flashu::test {
namespace {

class Races : public Faults {};
INSTANTIATE_TEST_SUITE_P(When, Races, testing::Values("eager", "late", "random"));

// ---- what orders the accesses of threads

enum class Order { kNone, kBarrier, kNamedBarriersThatDiffer, kMbarrier, kWarp, kShuffle };
template <Order kOrder>
__device__ void order([[maybe_unused]] uint64_t* bar) {
  if constexpr (kOrder == Order::kBarrier) __syncthreads();
  if constexpr (kOrder == Order::kNamedBarriersThatDiffer) {
    asm volatile("bar.sync %0, 32;" ::"r"(1 + threadIdx.x / 32) : "memory");
  }
  if constexpr (kOrder == Order::kMbarrier) {
    FLASHU_ARRIVE(bar);
    FLASHU_WAIT(bar, 0);
  }
  if constexpr (kOrder == Order::kWarp) __syncwarp();
  if constexpr (kOrder == Order::kShuffle)
    asm volatile("{ .reg .b32 x; shfl.sync.idx.b32 x, 0, 0, 31, -1; }" ::: "memory");
}
// Each thread reads what a thread of the other warp (kAcross) or of its own wrote.
template <Order kOrder, bool kAcross>
__global__ void reads_after_writes(uint32_t* memory) {
  __shared__ uint32_t values[64];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) FLASHU_INIT(&bar, 64);
  __syncthreads();
  volatile uint32_t* v = values;
  v[threadIdx.x] = threadIdx.x;
  order<kOrder>(&bar);
  memory[threadIdx.x] = v[threadIdx.x ^ (kAcross ? 32 : 1)];
}
template <Order kOrder, bool kAcross>
__global__ void writes_after_reads(uint32_t* memory) {
  __shared__ uint32_t values[64];
  __shared__ uint64_t bar;
  volatile uint32_t* v = values;
  v[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) FLASHU_INIT(&bar, 64);
  __syncthreads();
  memory[threadIdx.x] = v[threadIdx.x ^ (kAcross ? 32 : 1)];
  order<kOrder>(&bar);
  v[threadIdx.x] = 0;
}
TEST_P(Races, OfThreads) {
  const char* const race = "a race in shared memory";
  expect(reads_after_writes<Order::kNone, true>, race);
  expect(reads_after_writes<Order::kWarp, true>, race);
  expect(reads_after_writes<Order::kNamedBarriersThatDiffer, true>, race);
  expect(reads_after_writes<Order::kBarrier, true>, "");
  expect(reads_after_writes<Order::kMbarrier, true>, "");
  expect(reads_after_writes<Order::kNone, false>, race);
  expect(reads_after_writes<Order::kShuffle, false>, race);
  expect(reads_after_writes<Order::kWarp, false>, "");
  expect(writes_after_reads<Order::kNone, true>, race);
  expect(writes_after_reads<Order::kWarp, true>, race);
  expect(writes_after_reads<Order::kBarrier, true>, "");
  expect(writes_after_reads<Order::kMbarrier, true>, "");
  expect(writes_after_reads<Order::kNone, false>, race);
  expect(writes_after_reads<Order::kWarp, false>, "");
}

FLASHU_FAULT(counts_together) {
  __shared__ uint32_t count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  __syncthreads();
  memory[threadIdx.x] = count;
}
FLASHU_FAULT(reads_while_others_count) {
  __shared__ uint32_t count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  memory[threadIdx.x] = *const_cast<volatile uint32_t*>(&count);
}
TEST_P(Races, OfCounters) {
  expect(counts_together, "");
  expect(reads_while_others_count, "a race in shared memory");
}

// cp.async: visible to its thread after its wait, to others after a barrier more.
template <bool kWaits, bool kMeets, bool kOwn>
__global__ void reads_a_copy(uint32_t* memory) {
  __shared__ __align__(16) uint32_t values[256];
  FLASHU_COPY(values + threadIdx.x * 4, memory);
  if (kWaits) FLASHU_COPY_WAIT();
  if (kMeets) __syncthreads();
  const uint32_t from = kOwn ? threadIdx.x : 63 - threadIdx.x;
  memory[threadIdx.x] = *const_cast<volatile uint32_t*>(values + from * 4);
  FLASHU_COPY_WAIT();
}
// A bulk copy: visible to those who waited for its mbarrier.
template <bool kAllWait>
__global__ void reads_a_bulk_copy(uint32_t* memory) {
  __shared__ __align__(128) uint32_t values[64];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    FLASHU_EXPECT(&bar, 256);
    FLASHU_BULK_LOAD(values, memory, 256, &bar);
  }
  __syncthreads();
  if (kAllWait || threadIdx.x < 32) FLASHU_WAIT(&bar, 0);
  const uint32_t v = *const_cast<volatile uint32_t*>(values + threadIdx.x);
  FLASHU_WAIT(&bar, 0);
  __syncthreads();
  memory[threadIdx.x] = v;
}
// What a bulk store reads may be written again after its wait.
template <bool kWaits>
__global__ void overwrites_what_is_stored(uint32_t* memory) {
  __shared__ __align__(128) uint32_t values[64];
  volatile uint32_t* v = values;
  v[threadIdx.x] = 1;
  FLASHU_FENCE();
  __syncthreads();
  if (threadIdx.x == 0) {
    FLASHU_BULK_STORE(memory, values, 256);
    if (kWaits) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
  __syncthreads();
  v[threadIdx.x] = 2;
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
TEST_P(Races, OfCopies) {
  const char* const race = "a race in shared memory";
  expect(reads_a_copy<true, true, false>, "");
  expect(reads_a_copy<true, false, true>, "");
  expect(reads_a_copy<true, false, false>, race);
  expect(reads_a_copy<false, true, false>, race);
  expect(reads_a_copy<false, false, true>, race);
  expect(reads_a_bulk_copy<true>, "");
  expect(reads_a_bulk_copy<false>, race);
  expect(overwrites_what_is_stored<true>, "");
  expect(overwrites_what_is_stored<false>, race);
}

}  // namespace
}  // namespace flashu::test
