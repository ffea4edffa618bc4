// Run-list algebra against sets, and tile choice as a pure function.
#include "core/run_list.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "core/checks.hpp"
#include "core/tiles.hpp"

namespace flashu::core {
namespace {

std::set<int64_t> members(const RunList& runs) {
  const auto index = index_from_runs(runs);
  return {index.begin(), index.end()};
}

TEST(RunList, AlgebraIsThatOfSets) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 200; ++trial) {
    const int64_t limit = 1 + static_cast<int64_t>(random() % 40);
    std::vector<int64_t> a, b;
    for (int64_t i = 0; i < limit; ++i) {
      if (random() % 2) a.push_back(i);
      if (random() % 3 == 0) b.push_back(i);
    }
    std::shuffle(a.begin(), a.end(), random);
    const RunList x = runs_from_index("a", a, limit);
    const RunList y = runs_from_index("b", b, limit);
    const std::set<int64_t> p = members(x);
    const std::set<int64_t> q = members(y);
    EXPECT_EQ(p, std::set<int64_t>(a.begin(), a.end()));
    std::set<int64_t> both, either = p;
    for (const int64_t i : q) {
      either.insert(i);
      if (p.count(i)) both.insert(i);
    }
    EXPECT_EQ(members(unite(x, y)), either);
    EXPECT_EQ(members(intersect(x, y)), both);
    EXPECT_EQ(members(complement(x, limit)).size(), static_cast<size_t>(limit) - p.size());
    EXPECT_EQ(runs_from_flat("a", flat_from_runs(x), limit), x);
    for (const auto& run : round_out(x, 4, limit)) {
      EXPECT_EQ(run.start % 4, 0);
      EXPECT_TRUE((run.start + run.length) % 4 == 0 || run.start + run.length == limit);
    }
  }
}

TEST(RunList, RunsThatTouchBecomeOne) {
  const RunList one = {{0, 5}};
  EXPECT_EQ(runs_from_flat("r", std::vector<int64_t>{0, 2, 2, 3}, 9), one);
  EXPECT_EQ(runs_from_index("r", std::vector<int64_t>{4, 1, 0, 3, 2}, 9), one);
  EXPECT_EQ(unite({{0, 2}}, {{2, 3}}), one);
  EXPECT_EQ(unite({{0, 5}}, {{1, 2}}), one);
}

TEST(RunList, BadListsAreRefused) {
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{0, 2, 1, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{5, 2, 0, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{0, 0}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{8, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{INT64_MAX, 2}, 9), Failure);
  EXPECT_THROW(runs_from_flat("r", std::vector<int64_t>{0}, 9), Failure);
  EXPECT_THROW(runs_from_index("r", std::vector<int64_t>{1, 1}, 9), Failure);
  EXPECT_THROW(runs_from_index("r", std::vector<int64_t>{-1}, 9), Failure);
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
