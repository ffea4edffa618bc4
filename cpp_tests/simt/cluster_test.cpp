// Clusters in the emulator: what is right runs, and what would break on a device is named.
#include "cuda/primitives/cluster.cuh"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/primitives/launch.cuh"
#include "simt/grids.hpp"

namespace flashu::test {
namespace {

using namespace flashu::cuda;

void require(bool good, const char* what) {
  if (!good) simt::fail(simt::Place::current(), what);
}

TEST(SimtClusters, GridsAreWholeClusters) {
  const auto nothing = [] {};
  EXPECT_TRUE(simt::launch({4, 1, 1}, {32, 1, 1}, 0, nothing, 2));
  EXPECT_FALSE(simt::launch({3, 1, 1}, {32, 1, 1}, 0, nothing, 2));
  EXPECT_FALSE(simt::launch({32, 1, 1}, {32, 1, 1}, 0, nothing, 16));
}

TEST(SimtClusters, NeighboursAreTogetherAndMeet) {
  std::vector<int> begun(6);
  const auto body = [&] {
    if (threadIdx.x == 0) begun[blockIdx.x] = 0;
    cluster_barrier();
    require(cluster_rank() == static_cast<int>(blockIdx.x % 2), "rank");
    if (threadIdx.x == 0) begun[blockIdx.x] = 1;
    cluster_barrier();
    require(begun[blockIdx.x ^ 1] == 1, "passed the barrier alone");
    cluster_barrier();
  };
  for (const unsigned resident : {1u, 2u}) {
    simt::settings().resident = resident;
    EXPECT_EQ(errors(6, 64, 0, body, 2), kFine);
  }
  const auto alone = [] {
    if (blockIdx.x == 0 || threadIdx.x < 32) cluster_barrier();
    if (blockIdx.x == 1 && threadIdx.x >= 32) __syncthreads();
  };
  EXPECT_TRUE(contains(errors(2, 64, 0, alone, 2), "in a barrier of the cluster at cluster_test.cpp"));
}

// Threads that have ended are not waited for.
TEST(SimtClusters, EndedThreadsDoNotHoldTheBarrier) {
  const auto body = [] {
    if (blockIdx.x == 1 && threadIdx.x >= 32) return;
    cluster_barrier();
  };
  EXPECT_EQ(errors(2, 64, 0, body, 2), kFine);
}

TEST(SimtClusters, ElectedIsOneLane) {
  const auto body = [] {
    auto* const shared = reinterpret_cast<int*>(simt::dynamic_shared());
    if (threadIdx.x == 0) *shared = 0;
    __syncthreads();
    if (elect_one()) *shared += 1;
    __syncthreads();
    require(*shared == 1, "not one lane");
  };
  EXPECT_EQ(errors(1, 32, 64, body), kFine);
}

struct Slips {
  bool meets_first = true, meets_last = true, tells_other = true, waits_for_both = true, own_half = true;
  bool whole_bytes = true, fences = true;
};

// Rounds of a box that the two blocks fetch for each other, a half each, into one stage.
constexpr int kRounds = 4;
void exchange(const TensorMap& map, const Slips& slips) {
  char* const shared = simt::dynamic_shared();
  auto* const full = reinterpret_cast<Mbarrier*>(shared);
  auto* const empty = full + 1;
  char* const stage = shared + 1024;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, slips.waits_for_both ? 2 : 1);
    if (slips.fences) mbarrier_init_fence();
  }
  if (slips.meets_first) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    for (int round = 0; round < kRounds; ++round) {
      mbarrier_wait(empty, round % 2 ^ 1);
      mbarrier_expect(full, slips.whole_bytes ? 2048 : 1024);
      const int half = slips.own_half ? rank : 0;
      tma_load_multicast(stage + half * 1024, map, 0, round * 16 + half * 8, full, 3);
    }
  } else if (threadIdx.x >= 32) {
    for (int round = 0; round < kRounds; ++round) {
      mbarrier_wait(full, round % 2);
      const auto at = static_cast<unsigned>(threadIdx.x - 32);
      // The first chunk of a row stands at its number in the row of 128 bytes.
      const auto* const value =
          reinterpret_cast<const bfloat16*>(stage + at / 2 * 128 + at / 2 % 8 * 16 + at % 2 * 2);
      require(to_float(*value) == static_cast<float>(round * 16 + static_cast<int>(at / 2)), "wrong value");
      __syncwarp();
      if (threadIdx.x == 32) mbarrier_arrive_at(empty, rank);
      if (threadIdx.x == 33 && slips.tells_other) mbarrier_arrive_at(empty, rank ^ 1);
    }
  }
  if (slips.meets_last) cluster_barrier();
}

std::set<std::string> outcome(const Slips& slips) {
  std::vector<bfloat16> memory(16 * kRounds * 64);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = from_float<bfloat16>(static_cast<float>(i / 64));
  const TensorMap map = encode_tensor_map(memory.data(), 16 * kRounds, 64, 64, 8);
  return errors(4, 64, 1024 + 2048, [&] { exchange(map, slips); }, 2);
}

std::set<std::string> outcome_without(bool Slips::* field) {
  Slips slips;
  slips.*field = false;
  return outcome(slips);
}

TEST(SimtClusters, BlocksFetchForEachOther) { EXPECT_EQ(outcome({}), kFine); }

TEST(SimtClusters, EverySlipIsFound) {
  EXPECT_TRUE(contains(outcome_without(&Slips::meets_first), "that may not have begun"));
  EXPECT_TRUE(contains(outcome_without(&Slips::meets_last), "that has ended"));
  EXPECT_TRUE(contains(outcome_without(&Slips::tells_other), "in an mbarrier wait"));
  EXPECT_NE(outcome_without(&Slips::waits_for_both), kFine);
  EXPECT_NE(outcome_without(&Slips::own_half), kFine);
  EXPECT_NE(outcome_without(&Slips::whole_bytes), kFine);
  EXPECT_TRUE(contains(outcome_without(&Slips::fences), "whose initialisation was not fenced"));
}

TEST(SimtClusters, OtherBlocksAreInTheCluster) {
  const auto body = [] {
    auto* const barrier = reinterpret_cast<Mbarrier*>(simt::dynamic_shared());
    if (threadIdx.x == 0) mbarrier_init(barrier, 1);
    cluster_barrier();
    if (threadIdx.x == 0) mbarrier_arrive_at(barrier, 2);
    cluster_barrier();
  };
  EXPECT_TRUE(contains(errors(2, 32, 64, body, 2), "a block beyond the cluster"));
}

}  // namespace
}  // namespace flashu::test
