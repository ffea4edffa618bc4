// Which CUDA kernels serve a gathered FFN: problem -> candidates -> predicted cost -> choice. Pure and
// printable; no device is touched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/ffn_tiles.hpp"
#include "core/for_ops.hpp"

namespace flashu::core {

// What the choice depends on; sizes as in FfnProblem.
struct FfnQuestion {
  int64_t rows, hidden, width, neurons;
  bool has_up, has_down;
  int32_t type;    // flashu_dtype
  bool listed;     // the neurons come from a list instead of one range
  int32_t block;   // ... that names 64, 8 or 1 neighbours at a time, from multiples of eight on
  bool aligned;    // rows of every operand begin at multiples of 16 bytes
  bool needs_h;    // the product in between is asked for (statistics)
  int capability;  // 90 for sm_90
  bool has_sm90;   // this build has kernels for it
  int multiprocessors;
  bool pairs = true;  // blocks may take tiles in clusters
};

// At most so many rows have CUDA kernels of their own, whose sums are in another order.
inline constexpr int64_t kFewRows = 16;

// The sums of the down half over K neurons on sm_90 are made of so many parts. It follows from K alone, so
// that a row's bits do not depend on the number of rows.
int ffn_parts(int64_t neurons);

// One half of the FFN by tiles of one kind.
struct FfnCandidate {
  FfnTile tile;
  int blocks_of_tile;  // 1, or one to each of ffn_parts(): their sums meet in the workspace
  int64_t tiles;
  double waves;       // blocks / multiprocessors, and how full the last wave is
  double us;          // predicted
  const char* bound;  // what takes the longest
};

// The sums that several blocks make of one result of the down half: [blocks_of_tile][rows][stride] floats.
struct FfnPartials {
  int64_t stride = 0;
  int64_t bytes = 0;  // a multiple of 64; 0 where a tile has one block
};
FfnPartials ffn_partials(const FfnCandidate& down, int64_t rows, int64_t width);

// All tiles that can serve the up (or the down) half, best predicted first.
std::vector<FfnCandidate> ffn_candidates(const FfnQuestion& question, bool up);

// Whether the one-pass kernel for few rows serves the whole FFN.
bool ffn_decodes(const FfnQuestion& question);

// A table for people.
FLASHU_FOR_OPS std::string explain_ffn(const FfnQuestion& question);

}  // namespace flashu::core
