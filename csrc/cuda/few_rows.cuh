// Products of at most 16 rows with rows of weights, each of which is read once: the core of the kernels of
// the FFN and of the linear layer for few rows.
//
// The rows ride along: a warp multiplies 16 rows of weights by 8 rows of the input, or by two times 8. In 16
// bits weights are the left operand of mma.sync and the rows the right one; in fp32 lanes multiply and add.
// Each lane loads 16 bytes of a weight row and uses them as they come: the order of K inside a step is the
// same for both operands, so it does not matter.
#pragma once

#include "core/ffn_choice.hpp"
#include "cuda/primitives/mma.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {

inline constexpr int kTileRows = 8;    // of the input
inline constexpr int kGroupRows = 16;  // of weights
static_assert(core::kFewRows == 2 * kTileRows, "kernels are compiled for one tile and for two");

// A step of K: four lanes with 16 bytes each.
template <class T>
inline constexpr int kStep = 4 * kPerVector<T>;

// Rows of a tile that a lane reads, and its sums. mma.sync shares rows among lanes, fp32 does not.
template <class T>
inline constexpr int kLaneRows = sizeof(T) == 4 ? kTileRows : 1;
template <class T>
inline constexpr int kLaneSums = sizeof(T) == 4 ? 2 * kTileRows : 4;

// sums += 16 rows of weights by a tile over a step of K. `low` and `high` are of the weights g and g + 8 with
// g = lane / 4; `rows` is row g of the tile, or in fp32 all of them.
template <class T>
FLASHU_DEVICE void multiply_chunks(float (&sums)[kLaneSums<T>], const uint4& low, const uint4& high,
                                   const uint4 (&rows)[kLaneRows<T>]) {
  if constexpr (sizeof(T) == 4) {
    const Vector<T> weights[2] = {widen<T>(low), widen<T>(high)};
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<T> row = widen<T>(rows[r]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = sums[half * kTileRows + r];
#pragma unroll
        for (int i = 0; i < kPerVector<T>; ++i) sum = fmaf(weights[half].value[i], row.value[i], sum);
      }
    }
  } else {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
    mma_16x8x16<T>(sums, first, rows[0].x, rows[0].y);
    mma_16x8x16<T>(sums, second, rows[0].z, rows[0].w);
  }
}

// sums += kGroups times 16 rows of weights by kTiles tiles, over K from `begin`, where a step begins, to
// `end`. The weights' loads of kAhead steps are under way together, and with kRowsAhead those of the rows:
// where they are in global memory, not in shared memory.
//   weights(group, half, k): 16 bytes of row lane / 4 + 8 half of a group
//   rows(tile, row, k): of a row of a tile
// Both are zero for rows that do not exist and behind the last value of K.
template <class T, int kAhead, bool kRowsAhead, int kGroups, int kTiles, class Weights, class Rows>
FLASHU_DEVICE void multiply_rows(float (&sums)[kGroups][kTiles][kLaneSums<T>], int lane, int64_t begin,
                                 int64_t end, const Weights& weights, const Rows& rows) {
  const int of_lane = lane % 4 * kPerVector<T>;
  const auto load_rows = [&](uint4(&of_rows)[kTiles][kLaneRows<T>], int64_t k) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int r = 0; r < kLaneRows<T>; ++r)
        of_rows[tile][r] = rows(tile, kLaneRows<T> == 1 ? lane / 4 : r, k);
    }
  };
  for (int64_t k0 = begin; k0 < end; k0 += kAhead * kStep<T>) {
    uint4 chunks[kAhead][kGroups][2];
    uint4 of_rows[kRowsAhead ? kAhead : 1][kTiles][kLaneRows<T>];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int64_t k = k0 + s * kStep<T> + of_lane;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          chunks[s][group][half] = kAhead == 1 || k < end ? weights(group, half, k) : uint4{0, 0, 0, 0};
      }
      if constexpr (kRowsAhead) load_rows(of_rows[s], k);
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (k0 + s * kStep<T> >= end) break;
      if constexpr (!kRowsAhead) load_rows(of_rows[0], k0 + s * kStep<T> + of_lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          multiply_chunks<T>(sums[group][tile], chunks[s][group][0], chunks[s][group][1],
                             of_rows[kRowsAhead ? s : 0][tile]);
        }
      }
    }
  }
}

// A lane's four sums of a group by a tile: number i is that of weights lane / 4 + i / 2 * 8 and row
// lane % 4 * 2 + i % 2.
template <class T>
FLASHU_DEVICE void collect_sums(float (&totals)[4], const float (&sums)[kLaneSums<T>], int lane) {
#pragma unroll
  for (int i = 0; i < kLaneSums<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      const float total = sum_group<4>(sums[i]);
      if (i % kTileRows / 2 == lane % 4) totals[i / kTileRows * 2 + i % 2] = total;
    } else {
      totals[i] = sums[i];
    }
  }
}

// Up to 16 bytes of values that may lie anywhere: at(i) as bits for the first `count`, then zeros.
template <class T, class At>
FLASHU_DEVICE uint4 chunk_by_value(int64_t count, const At& at) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (i < count)
      words[i * static_cast<int>(sizeof(T)) / 4] |= at(i) << (i * 8 * static_cast<int>(sizeof(T)) % 32);
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace flashu::cuda
