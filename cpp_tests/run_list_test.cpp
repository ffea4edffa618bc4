// Validation of run lists and index lists, and tile choice as a pure function.
#include "core/run_list.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "core/checks.hpp"
#include "core/tiles.hpp"

namespace flashu::core {
namespace {

TEST(RunList, RunsThatTouchBecomeOne) {
  const RunList one = {{0, 5}};
  EXPECT_EQ(runs_from_flat("r", std::vector<int64_t>{0, 2, 2, 3}, 9), one);
  EXPECT_EQ(runs_from_flat("r", std::vector<int64_t>{0, 1, 1, 1, 2, 3}, 9), one);
  EXPECT_EQ(total_length(one), 5);
  const RunList two = {{0, 2}, {3, 3}};
  EXPECT_EQ(runs_from_flat("r", std::vector<int64_t>{0, 2, 3, 3}, 9), two);
  EXPECT_EQ(total_length(two), 5);
}

TEST(RunList, BadListsAreRefused) {
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{0, 2, 1, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{5, 2, 0, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{0, 0}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{8, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{INT64_MAX, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{0}, 9), Failure);
}

TEST(RunList, BadIndexesAreRefused) {
  const auto check = [](std::vector<int64_t> index) { check_index<int64_t>("i", index, 9); };
  EXPECT_NO_THROW(check({4, 1, 0, 3, 8}));
  EXPECT_THROW(check({1, 2, 1}), Failure);
  EXPECT_THROW(check({0, 0}), Failure);
  EXPECT_THROW(check({-1}), Failure);
  EXPECT_THROW(check({9}), Failure);
}

TEST(Tiles, EveryChoiceCoversItsProblem) {
  for (const int64_t rows : {1, 5, 128, 1460, 8192}) {
    const GemmProblem problem{rows, 14336, 1536, 4, 1, 2, 6, 16, false};
    const auto candidates = gemm_candidates(problem);
    ASSERT_FALSE(candidates.empty());
    for (size_t i = 1; i < candidates.size(); ++i)
      EXPECT_LE(candidates[i - 1].total_us, candidates[i].total_us);
    const GemmTiles tiles = choose_gemm_tiles(problem);
    EXPECT_EQ(tiles.chunk_m % 6, 0);
    EXPECT_EQ(tiles.block_k % 128, 0);
    EXPECT_GE(tiles.panels, 1);
    EXPECT_NE(explain_gemm_tiles(problem).find(tiles.name), std::string::npos);
  }
}

}  // namespace
}  // namespace flashu::core
