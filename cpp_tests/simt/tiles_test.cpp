// The table of FFN tiles: what may be chosen is compiled, and nothing else runs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/checks.hpp"
#include "core/ffn_choice.hpp"
#include "cuda/ffn_sm90.hpp"

namespace flashu::test {
namespace {

using core::FfnFetch;
using core::FfnKernel;
using core::FfnTile;

constexpr int kSize = 64;  // of every dimension

// Operands of one half, all of them [64, 64].
struct Half {
  std::vector<uint16_t> a, b, out;

  Half() : a(kSize * kSize), b(kSize * kSize), out(kSize * kSize, 0x1234) {}

  cuda::FfnGemm gemm(bool up) {
    cuda::FfnGemm g{};
    g.a = a.data();
    g.b = b.data();
    g.b2 = up ? b.data() : nullptr;
    g.gated = up;
    g.out = out.data();
    g.a_stride = g.b_stride = g.b2_stride = g.out_stride = kSize;
    g.m = g.n = g.k = g.intermediate = kSize;
    return g;
  }
};

// The status with which the Hopper kernels refuse a tile; FLASHU_OK where they take it.
int status_of(const FfnTile& tile, bool up, Half& half) {
  try {
    cuda::ffn_gemm_sm90(tile, half.gemm(up), FLASHU_BF16, nullptr, 1);
    return FLASHU_OK;
  } catch (const core::Failure& failure) {
    return failure.status;
  }
}

TEST(FfnTiles, EveryRangeOfTheTableIsCompiled) {
  for (const FfnTile& tile : core::kFfnTiles) {
    if (tile.kernel != FfnKernel::kSm90 || tile.fetch != FfnFetch::kRange) continue;
    Half half;
    EXPECT_EQ(status_of(tile, tile.up, half), FLASHU_OK) << tile.block_n;
    EXPECT_EQ(half.out, std::vector<uint16_t>(kSize * kSize, 0)) << tile.block_n;
  }
}

TEST(FfnTiles, WhatTheTableDoesNotHaveIsRefusedByName) {
  const std::vector<uint16_t> untouched(kSize * kSize, 0x1234);
  Half half;
  for (const bool up : {false, true}) {
    for (const FfnTile& tile : {FfnTile{FfnKernel::kSm90, up, FfnFetch::kRange, 128, 96},
                                FfnTile{FfnKernel::kSm90, up, FfnFetch::kRange, 64, 128},
                                FfnTile{FfnKernel::kSm90, up, FfnFetch::kRange, 128, 64, 2},
                                FfnTile{FfnKernel::kSm90, up, FfnFetch::kRange, 128, 128, 4},
                                FfnTile{FfnKernel::kSm90, up, FfnFetch::kThreads, 128, 128},
                                FfnTile{FfnKernel::kSm90, up, FfnFetch::kRows, 128, 128},
                                FfnTile{FfnKernel::kSm80, up, FfnFetch::kRange, 128, 128},
                                FfnTile{FfnKernel::kSm90, !up, FfnFetch::kRange, 128, 128}}) {
      EXPECT_EQ(status_of(tile, up, half), FLASHU_INTERNAL) << tile.block_m << " x " << tile.block_n;
      EXPECT_EQ(half.out, untouched);
    }
  }
}

TEST(FfnTiles, TheChoiceIsFromTheTable) {
  core::FfnQuestion q{1460, 1536, 1536, 7168, true, true, FLASHU_BF16, false, 1, true, false, 90, true, 132};
  const auto widths = [&q](bool up) {
    std::vector<int> all;
    for (const auto& candidate : core::ffn_candidates(q, up)) {
      if (candidate.tile.kernel == FfnKernel::kSm90) all.push_back(candidate.tile.block_n);
      EXPECT_EQ(candidate.tile.up, up);
    }
    std::sort(all.begin(), all.end());
    return all;
  };
  // Alone and in clusters, down's also with a part of K to each block.
  EXPECT_EQ(widths(true), (std::vector<int>{64, 112, 112, 128, 128}));
  EXPECT_EQ(widths(false), (std::vector<int>{64, 64, 128, 128, 128, 128, 192, 192, 192, 192}));
  q.neurons = 2047;  // one part
  EXPECT_EQ(widths(false), (std::vector<int>{64, 128, 128, 192, 192}));
  q.listed = true;
  for (const int32_t block : {1, 8}) {
    q.block = block;
    EXPECT_EQ(widths(true), std::vector<int>(block == 8 ? 2 : 1, 128));
    EXPECT_EQ(widths(false), std::vector<int>{});
  }
  q.block = 64;
  EXPECT_EQ(widths(true), (std::vector<int>{64, 128, 128}));
  EXPECT_EQ(widths(false), (std::vector<int>{64, 128, 128, 192, 192}));
}

// Wide tiles of sm_80 where they fill the device; never for rows that are not aligned or, in the down half,
// lists of single neurons.
TEST(FfnTiles, WideTilesOfAmpere) {
  core::FfnQuestion q{8192, 1536, 1536, 7168, true, true, FLASHU_BF16, false, 1, true, false, 80, true, 108};
  const auto width = [&q](bool up) { return core::ffn_candidates(q, up).front().tile.block_n; };
  EXPECT_EQ(width(true), 128);
  EXPECT_EQ(width(false), 256);
  q.listed = true;
  EXPECT_EQ(width(true), 128);
  EXPECT_EQ(width(false), 128);
  q.block = 8;
  EXPECT_EQ(width(false), 256);
  q.rows = 300;  // 36 or 18 tiles of down
  EXPECT_EQ(width(false), 128);
  q.rows = 8192;
  q.aligned = false;
  EXPECT_EQ(width(true), 64);
  EXPECT_EQ(width(false), 128);
}

// One family of instructions for all rows: the two may add in different orders.
TEST(FfnTiles, RowsDoNotChooseTheInstructions) {
  for (const int32_t block : {0, 1, 8, 64}) {
    for (const int64_t rows : {17, 128, 129, 300, 512, 5000}) {
      core::FfnQuestion q{rows,      1536,  1536, 4480,  true, true, FLASHU_BF16,
                          block > 0, block, true, false, 90,   true, 132};
      for (const bool up : {true, false}) {
        const bool served = up || block == 0 || block == 64;
        for (const auto& candidate : core::ffn_candidates(q, up))
          EXPECT_EQ(candidate.tile.kernel == FfnKernel::kSm90, served) << rows << " rows, lists of " << block;
      }
    }
  }
}

// Three tiles of rows are four in pairs.
TEST(FfnTiles, PairsHaveAnEvenNumberOfTiles) {
  core::FfnQuestion q{300, 1536, 1536, 7168, true, true, FLASHU_BF16, false, 1, true, false, 90, true, 132};
  for (const bool up : {true, false}) {
    for (const auto& candidate : core::ffn_candidates(q, up)) {
      const int64_t columns =
          ((up ? q.neurons : q.width) + candidate.tile.block_n - 1) / candidate.tile.block_n;
      EXPECT_EQ(candidate.tiles, columns * (candidate.tile.cluster == 2 ? 4 : 3));
    }
  }
}

// Where the tiles alone do not fill the device, their parts do; whether they do or not does not change how
// many there are.
TEST(FfnTiles, PartsFillADevice) {
  core::FfnQuestion q{64, 1536, 1536, 7168, true, true, FLASHU_BF16, false, 1, true, false, 90, true, 132};
  EXPECT_EQ(core::ffn_parts(q.neurons), 4);
  for (const auto& [rows, blocks] :
       {std::array<int64_t, 2>{17, 4}, {64, 4}, {256, 4}, {730, 4}, {2048, 1}, {8192, 1}}) {
    q.rows = rows;
    EXPECT_EQ(core::ffn_candidates(q, false).front().blocks_of_tile, blocks) << rows << " rows";
    EXPECT_EQ(core::ffn_candidates(q, true).front().blocks_of_tile, 1) << rows << " rows";
  }
  EXPECT_EQ(core::ffn_parts(1), 1);
  EXPECT_EQ(core::ffn_parts(3071), 2);
  EXPECT_EQ(core::ffn_parts(15155), 4);
}

// Two blocks fetch for each other where both have rows and most multiprocessors work. An odd number of
// rows of tiles is made even, and an odd multiprocessor stays idle.
TEST(FfnTiles, PairsWhereThereAreManyTiles) {
  core::FfnQuestion q{64, 1536, 1536, 7168, true, true, FLASHU_BF16, false, 1, true, false, 90, true, 132};
  const auto blocks_together = [&q](bool up) { return core::ffn_candidates(q, up).front().tile.cluster; };
  const auto pairs = [&q](bool up) {
    std::vector<core::FfnCandidate> all = core::ffn_candidates(q, up);
    std::erase_if(all, [](const core::FfnCandidate& c) { return c.tile.cluster == 1; });
    return all;
  };
  EXPECT_TRUE(pairs(true).empty() && pairs(false).empty());
  q.rows = 128;
  EXPECT_TRUE(pairs(true).empty());
  q.rows = 2048;
  EXPECT_EQ(blocks_together(true), 2);
  EXPECT_EQ(blocks_together(false), 2);
  EXPECT_NE(core::explain_ffn(q).find("in pairs"), std::string::npos);
  q.rows = 257;
  for (const core::FfnCandidate& c : pairs(true)) EXPECT_EQ(c.tiles % 4, 0) << c.tile.block_n;
  q.multiprocessors = 133;
  const double odd = pairs(true).front().waves;
  q.multiprocessors = 132;
  EXPECT_EQ(pairs(true).front().waves, odd);
  q.pairs = false;
  EXPECT_TRUE(pairs(true).empty());
  q.pairs = true;
  q.multiprocessors = 1;
  EXPECT_TRUE(pairs(true).empty());
}

TEST(FfnTiles, TheChoiceIsPrintedAndPrefersFullWaves) {
  core::FfnQuestion q{1460, 1536, 1536, 7168, true, true, FLASHU_BF16, false, 1, true, false, 90, true, 132};
  const auto up = core::ffn_candidates(q, true);
  EXPECT_EQ(up.front().tile.kernel, core::FfnKernel::kSm90);
  for (size_t i = 1; i < up.size(); ++i) EXPECT_LE(up[i - 1].us, up[i].us);
  EXPECT_NE(core::explain_ffn(q).find("sm90"), std::string::npos);
  q.rows = 4;
  EXPECT_TRUE(core::ffn_decodes(q));
  EXPECT_NE(core::explain_ffn(q).find("one pass"), std::string::npos);
  q.aligned = false;
  EXPECT_FALSE(core::ffn_decodes(q));
  EXPECT_EQ(core::ffn_candidates(q, true).front().tile.kernel, core::FfnKernel::kSm80);
}

}  // namespace
}  // namespace flashu::test
