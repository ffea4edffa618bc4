// The emulator itself: it runs what is right, under every schedule, and stops at what is wrong with the
// place.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/wgmma.cuh"
#include "simt/grids.hpp"

namespace flashu::test {
namespace {

using namespace flashu::cuda;

TEST(Simt, BlocksThreadsAndIndices) {
  std::vector<int> seen(6 * 4 * 40, 0);
  EXPECT_TRUE(simt::launch({3, 2, 1}, {10, 2, 2}, 0, [&] {
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    seen[block * 40 + thread] += 1;
  }));
  for (int i = 0; i < 6 * 40; ++i) EXPECT_EQ(seen[static_cast<size_t>(i)], 1);
}

TEST(Simt, GridsThatNoDeviceTakesAreRefused) {
  const auto nothing = [] {};
  EXPECT_FALSE(simt::launch({1, 1, 1}, {1025, 1, 1}, 0, nothing));
  EXPECT_FALSE(simt::launch({0, 1, 1}, {32, 1, 1}, 0, nothing));
  EXPECT_FALSE(simt::launch({1, 70000, 1}, {32, 1, 1}, 0, nothing));
  EXPECT_FALSE(simt::launch({1, 1, 1}, {32, 1, 1}, 228 << 10, nothing));
}

TEST(Simt, BarriersOrderSharedMemory) {
  const auto exchange = [](bool barrier) {
    return [barrier] {
      auto* shared = reinterpret_cast<float*>(simt::dynamic_shared());
      shared[threadIdx.x] = 1;
      if (barrier) __syncthreads();
      if (std::isnan(shared[(threadIdx.x + 64) % 128]))
        simt::fail(simt::Place::current(), "read before it was written");
      __syncthreads();
    };
  };
  EXPECT_EQ(errors(2, 128, 512, exchange(true)), kFine);
  EXPECT_TRUE(contains(errors(2, 128, 512, exchange(false)), "read before it was written"));
}

TEST(Simt, DeadlocksAndDivergenceAreNamed) {
  const auto half = [] {
    if (threadIdx.x < 32) __syncthreads();
  };
  EXPECT_TRUE(contains(errors(1, 64, 0, half), "deadlock: 32 thread(s) in a barrier at simt_test.cpp"));
  const auto divergent = [] {
    if (threadIdx.x < 16) {
      __syncwarp();
    } else {
      __shfl_xor_sync(kAllLanes, 1, 1);
    }
  };
  EXPECT_TRUE(contains(errors(1, 32, 0, divergent), "divergent warp"));
  const auto outside = [] { __shfl_sync(0xffffu, 1, 20); };
  EXPECT_TRUE(contains(errors(1, 16, 0, outside), "not in the mask"));
  const auto counts = [] { named_barrier(1, threadIdx.x < 32 ? 64 : 32); };
  const auto all = errors(1, 64, 0, counts);
  EXPECT_TRUE(contains(all, "meets one of") || contains(all, "deadlock"));
}

TEST(Simt, WarpCollectives) {
  const auto body = [] {
    const int lane = static_cast<int>(threadIdx.x);
    const auto require = [](bool good) {
      if (!good) simt::fail(simt::Place::current(), "wrong value");
    };
    require(__shfl_xor_sync(kAllLanes, lane, 5) == (lane ^ 5));
    require(__shfl_up_sync(kAllLanes, lane, 3) == (lane < 3 ? lane : lane - 3));
    require(__shfl_down_sync(kAllLanes, lane, 3) == (lane > 28 ? lane : lane + 3));
    require(__shfl_sync(kAllLanes, lane, 7) == 7);
    require(__ballot_sync(kAllLanes, lane % 2) == 0xaaaaaaaau);
  };
  EXPECT_EQ(errors(1, 32, 0, body), kFine);
}

// cp.async, one stage ahead of its reader; `pending` groups may be under way when it reads.
template <int kPending>
void copies(const float* from) {
  auto* shared = reinterpret_cast<float*>(simt::dynamic_shared());
  for (int stage = 0; stage < 2; ++stage) {
    cp_async16(shared + stage * 128 + threadIdx.x * 4, from + stage * 128 + threadIdx.x * 4, 16);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const auto at = 128 + (threadIdx.x * 4 + static_cast<unsigned>(i) + 64) % 128;
    if (shared[at] != from[at]) simt::fail(simt::Place::current(), "a copy had not come");
  }
  cp_async_wait<0>();
}

TEST(Simt, CopiesComeLateAndAreWaitedFor) {
  alignas(16) float from[256];
  for (int i = 0; i < 256; ++i) from[i] = static_cast<float>(i);
  EXPECT_EQ(errors(2, 32, 1024, [&] { copies<0>(from); }), kFine);
  EXPECT_TRUE(contains(errors(2, 32, 1024, [&] { copies<1>(from); }), "a copy had not come"));
  const auto never = [&] {
    cp_async16(simt::dynamic_shared() + threadIdx.x * 16, from, 16);
    cp_async_commit();
  };
  EXPECT_TRUE(contains(errors(1, 32, 1024, never), "exits before it waited for its cp.async groups"));
  const auto misaligned = [&] { cp_async16(simt::dynamic_shared() + 4, from, 16); };
  EXPECT_TRUE(contains(errors(1, 32, 1024, misaligned), "misaligned"));
}

TEST(Simt, MatricesComeAsTheHardwareHasThem) {
  const auto body = [] {
    auto* shared = reinterpret_cast<uint16_t*>(simt::dynamic_shared());
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 256; i += 32) shared[i] = static_cast<uint16_t>(i);
    __syncthreads();
    uint32_t plain[4];
    ldmatrix_x4(plain, shared + lane * 8);
    for (int m = 0; m < 4; ++m) {
      const int first = m * 64 + lane / 4 * 8 + lane % 4 * 2;
      if (plain[m] != static_cast<uint32_t>((first + 1) << 16 | first))
        simt::fail(simt::Place::current(), "plain");
    }
    __syncthreads();
    stmatrix_x4(shared + (31 - lane) / 8 * 64 + lane % 8 * 8, plain);
    __syncthreads();
    if (shared[lane] != 192 + lane) simt::fail(simt::Place::current(), "stored");
  };
  EXPECT_EQ(errors(1, 32, 512, body), kFine);
}

// A pipeline of `kStages` boxes by TMA into wgmma: one thread of the second warpgroup fetches, the first
// multiplies.
struct Slips {
  bool wait_full = true, wait_empty = true, release_late = true, whole_bytes = true, right_phase = true;
  bool init_barrier = true, wait_products = true, fence_barrier = true, fence_sums = true;
};
void pipeline(const TensorMap& a, const TensorMap& b, float* out, int steps, const Slips& slips) {
  constexpr int kStages = 2;
  char* shared = simt::dynamic_shared();
  auto* full = reinterpret_cast<Mbarrier*>(shared);
  auto* empty = full + kStages;
  char* stages = shared + 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 4);
    }
    if (slips.fence_barrier) mbarrier_init_fence();
  }
  if (slips.init_barrier) __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x != 128) return;
    for (int k = 0; k < steps; ++k) {
      const int s = k % kStages;
      const int phase = k / kStages % 2;
      if (slips.wait_empty) mbarrier_wait(&empty[s], slips.right_phase ? phase ^ 1 : phase);
      mbarrier_expect(&full[s], slips.whole_bytes ? 2 * 8192 : 8192);
      tma_load(stages + s * 16384, a, k * 64, 0, &full[s]);
      tma_load(stages + s * 16384 + 8192, b, k * 64, 0, &full[s]);
    }
    return;
  }
  float sums[32] = {};
  for (int k = 0; k < steps; ++k) {
    const int s = k % kStages;
    if (slips.wait_full) mbarrier_wait(&full[s], k / kStages % 2);
    if (slips.fence_sums) wgmma_fence();
    const char* stage = stages + s * 16384;
    for (int i = 0; i < 4; ++i) {
      wgmma<64, bfloat16>(sums, wgmma_descriptor(stage + i * 32), wgmma_descriptor(stage + 8192 + i * 32));
    }
    wgmma_commit();
    if (!slips.release_late && threadIdx.x % 32 == 0) mbarrier_arrive(&empty[s]);
    if (slips.wait_products || k == steps - 1) wgmma_wait<0>();
    if (slips.release_late && threadIdx.x % 32 == 0) mbarrier_arrive(&empty[s]);
  }
  const unsigned lane = threadIdx.x % 32;
  for (int i = 0; i < 32; ++i) {
    const unsigned row = threadIdx.x / 32 * 16 + lane / 4 + static_cast<unsigned>(i / 2 % 2) * 8;
    out[row * 64 + static_cast<unsigned>(i / 4 * 8 + i % 2) + lane % 4 * 2] = sums[i];
  }
}

// Whether all schedules give the right product; else one of the errors, or "wrong".
std::string outcome(const Slips& slips) {
  constexpr int kK = 5 * 64;
  std::vector<bfloat16> a(64 * kK);
  std::vector<bfloat16> b(64 * kK);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = from_float<bfloat16>(static_cast<float>(static_cast<int>(i * 7 % 11) - 5));
    b[i] = from_float<bfloat16>(static_cast<float>(static_cast<int>(i * 5 % 13) - 6));
  }
  const TensorMap map_a = encode_tensor_map(a.data(), 64, kK, kK, 64);
  const TensorMap map_b = encode_tensor_map(b.data(), 64, kK, kK, 64);
  std::vector<float> expected(64 * 64, 0);
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < 64; ++c) {
      for (int k = 0; k < kK; ++k)
        expected[static_cast<size_t>(r * 64 + c)] +=
            to_float(a[static_cast<size_t>(r * kK + k)]) * to_float(b[static_cast<size_t>(c * kK + k)]);
    }
  }
  simt::settings().launches = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::settings().seed = static_cast<std::uint64_t>(seed);
    simt::settings().random = seed != 0;
    std::vector<float> out(64 * 64, std::nanf(""));
    const std::string error =
        error_of_grid(1, 256, 1024 + 2 * 16384, [&] { pipeline(map_a, map_b, out.data(), kK / 64, slips); });
    if (!error.empty()) return error;
    if (out != expected) return "wrong";
  }
  return "right";
}

TEST(Simt, APipelineOfTmaAndWgmma) { EXPECT_EQ(outcome({}), "right"); }

TEST(Simt, EverySlipInAPipelineIsFound) {
  const auto with = [](bool Slips::* field) {
    Slips slips;
    slips.*field = false;
    return outcome(slips);
  };
  EXPECT_NE(with(&Slips::wait_full), "right");
  EXPECT_NE(with(&Slips::wait_empty), "right");
  EXPECT_NE(with(&Slips::release_late), "right");
  EXPECT_NE(with(&Slips::whole_bytes), "right");
  EXPECT_NE(with(&Slips::right_phase), "right");
  EXPECT_NE(with(&Slips::init_barrier), "right");
  EXPECT_NE(with(&Slips::wait_products), "right");
  EXPECT_NE(with(&Slips::fence_barrier), "right");
  EXPECT_NE(with(&Slips::fence_sums), "right");
}

TEST(Simt, MbarriersAreUsedAsTheyWereInitialised) {
  const auto fresh = [] { mbarrier_arrive(reinterpret_cast<Mbarrier*>(simt::dynamic_shared())); };
  EXPECT_TRUE(contains(errors(1, 32, 64, fresh), "before it was initialised"));
  const auto crowd = [] {
    auto* barrier = reinterpret_cast<Mbarrier*>(simt::dynamic_shared());
    if (threadIdx.x == 0) mbarrier_init(barrier, 40);
    __syncthreads();
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
  };
  EXPECT_TRUE(contains(errors(1, 32, 64, crowd), "deadlock: 32 thread(s) in an mbarrier wait"));
}

TEST(Simt, TheAsynchronousProxySeesOnlyWhatWasFenced) {
  std::vector<bfloat16> target(64 * 64);
  const TensorMap map = encode_tensor_map(target.data(), 64, 64, 64, 64);
  const auto store = [&](bool fence) {
    return [&map, fence] {
      const uint32_t words[4] = {1, 2, 3, 4};
      stmatrix_x4(simt::dynamic_shared() + threadIdx.x * 128, words);
      if (fence) fence_proxy_async();
      __syncthreads();
      if (threadIdx.x != 0) return;
      tma_store(map, simt::dynamic_shared(), 0, 0);
      tma_store_commit();
      tma_store_wait_read<0>();
    };
  };
  EXPECT_EQ(errors(1, 32, 64 * 128, store(true)), kFine);
  EXPECT_TRUE(contains(errors(1, 32, 64 * 128, store(false)), "without fence.proxy.async"));
}

// What TMA does and its documentation does not say.
TEST(Simt, TmaStartsAtChunksAndStoresWholeOnes) {
  // 20 columns in rows of 32: the third chunk is half inside.
  std::vector<bfloat16> memory(8 * 32, from_float<bfloat16>(7.0f));
  const TensorMap map = encode_tensor_map(memory.data(), 8, 20, 32, 8);
  const auto load = [&](int column) {
    return error_of_grid(1, 32, 4096, [&] {
      char* shared = simt::dynamic_shared();
      auto* barrier = reinterpret_cast<Mbarrier*>(shared + 1024);
      if (threadIdx.x != 0) return;
      mbarrier_init(barrier, 1);
      mbarrier_init_fence();
      mbarrier_expect(barrier, 8 * kBoxRowBytes);
      tma_load(shared, map, column, 0, barrier);
      mbarrier_wait(barrier, 0);
    });
  };
  EXPECT_EQ(load(8), "");
  EXPECT_NE(load(4).find("TMA load: expected a first column at a multiple of 16 bytes, got column 4"),
            std::string::npos);
  const auto store = [&](int column) {
    return error_of_grid(1, 32, 4096, [&] {
      char* shared = simt::dynamic_shared();
      std::memset(shared, 0, 8 * kBoxRowBytes);
      fence_proxy_async();
      if (threadIdx.x != 0) return;
      tma_store(map, shared, column, 0);
      tma_store_commit();
      tma_store_wait_read<0>();
    });
  };
  EXPECT_NE(store(-4).find("got column -4"), std::string::npos);
  EXPECT_EQ(store(8), "");
  for (size_t i = 0; i < memory.size(); ++i)
    EXPECT_EQ(to_float(memory[i]), i % 32 < 8 || i % 32 >= 24 ? 7.0f : 0.0f) << "column " << i % 32;
}

TEST(Simt, TmaReadsWhatTheKernelBeforeStoredBehindAFence) {
  std::vector<bfloat16> memory(8 * 64);
  const TensorMap map = encode_tensor_map(memory.data(), 8, 64, 64, 8);
  const auto run = [&](bool fences) {
    return error_of_grid(1, 32, 4096, [&] {
      char* shared = simt::dynamic_shared();
      auto* barrier = reinterpret_cast<Mbarrier*>(shared + 1024);
      griddepcontrol_wait();
      if (fences) fence_proxy_async_global();
      if (threadIdx.x != 0) return;
      mbarrier_init(barrier, 1);
      mbarrier_init_fence();
      mbarrier_expect(barrier, 8 * kBoxRowBytes);
      tma_load(shared, map, 0, 0, barrier);
      mbarrier_wait(barrier, 0);
    });
  };
  EXPECT_EQ(run(true), "");
  EXPECT_NE(run(false).find("without fence.proxy.async.global"), std::string::npos);
}

TEST(Simt, SumsMayNotBeReadWhileProductsAreUnderWay) {
  const auto body = [] {
    char* shared = simt::dynamic_shared();
    for (unsigned i = threadIdx.x; i < 8192; i += 128) reinterpret_cast<uint16_t*>(shared)[i] = 0;
    fence_proxy_async();
    __syncthreads();
    float sums[32] = {};
    wgmma_fence();
    wgmma<64, bfloat16>(sums, wgmma_descriptor(shared), wgmma_descriptor(shared + 8192));
    wgmma_commit();
    const float early = sums[0];
    wgmma_wait<0>();
    if (sums[0] != 0) simt::fail(simt::Place::current(), "wrong sum");
    if (std::isnan(early)) simt::fail(simt::Place::current(), "read too early");
  };
  EXPECT_TRUE(contains(errors(1, 128, 16384, body), "read too early"));
}

TEST(Simt, ASecondLaunchStartsClean) {
  EXPECT_NE(error_of_grid(1, 64, 0,
                          [] {
                            if (threadIdx.x == 0) __syncthreads();
                          }),
            "");
  EXPECT_EQ(error_of_grid(2, 64, 256, [] { __syncthreads(); }), "");
}

}  // namespace
}  // namespace flashu::test
