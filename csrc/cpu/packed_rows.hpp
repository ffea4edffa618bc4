// The left operand of the packed GEMM.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/divide_up.hpp"

namespace flashu::cpu {

inline constexpr int64_t kAlign = 64;  // bytes; every scratch buffer starts on a cache line
inline int64_t align_floats(int64_t count) { return divide_up(count, kAlign / 4) * (kAlign / 4); }

class Digits;

// Rows in register-tile order: for each block of block_k slots, for each tile of rows, [slot][tile_rows].
struct PackedRows {
  float* data;
  int64_t rows;
  int64_t slots;
  int64_t tile_rows;
  int64_t block_k;
  const Digits* digits = nullptr;  // where a row of the problem is several, of its digits

  static int64_t floats(int64_t rows, int64_t slots, int64_t tile_rows) {
    return align_floats(divide_up(rows, tile_rows) * tile_rows * slots);
  }
  int64_t tiles() const { return divide_up(rows, tile_rows); }
  int64_t rows_in(int64_t tile) const { return std::min(tile_rows, rows - tile * tile_rows); }
  // Where slot `begin` (a multiple of block_k) of a tile starts.
  float* at(int64_t tile, int64_t begin) const {
    const int64_t count = std::min(block_k, slots - begin);
    return data + begin * tiles() * tile_rows + tile * tile_rows * count;
  }
};

}  // namespace flashu::cpu
