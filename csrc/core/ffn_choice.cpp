// Predicted cost of the CUDA kernels of the gathered FFN. Rates are of an H200 by its data sheet and by
// published kernels of the same make; they were not measured with these kernels yet. The order of the
// candidates matters, not the microseconds.
#include "core/ffn_choice.hpp"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "core/divide_up.hpp"
#include "flashu/flashu.h"

namespace flashu::core {
namespace {

constexpr double kHopperFlopsPerUs = 6.0e6;  // of one multiprocessor, dense wgmma: 790 TFLOP/s over 132
constexpr double kAmpereShare = 0.62;        // of that, what mma.sync reaches there
constexpr double kF32FlopsPerUs = 0.3e6;
constexpr double kTileOverheadUs = 1.2;  // filling the pipeline, and what of the epilogue is not hidden
constexpr double kSumOverheadUs = 2.0;   // launching the kernel that adds the parts
constexpr double kL2BytesPerUs = 5.0e6;
// A cluster's stage needs a third less of L2, which bounds others where most multiprocessors ask it at the
// same time (docs/redesigns.md). L2 is not in these costs: clusters come before the same tile alone, and
// before no other tile.
constexpr double kClusterShare = 0.99;
constexpr double kClusterWaves = 0.8;
constexpr double kMemoryBytesPerUs = 3.0e6;
constexpr double kL2Bytes = 4.0e7;
constexpr int64_t kMaxDecodeRows = 16;

// Four parts of at least 16 steps: enough blocks for a device where the result is one row of tiles, and few
// enough partial sums that they stay in L2.
constexpr int64_t kMaxParts = 4;
constexpr int64_t kNeuronsOfPart = 1024;

// How much of the rate a product of N columns in a tile gets: narrow ones read A more often than they use it.
double width_share(int n) {
  return n >= 256 ? 1.0 : n >= 224 ? 0.98 : n >= 192 ? 0.95 : n >= 128 ? 0.85 : 0.7;
}

double flops_per_us(const FfnTile& tile) {
  switch (tile.kernel) {
    case FfnKernel::kF32:
      return kF32FlopsPerUs;
    case FfnKernel::kSm80:
      return kHopperFlopsPerUs * kAmpereShare;
    default:
      return kHopperFlopsPerUs * width_share(tile.up ? 2 * tile.block_n : tile.block_n);
  }
}

FfnCandidate candidate(const FfnQuestion& q, const FfnTile& tile, int blocks_of_tile) {
  const int64_t n = tile.up ? q.neurons : q.width;
  const int64_t k = tile.up ? q.hidden : q.neurons;
  // Blocks of a cluster take tiles of neighbouring rows together, at the end perhaps one without rows.
  const int64_t multiprocessors = std::max(q.multiprocessors, 1) / tile.cluster * tile.cluster;
  const int64_t tiles_m = divide_up(q.rows, tile.block_m * tile.cluster) * tile.cluster;
  FfnCandidate c{tile, blocks_of_tile, tiles_m * divide_up(n, tile.block_n), 0, 0};
  const int64_t blocks = c.tiles * blocks_of_tile;
  c.waves = static_cast<double>(blocks) / static_cast<double>(multiprocessors);
  const double flops = 2.0 * static_cast<double>(tile.block_m) * static_cast<double>(tile.block_n) *
                       (tile.up ? 2 : 1) * static_cast<double>(k) / blocks_of_tile;
  const double waves = static_cast<double>(divide_up(blocks, multiprocessors));
  c.us = waves * (flops / flops_per_us(tile) + kTileOverheadUs);
  if (tile.cluster > 1 && c.waves >= kClusterWaves) c.us *= kClusterShare;
  if (blocks_of_tile > 1) {
    const double bytes = 4.0 * blocks_of_tile * static_cast<double>(q.rows) * static_cast<double>(n);
    c.us += kSumOverheadUs + 2 * bytes / (bytes < kL2Bytes ? kL2BytesPerUs : kMemoryBytesPerUs);
  }
  return c;
}

// Columns of down that a list names are gathered value by value, which kSm80 alone does, unless a step of K
// is one block of the list. A matrix of no columns has no tensor map.
bool sm90_serves(const FfnQuestion& q, bool up) {
  return q.capability == 90 && q.has_sm90 && q.aligned &&
         (up ? q.hidden > 0 && q.neurons > 0 : (!q.listed || q.block == 64) && q.width > 0);
}

bool serves(const FfnQuestion& q, const FfnTile& tile) {
  if (q.type == FLASHU_F32) return tile.kernel == FfnKernel::kF32;
  if (tile.kernel != FfnKernel::kSm90) return tile.kernel == FfnKernel::kSm80;
  const FfnFetch listed = q.block == 64  ? FfnFetch::kRuns
                          : q.block == 8 ? FfnFetch::kBlocks
                                         : FfnFetch::kRows;
  // Each block of a cluster has rows of its own.
  return sm90_serves(q, tile.up) && tile.fetch == (q.listed && tile.up ? listed : FfnFetch::kRange) &&
         (tile.cluster == 1 ||
          (q.pairs && q.rows > (tile.cluster - 1) * tile.block_m && q.multiprocessors >= tile.cluster));
}

const char* name_of(FfnKernel kernel) {
  switch (kernel) {
    case FfnKernel::kF32:
      return "f32";
    case FfnKernel::kSm80:
      return "sm80";
    default:
      return "sm90";
  }
}

}  // namespace

int ffn_parts(int64_t neurons) {
  return static_cast<int>(std::clamp<int64_t>(neurons / kNeuronsOfPart, 1, kMaxParts));
}

std::vector<FfnCandidate> ffn_candidates(const FfnQuestion& q, bool up) {
  std::vector<FfnCandidate> candidates;
  for (const FfnTile& tile : kFfnTiles) {
    if (tile.up != up || !serves(q, tile)) continue;
    candidates.push_back(candidate(q, tile, 1));
    const int parts = ffn_parts(q.neurons);
    if (!up && tile.kernel == FfnKernel::kSm90 && parts > 1) candidates.push_back(candidate(q, tile, parts));
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const FfnCandidate& a, const FfnCandidate& b) { return a.us < b.us; });
  return candidates;
}

bool ffn_decodes(const FfnQuestion& q) {
  return q.has_up && q.has_down && !q.needs_h && q.type != FLASHU_F32 && q.rows <= kMaxDecodeRows &&
         q.aligned && q.hidden % 8 == 0;
}

std::string explain_ffn(const FfnQuestion& q) {
  std::ostringstream text;
  text << q.rows << " rows, hidden " << q.hidden << ", " << q.neurons << " neurons "
       << (!q.listed       ? "(one range)"
           : q.block == 64 ? "(listed, by 64)"
           : q.block == 8  ? "(listed, by 8)"
                           : "(listed)")
       << ", sm_" << q.capability << ", " << q.multiprocessors << " multiprocessors\n";
  if (ffn_decodes(q)) {
    text << "  both halves: one pass over the weights (decode)\n";
    return text.str();
  }
  for (const bool up : {true, false}) {
    if (up ? !q.has_up : !q.has_down) continue;
    bool first = true;
    for (const FfnCandidate& c : ffn_candidates(q, up)) {
      text << "  " << (up ? "up  " : "down") << (first ? " * " : "   ") << std::left << std::setw(5)
           << name_of(c.tile.kernel) << std::right << std::setw(4) << c.tile.block_m << " x " << std::left
           << std::setw(4) << c.tile.block_n << std::right << std::setw(7) << c.tiles << " tiles of "
           << c.blocks_of_tile << (c.blocks_of_tile == 1 ? " block  " : " blocks ") << std::fixed
           << std::setprecision(2) << std::setw(7) << c.waves << " waves " << std::setprecision(0)
           << std::setw(7) << c.us << " us predicted" << (c.tile.cluster > 1 ? ", in pairs" : "") << "\n";
      first = false;
    }
  }
  return text.str();
}

}  // namespace flashu::core
