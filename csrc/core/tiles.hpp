// Blocking of the CPU GEMM: problem -> candidates -> predicted cost -> choice. Pure and printable. (Tiles of
// the CUDA kernels: ffn_tiles.hpp and ffn_choice.hpp.)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flashu::core {

// A GEMM of packed rows with panels of weights: [m, k] x [k, n].
struct GemmProblem {
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t element_bytes;  // of the weights as stored: 4, or 2 for bf16 and f16
  int64_t slot_values;    // k that one multiplication takes: 1, or 2 for bf16 pairs
  int64_t threads;
  int64_t tile_rows;  // of the register tile of the instruction set
  int64_t panel_columns;
  bool gathered;  // weights along k come from a list, not from one range
};

// How the loops of csrc/cpu/gemm.cpp are blocked.
struct GemmTiles {
  const char*
      name;  // "stream": weights pass through L1 once; "panels": packed panels stay in L2 for a block of rows
  int64_t chunk_m;  // rows that share one packing of the weights
  int64_t block_m;  // rows whose packed operand stays in L2 while the panels of a block are multiplied
  int64_t block_k;  // packed slots, a multiple of the summation block
  int64_t panels;   // panels packed together
};

struct TileCandidate {
  GemmTiles tiles;
  double multiply_us;  // register tiles, at the measured rate
  double pack_us;      // weights into panels, per row chunk
  double memory_us;    // weights from memory, and the rows again for every block of panels
  double total_us;
};

// All candidates, best predicted first; never empty for a valid problem.
std::vector<TileCandidate> gemm_candidates(const GemmProblem& problem);

inline GemmTiles choose_gemm_tiles(const GemmProblem& problem) {
  return gemm_candidates(problem).front().tiles;
}

// A table of the candidates, one line each, the choice first.
std::string explain_gemm_tiles(const GemmProblem& problem);

}  // namespace flashu::core
