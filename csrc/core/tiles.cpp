// Cost model of the CPU GEMM. Constants were measured on a Zen 3 core (AVX2, 512 KiB L2, 3.5 GHz class); the
// order of the candidates matters, not the microseconds.
#include "core/tiles.hpp"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "core/divide_up.hpp"

namespace flashu::core {
namespace {

constexpr double kMultiplyFlopsPerUs = 88e3;  // one core, full register tiles
constexpr double kPackElementsPerUs = 3.0e3;  // one core, one range
constexpr double kGatheredPackShare = 0.7;    // of that rate, for a list
constexpr double kMemoryBytesPerUs = 20e3;    // all cores
constexpr double kRowBytesPerUs = 30e3;       // one core, packed rows out of L3
constexpr int64_t kRowChunk = 1020;  // bounds the workspace; packing is 2 % of the work at that many rows
constexpr int64_t kL2Bytes = 512 * 1024;
// From so many rows on, longer pieces of them are packed faster (3 % of the whole at N = 256, on Zen 4); for
// few rows a panel of weights should be small.
constexpr int64_t kLongPieceRows = 256;

// Equal chunks of whole tiles, so that no chunk is a small remainder.
int64_t balanced(int64_t rows, int64_t limit, int64_t tile) {
  const int64_t chunks = std::max<int64_t>(1, divide_up(rows, limit));
  return std::max(tile, divide_up(divide_up(rows, chunks), tile) * tile);
}

TileCandidate cost(const GemmProblem& p, GemmTiles tiles) {
  const double threads = static_cast<double>(std::max<int64_t>(p.threads, 1));
  const double elements = static_cast<double>(p.n) * static_cast<double>(p.k);
  const double chunks = static_cast<double>(divide_up(std::max<int64_t>(p.m, 1), tiles.chunk_m));
  // A register tile of one or two rows is bound by the latency of its sums, not by the multipliers.
  const double busy_rows = static_cast<double>(std::max<int64_t>(p.m, 2));
  TileCandidate candidate{tiles, 0, 0, 0, 0};
  candidate.multiply_us =
      2.0 * busy_rows * elements / (kMultiplyFlopsPerUs * static_cast<double>(p.slot_values) * threads);
  const double pack_rate = kPackElementsPerUs * (p.gathered ? kGatheredPackShare : 1.0);
  candidate.pack_us = chunks * elements / (pack_rate * threads);
  const double weight_bytes = elements * static_cast<double>(p.element_bytes);
  const double blocks_n = static_cast<double>(divide_up(p.n, tiles.panels * p.panel_columns));
  const double slot_bytes = 4.0 / static_cast<double>(p.slot_values);
  const double row_bytes = slot_bytes * static_cast<double>(p.m) * static_cast<double>(p.k) * blocks_n;
  const int64_t in_l2 = 4 * tiles.block_k * (tiles.block_m + tiles.panels * p.panel_columns);
  const double spill = in_l2 > kL2Bytes ? 1.5 : 1.0;
  candidate.memory_us =
      chunks * weight_bytes / kMemoryBytesPerUs + spill * row_bytes / (kRowBytesPerUs * threads);
  // Streaming overlaps loads with arithmetic in one pass; panels are packed first and multiplied after.
  candidate.total_us = std::string_view(tiles.name) == "stream"
                           ? std::max(candidate.multiply_us + candidate.pack_us, candidate.memory_us)
                           : candidate.multiply_us + candidate.pack_us + candidate.memory_us;
  return candidate;
}

}  // namespace

std::vector<TileCandidate> gemm_candidates(const GemmProblem& p) {
  std::vector<TileCandidate> candidates;
  const int64_t chunk = balanced(p.m, kRowChunk, p.tile_rows);
  const int64_t streamed = p.m < kLongPieceRows ? 128 : 256;
  candidates.push_back(cost(p, {"stream", chunk, chunk, streamed, 1}));
  for (const int64_t panels : {4, 8}) {
    for (const int64_t rows : {96, 192}) {
      candidates.push_back(
          cost(p, {"panels", chunk, std::min(chunk, balanced(chunk, rows, p.tile_rows)), 384, panels}));
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const TileCandidate& a, const TileCandidate& b) { return a.total_us < b.total_us; });
  return candidates;
}

std::string explain_gemm_tiles(const GemmProblem& p) {
  std::ostringstream text;
  text << "[" << p.m << ", " << p.k << "] x [" << p.k << ", " << p.n << "], "
       << (p.gathered ? "listed" : "one range") << ", " << p.element_bytes << "-byte weights, "
       << (p.slot_values == 2 ? "multiplied in pairs, " : "") << p.threads
       << " threads\n  tiles     chunk_m   block_m block_k panels | multiply     pack   memory    total us\n";
  for (const TileCandidate& c : gemm_candidates(p)) {
    text << "  " << std::left << std::setw(7) << c.tiles.name << std::right << std::setw(10)
         << c.tiles.chunk_m << std::setw(10) << c.tiles.block_m << std::setw(8) << c.tiles.block_k
         << std::setw(7) << c.tiles.panels << " |" << std::fixed << std::setprecision(0) << std::setw(9)
         << c.multiply_us << std::setw(9) << c.pack_us << std::setw(9) << c.memory_us << std::setw(9)
         << c.total_us << "\n";
  }
  return text.str();
}

}  // namespace flashu::core
