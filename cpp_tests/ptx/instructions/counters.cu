// What the machine counts, against kernels of few instructions whose counts are known by hand.
#include <cuda.h>

#include "cuda/primitives/wgmma.cuh"
#include "faults.cuh"
#include "ptx/counters.hpp"

namespace flashu::test {
namespace {

using ptx::Counts;
using ptx::Kind;

class Counters : public testing::Test {
 protected:
  void SetUp() override {
    setenv("FLASHU_PTX_WHEN", "eager", 1);
    ptx::count_listener() = [this](const ptx::Launch&, const Counts& c) { counts_ = c; };
  }
  void TearDown() override { ptx::count_listener() = nullptr; }
  template <class... Arguments>
  const Counts& of(int threads, void (*kernel)(Arguments...), Arguments... arguments) {
    kernel<<<1, threads>>>(arguments...);
    check(cudaDeviceSynchronize());
    return counts_;
  }
  static uint64_t issued(const Counts& c, Kind kind, std::size_t role = 0) {
    return c.instructions[role][static_cast<std::size_t>(kind)];
  }
  Counts counts_;
  OnDevice<uint32_t> memory_{Words(4096, 1)};  // 16 KiB
};

void expect_global(const ptx::GlobalCounts& c, uint64_t requests, uint64_t bytes, uint64_t sectors) {
  EXPECT_EQ(c.requests, requests);
  EXPECT_EQ(c.bytes, bytes);
  EXPECT_EQ(c.sectors, sectors);
}
void expect_shared(const ptx::SharedCounts& c, uint64_t requests, uint64_t wavefronts, uint64_t least) {
  EXPECT_EQ(c.requests, requests);
  EXPECT_EQ(c.wavefronts, wavefronts);
  EXPECT_EQ(c.least, least);
}

// ---- global memory

// Each lane loads 4 bytes, `stride` bytes from the next lane's.
__global__ void loads_words(uint32_t* memory, int stride) {
  [[maybe_unused]] uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];"
               : "=r"(v)
               : "l"(reinterpret_cast<char*>(memory) + threadIdx.x * stride));
}
__global__ void loads_vectors(uint32_t* memory) {
  [[maybe_unused]] uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(memory + threadIdx.x * 4));
}
__global__ void stores_halves(uint32_t* memory) {
  asm volatile("st.global.u16 [%0], 7;" ::"l"(reinterpret_cast<uint16_t*>(memory) + threadIdx.x) : "memory");
}

TEST_F(Counters, SectorsOfARequest) {
  expect_global(of(32, loads_words, memory_.get(), 4).loads, 1, 128, 4);
  EXPECT_EQ(counts_.read.count(), 4u);
  EXPECT_EQ(issued(counts_, Kind::kLoadGlobal), 1u);
  expect_global(of(32, loads_words, memory_.get(), 8).loads, 1, 128, 8);
  expect_global(of(32, loads_words, memory_.get(), 32).loads, 1, 128, 32);
  expect_global(of(32, loads_words, memory_.get(), 128).loads, 1, 128, 32);
  expect_global(of(32, loads_words, memory_.get(), 0).loads, 1, 128, 1);
  expect_global(of(20, loads_words, memory_.get(), 4).loads, 1, 80, 3);
  expect_global(of(32, loads_vectors, memory_.get()).loads, 1, 512, 16);
  expect_global(of(64, stores_halves, memory_.get()).stores, 2, 128, 4);
  EXPECT_EQ(counts_.written.count(), 4u);
  EXPECT_EQ(counts_.loads.requests, 0u);
}

// Both warps read the same sector: asked for twice, there once.
TEST_F(Counters, DistinctSectors) {
  of(64, loads_words, memory_.get(), 0);
  EXPECT_EQ(counts_.loads.sectors, 2u);
  EXPECT_EQ(counts_.read.count(), 1u);
}

// ---- shared memory

__global__ void stores_words(int stride) {
  __shared__ uint32_t values[32 * 33];
  asm volatile("st.shared.u32 [%0], 1;" ::"r"(FLASHU_AT(values) + threadIdx.x * stride) : "memory");
}
__global__ void stores_vectors(int stride) {
  __shared__ __align__(16) uint32_t values[32 * 36];
  asm volatile("st.shared.v4.u32 [%0], {1, 2, 3, 4};" ::"r"(FLASHU_AT(values) + threadIdx.x * stride)
               : "memory");
}
__global__ void loads_pairs(int stride) {
  __shared__ __align__(8) uint32_t values[32 * 4];
  [[maybe_unused]] uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(FLASHU_AT(values) + threadIdx.x * stride));
}

TEST_F(Counters, ConflictsOfBanks) {
  expect_shared(of(32, stores_words, 4).shared_stores, 1, 1, 1);
  expect_shared(of(32, stores_words, 0).shared_stores, 1, 1, 1);  // one word
  expect_shared(of(32, stores_words, 8).shared_stores, 1, 2, 1);
  expect_shared(of(32, stores_words, 32).shared_stores, 1, 8, 1);
  expect_shared(of(32, stores_words, 128).shared_stores, 1, 32, 1);
  expect_shared(of(32, stores_words, 132).shared_stores, 1, 1, 1);  // rows of 33 words
  expect_shared(of(32, loads_pairs, 8).shared_loads, 1, 2, 2);
  expect_shared(of(32, loads_pairs, 16).shared_loads, 1, 4, 2);
  expect_shared(of(32, stores_vectors, 16).shared_stores, 1, 4, 4);
  expect_shared(of(32, stores_vectors, 128).shared_stores, 1, 32, 4);
  expect_shared(of(32, stores_vectors, 144).shared_stores, 1, 4, 4);  // rows of 128 bytes and 16 more
}

__global__ void loads_matrices(int stride) {
  extern __shared__ __align__(128) uint8_t shared[];
  [[maybe_unused]] uint32_t v[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(FLASHU_AT(shared) + threadIdx.x * stride)
               : "memory");
}
TEST_F(Counters, ConflictsOfLdmatrix) {
  const auto rows_at = [&](int stride) {
    loads_matrices<<<1, 32, 8192>>>(stride);
    check(cudaDeviceSynchronize());
    return counts_.ldmatrix;
  };
  expect_shared(rows_at(128), 1, 32, 4);
  expect_shared(rows_at(144), 1, 4, 4);
  expect_shared(rows_at(32), 1, 8, 4);
}

// ---- asynchronous copies

__global__ void copies_vectors(const uint32_t* memory, int read) {
  __shared__ __align__(16) uint32_t values[128];
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2; cp.async.commit_group; cp.async.wait_group 0;" ::"r"(
          FLASHU_AT(values + threadIdx.x * 4)),
      "l"(memory + threadIdx.x * 4), "r"(static_cast<int>(threadIdx.x) < read ? 16 : 0)
      : "memory");
}
TEST_F(Counters, CopiesByThreads) {
  const uint32_t* const memory = memory_.get();
  of(32, copies_vectors, memory, 32);
  expect_global(counts_.copies, 1, 512, 16);
  expect_shared(counts_.shared_copies, 1, 4, 4);
  EXPECT_EQ(counts_.copy_waits[0], 1u);
  of(32, copies_vectors, memory, 5);  // zeros of the other lanes are written, and nothing is read for them
  expect_global(counts_.copies, 1, 80, 3);
  expect_shared(counts_.shared_copies, 1, 4, 4);
}

__global__ void loads_box(const __grid_constant__ CUtensorMap map, int column, int row) {
  __shared__ __align__(1024) uint16_t box[64 * 8];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    FLASHU_EXPECT(&bar, 1024);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
        "%3}], [%4];" ::"r"(FLASHU_AT(box)),
        "l"(&map), "r"(column), "r"(row), "r"(FLASHU_AT(&bar))
        : "memory");
  }
  asm volatile("bar.sync 0;" ::: "memory");
  FLASHU_WAIT(&bar, 0);
}
TEST_F(Counters, Boxes) {
  void* function = nullptr;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         nullptr));
  alignas(64) CUtensorMap map;
  const cuuint64_t sizes[] = {96, 20}, strides[] = {192};  // of 16-bit values; bytes
  const cuuint32_t box[] = {64, 8}, steps[] = {1, 1};
  ASSERT_EQ(reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
                &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, memory_.get(), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
            CUDA_SUCCESS);
  of(64, loads_box, map, 0, 0);
  expect_global(counts_.box_loads, 1, 1024, 32);  // 8 rows of 128 bytes
  EXPECT_EQ(counts_.read.count(), 32u);
  EXPECT_EQ(counts_.stages, 1u);
  EXPECT_EQ(counts_.stages_of.size(), 1u);
  EXPECT_EQ(counts_.arrivals, 1u);
  EXPECT_EQ(counts_.mbarrier_waits[0], 2u);
  EXPECT_EQ(counts_.barrier_waits[0], 2u);
  EXPECT_EQ(issued(counts_, Kind::kTma), 1u);
  of(64, loads_box, map, 64, 16);  // half of its columns and half of its rows are outside
  expect_global(counts_.box_loads, 1, 1024, 8);
  of(64, loads_box, map, 8, 0);  // 128 bytes from byte 16 on lie in five sectors
  expect_global(counts_.box_loads, 1, 1024, 40);
}

// ---- products

// The second of two warpgroups multiplies 64 x 64 x 32.
__global__ void multiplies() {
  extern __shared__ __align__(1024) uint8_t shared[];
  if (threadIdx.x < 128) return;
  float sums[32] = {};
  const auto at = static_cast<uint64_t>(FLASHU_AT(shared));
  cuda::wgmma_fence();
  for (int k = 0; k < 2; ++k)
    cuda::wgmma<64, bfloat16>(sums, cuda::operand_descriptor(at + k * 32),
                              cuda::operand_descriptor(at + 8192 + k * 32));
  cuda::wgmma_commit();
  cuda::wgmma_wait<0>();
  for (float& sum : sums) cuda::wgmma_touch(sum);
}
TEST_F(Counters, Products) {
  check(cudaFuncSetAttribute(multiplies, cudaFuncAttributeMaxDynamicSharedMemorySize, 16384));
  for (const char* values : {"1", "0"}) {  // the counts do not depend on whether values are computed
    setenv("FLASHU_PTX_VALUES", values, 1);
    multiplies<<<1, 256, 16384>>>();
    check(cudaDeviceSynchronize());
    EXPECT_EQ(counts_.products, (std::map<ptx::u32, ptx::u64>{{64, 2}}));
    EXPECT_EQ(counts_.product_groups, 1u);
    EXPECT_EQ(counts_.product_drains, 1u);
    EXPECT_EQ(counts_.product_waits[0], 0u);
    EXPECT_EQ(counts_.product_waits[1], 4u);
    EXPECT_EQ(issued(counts_, Kind::kWgmma, 0), 0u);
    EXPECT_EQ(issued(counts_, Kind::kWgmma, 1), 4u * (1 + 2 + 1 + 1));  // fence, products, commit, wait
  }
  unsetenv("FLASHU_PTX_VALUES");
}

// ---- instructions

__global__ void branches(uint32_t* memory) {
  if (threadIdx.x < 16) asm volatile("st.global.u32 [%0], 1;" ::"l"(memory + threadIdx.x) : "memory");
  float f = static_cast<float>(threadIdx.x);
  asm volatile("fma.rn.f32 %0, %0, %0, %0; ex2.approx.f32 %0, %0;" : "+f"(f));
}
TEST_F(Counters, KindsByWarp) {
  of(64, branches, memory_.get());
  // The first warp's lower half stores; the second one branches around it.
  expect_global(counts_.stores, 1, 64, 2);
  EXPECT_EQ(issued(counts_, Kind::kFloat), 2u);
  EXPECT_EQ(issued(counts_, Kind::kSpecial), 2u);
  EXPECT_EQ(issued(counts_, Kind::kFloat, 1), 0u);
}

}  // namespace
}  // namespace flashu::test
