// Predicted cost of the CUDA kernels of the gathered FFN: the time model of docs/predicted.md in closed form,
// from published rates. It was held against published kernels of others; these kernels were not measured yet.
#include "core/ffn_choice.hpp"

#include <algorithm>
#include <iomanip>
#include <iterator>
#include <sstream>
#include <utility>

#include "core/divide_up.hpp"
#include "flashu/flashu.h"

namespace flashu::core {
namespace {

// A device's published rates. Cycles are of one multiprocessor.
struct Rates {
  double cycles_per_us;
  double wgmma, mma;   // multiplications of 16-bit values a cycle
  double l2, l2_port;  // bytes a cycle: of all multiprocessors together, of one
  double memory;       // bytes a cycle
};
constexpr Rates kHopper{1755, 2048, 0.62 * 2048, 5120, 64, 3.0e6 / 1755};  // H100
constexpr Rates kAmpere{1410, 0, 1024, 5120, 64, 1.4e6 / 1410};            // A100

constexpr double kF32Multiplications = 128;
constexpr double kSharedBytes = 128;    // a cycle
constexpr double kSpecialLanes = 16;    // values of exp or a reciprocal a cycle
constexpr double kLatency = 570;        // cycles from asking for a stage to its data
constexpr double kPairBarriers = 1000;  // cycles of a cluster's two barriers and their fences: assumed
constexpr double kReadsExposed = 0.1;   // of mma.sync's reads, whose warps also multiply: assumed
constexpr double kSumLaunchUs = 2.0;
// Half of an H100's: what is written by one half of the device and read by the other is there twice.
constexpr double kL2Bytes = 2.5e7;

// Four parts of at least 16 steps: enough blocks for a device where the result is one row of tiles, and few
// enough partial sums that they stay in L2.
constexpr int64_t kMaxParts = 4;
constexpr int64_t kNeuronsOfPart = 1024;

// Cycles that a block needs for a stage of its tile, whatever runs beside.
struct StageCost {
  int64_t k;       // of a stage
  double bytes;    // from L2, to this block alone
  double tensor;   // cycles of tensor cores, or of fp32 units
  double shared;   // cycles of shared memory
  double special;  // cycles of exponentials and reciprocals, of a whole tile
};

StageCost stage_of(const FfnTile& tile, const Rates& rates) {
  const double m = tile.block_m;
  const double product_n = tile.up ? 2 * tile.block_n : tile.block_n;
  const double special = tile.up ? 2 * m * tile.block_n / kSpecialLanes : 0;
  if (tile.kernel == FfnKernel::kF32) {
    return {16, (m + product_n) * 16 * 4, m * product_n * 16 / kF32Multiplications, 0, special};
  }
  const int64_t k = tile.kernel == FfnKernel::kSm90 ? 64 : 32;
  const double bytes = (m + product_n) * static_cast<double>(k) * 2;
  if (tile.kernel == FfnKernel::kSm90) {
    // Products of 64 x N x 16 read 64 x 16 and N x 16 values from shared memory, and take as long at least.
    const double products = m / 64 * static_cast<double>(k) / 16;
    const double operands = products * (16 + product_n / 4);
    const double asked = (m + product_n / tile.cluster) * static_cast<double>(k) * 2;
    return {k, asked, std::max(products * 64 * 16 * product_n / rates.wgmma, operands),
            bytes / kSharedBytes + operands, special};
  }
  // Two by four warps read their rows of both operands by ldmatrix.
  const double read = (4 * m + 2 * product_n) * static_cast<double>(k) * 2;
  const double shared = (bytes + read) / kSharedBytes;
  return {k, bytes, m * product_n * static_cast<double>(k) / rates.mma + kReadsExposed * shared, shared,
          special};
}

FfnCandidate candidate(const FfnQuestion& q, const FfnTile& tile, int blocks_of_tile) {
  const Rates& rates = q.capability >= 90 ? kHopper : kAmpere;
  const int64_t n = tile.up ? q.neurons : q.width;
  const int64_t k = tile.up ? q.hidden : q.neurons;
  // Blocks of a cluster take tiles of neighbouring rows together, at the end perhaps one without rows.
  const int64_t multiprocessors = std::max(q.multiprocessors / tile.cluster * tile.cluster, 1);
  const double value = q.type == FLASHU_F32 ? 4 : 2;
  const double m = static_cast<double>(q.rows);
  const StageCost stage = stage_of(tile, rates);
  const int64_t tiles_m = divide_up(q.rows, tile.block_m * tile.cluster) * tile.cluster;
  const int64_t tiles = tiles_m * divide_up(n, tile.block_n);
  const int64_t blocks = tiles * blocks_of_tile;
  const double of_busiest = static_cast<double>(divide_up(blocks, multiprocessors));
  const double stages = static_cast<double>(divide_up(divide_up(k, stage.k), blocks_of_tile));
  const double busiest = of_busiest * stages;

  // They run beside each other: the longest counts.
  const double operands =
      (m * static_cast<double>(k) + static_cast<double>(n * k) * (tile.up ? 2 : 1)) * value;
  const double result = m * static_cast<double>(n) * (blocks_of_tile > 1 ? 4 * blocks_of_tile : value);
  const std::pair<double, const char*> parts[] = {
      {busiest * stage.tensor, tile.kernel == FfnKernel::kF32 ? "instructions" : "tensor cores"},
      {std::max(static_cast<double>(blocks) * stages * stage.bytes / rates.l2,
                busiest * stage.bytes / rates.l2_port),
       "L2"},
      {(operands + result) / rates.memory, "memory"},
      {busiest * stage.shared, "shared memory"}};
  const auto& longest = *std::max_element(std::begin(parts), std::end(parts),
                                          [](const auto& a, const auto& b) { return a.first < b.first; });

  // What a block's begin and a tile's end leave alone: its result's way through shared memory, or to L2 by
  // the 32 bytes that threads store in a cycle.
  const double tile_values = static_cast<double>(tile.block_m) * tile.block_n;
  const double stored = blocks_of_tile > 1                ? tile_values * 4 / 32
                        : tile.kernel == FfnKernel::kSm90 ? tile_values * 2 / kSharedBytes
                                                          : tile_values * value / 32;
  const double exposed =
      kLatency + (tile.cluster > 1 ? kPairBarriers : 0) + of_busiest * (stored + stage.special);

  FfnCandidate c{tile,
                 blocks_of_tile,
                 tiles,
                 static_cast<double>(blocks) / static_cast<double>(multiprocessors),
                 (longest.first + exposed) / rates.cycles_per_us,
                 longest.second};
  if (blocks_of_tile > 1) {
    const double bytes = 4.0 * blocks_of_tile * m * static_cast<double>(n);
    c.us += kSumLaunchUs + bytes / (bytes < kL2Bytes ? rates.l2 : rates.memory) / rates.cycles_per_us;
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
  if (tile.kernel == FfnKernel::kSm80) {
    // mma.sync and wgmma may add in different orders: which of them runs does not follow the rows.
    if (sm90_serves(q, tile.up)) return false;
    return tile.fetch == FfnFetch::kThreads || (q.aligned && (tile.up || !q.listed || q.block >= 8));
  }
  if (tile.kernel != FfnKernel::kSm90) return false;
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

FfnPartials ffn_partials(const FfnCandidate& down, int64_t rows, int64_t width) {
  if (down.blocks_of_tile <= 1) return {};
  const int64_t stride = divide_up(width, 4) * 4;  // four values are read at a time
  return {stride, divide_up(down.blocks_of_tile * rows * stride * 4, 64) * 64};
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
  return q.has_up && q.has_down && !q.needs_h && q.type != FLASHU_F32 && q.rows <= kFewRows && q.aligned &&
         q.hidden % 8 == 0;
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
           << std::setw(7) << c.us << " us predicted, bound by " << c.bound
           << (c.tile.cluster > 1 ? ", in pairs" : "") << '\n';
      first = false;
    }
  }
  return text.str();
}

}  // namespace flashu::core
