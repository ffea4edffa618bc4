// The tiles of the CUDA kernels of the gathered FFN: the choice picks from this table, and exactly its
// entries are compiled.
#pragma once

#include <cstdint>

namespace flashu::core {

enum class FfnKernel { kF32, kSm80, kSm90 };

// How the weights of a tile come to shared memory.
enum class FfnFetch {
  kThreads,  // by every thread, from wherever they lie
  kRange,    // one box of TMA for all rows of up; the columns of down from one neuron or a list's block of 64
             // on
  kRuns,     // boxes of TMA of 64 rows, where the list says
  kBlocks,   // boxes of TMA of eight rows, where the list says
  kRows,     // cp.async by row, where the list says
  kVectors,  // by every thread, 16 bytes at a time: aligned rows, and of down no list of single neurons
};

// A tile of one half: block_m rows of the result by block_n columns, which are neurons in the up half (with
// gate and up its product is twice as wide).
struct FfnTile {
  FfnKernel kernel;
  bool up;
  FfnFetch fetch;
  int block_m, block_n;
  // Blocks that take tiles of neighbouring rows and the same columns at the same time, each of which fetches
  // its rows and a share of the columns for all of them.
  int cluster = 1;

  friend constexpr bool operator==(const FfnTile&, const FfnTile&) = default;
};

// Of tiles that are predicted to take the same time the first one is chosen.
inline constexpr FfnTile kFfnTiles[] = {
    {FfnKernel::kF32, true, FfnFetch::kThreads, 64, 64},
    {FfnKernel::kF32, false, FfnFetch::kThreads, 64, 64},
    {FfnKernel::kSm80, true, FfnFetch::kThreads, 128, 64},
    {FfnKernel::kSm80, true, FfnFetch::kVectors, 128, 128},
    {FfnKernel::kSm80, false, FfnFetch::kThreads, 128, 128},
    {FfnKernel::kSm80, false, FfnFetch::kVectors, 128, 256},
    {FfnKernel::kSm90, true, FfnFetch::kRange, 128, 128},
    {FfnKernel::kSm90, true, FfnFetch::kRange, 128, 112},
    {FfnKernel::kSm90, true, FfnFetch::kRange, 128, 64},
    {FfnKernel::kSm90, true, FfnFetch::kRange, 128, 128, 2},
    {FfnKernel::kSm90, true, FfnFetch::kRange, 128, 112, 2},
    {FfnKernel::kSm90, true, FfnFetch::kRuns, 128, 128},
    {FfnKernel::kSm90, true, FfnFetch::kRuns, 128, 64},
    {FfnKernel::kSm90, true, FfnFetch::kRuns, 128, 128, 2},
    {FfnKernel::kSm90, true, FfnFetch::kBlocks, 128, 128},
    {FfnKernel::kSm90, true, FfnFetch::kBlocks, 128, 128, 2},
    {FfnKernel::kSm90, true, FfnFetch::kRows, 128, 128},
    {FfnKernel::kSm90, false, FfnFetch::kRange, 128, 192},
    {FfnKernel::kSm90, false, FfnFetch::kRange, 128, 128},
    {FfnKernel::kSm90, false, FfnFetch::kRange, 128, 64},
    {FfnKernel::kSm90, false, FfnFetch::kRange, 128, 192, 2},
    {FfnKernel::kSm90, false, FfnFetch::kRange, 128, 128, 2},
};

inline constexpr FfnTile kF32Tile = kFfnTiles[0];

}  // namespace flashu::core
