// The linear layer for at most 16 rows (decoding). A block takes 16 columns of the result: each of its warps
// streams a share of K of their weights, and the shares are added in order. The shares follow from K alone,
// and a row's sums from the row alone.
//
// Floor: the weights' bytes / bandwidth. How rows are multiplied is said in few_rows.cuh. The rows themselves
// are few enough to stay in L1, so nothing is waited for before the first weights are asked for.
#include "core/typed.hpp"
#include "cuda/epilogue.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/linear_few_rows.hpp"

namespace flashu::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kShares = kThreads / kWarp;  // of K
// Steps: what eight warps ask for together is enough for memory's latency. In fp32 lanes read all rows, and
// registers are too few for more.
template <class T>
constexpr int kAhead = sizeof(T) == 4 ? 2 : 4;
// Of a row of a share's sums in shared memory: lanes that store together do not meet in a bank.
constexpr int kSumStride = kGroupRows + 4;

// 16 bytes of a row of `count` values from k on, zeros behind its last one. Weights are read once.
template <class T, bool kVectors, bool kOnce>
FLASHU_DEVICE uint4 row_chunk(const T* row, int64_t k, int64_t count) {
  if constexpr (kVectors) {
    if (k >= count) return {0, 0, 0, 0};
    return kOnce ? load16_streaming(row + k) : load16(row + k);
  } else {
    return chunk_by_value<T>(count - k, [&](int i) -> uint32_t {
      if constexpr (sizeof(T) == 4) {
        return __float_as_uint(row[k + i]);
      } else {
        return row[k + i].bits;
      }
    });
  }
}

// kVectors: rows of both operands are whole vectors. kTiles: of 8 rows.
template <class T, int kTiles, bool kVectors>
__global__ void __launch_bounds__(kThreads) multiply_few_rows(const FfnGemm g) {
  constexpr int kRows = kTiles * kTileRows;
  static_assert(kRows * kGroupRows <= kThreads, "a thread ends at most one result");
  FLASHU_SHARED(float, parts, kShares * kRows * kSumStride);  // [share][row][column]
  const int thread = static_cast<int>(threadIdx.x);
  const int share = thread / kWarp;
  const int lane = thread % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGroupRows;
  const int64_t steps = divide_up(g.k, kStep<T>);
  float sums[1][kTiles][kLaneSums<T>] = {};
  multiply_rows<T, kAhead<T>, true>(
      sums, lane, steps * share / kShares * kStep<T>, steps * (share + 1) / kShares * kStep<T>,
      [&](int, int half, int64_t k) {
        const int64_t column = first + lane / 4 + half * 8;
        if (column >= g.n) return uint4{0, 0, 0, 0};
        return row_chunk<T, kVectors, true>(static_cast<const T*>(g.b) + column * g.b_stride, k, g.k);
      },
      [&](int tile, int in_tile, int64_t k) {
        const int64_t row = tile * kTileRows + in_tile;
        if (row >= g.m) return uint4{0, 0, 0, 0};
        return row_chunk<T, kVectors, false>(static_cast<const T*>(g.a) + row * g.a_stride, k, g.k);
      });
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float totals[4] = {};
    collect_sums<T>(totals, sums[0][tile], lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile * kTileRows + lane % 4 * 2 + i % 2;
      parts[(share * kRows + row) * kSumStride + lane / 4 + i / 2 * 8] = totals[i];
    }
  }
  __syncthreads();
  const int row = thread / kGroupRows;
  const int64_t column = first + thread % kGroupRows;
  if (row >= g.m || column >= g.n) return;
  float total[1] = {};
#pragma unroll
  for (int s = 0; s < kShares; ++s) total[0] += parts[(s * kRows + row) * kSumStride + thread % kGroupRows];
  finish<T>(total, g.epilogue, g.n, [column](int) { return column; });
  if (g.residual != nullptr) {
    total[0] += to_float(static_cast<const T*>(g.residual)[row * g.residual_stride + column]);
  }
  static_cast<T*>(g.out)[row * g.out_stride + column] = from_float<T>(total[0]);
}

template <class T, int kTiles, bool kVectors>
void launch_tiles(const FfnGemm& g, Stream stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(g.n, kGroupRows))), dim3(kThreads), 0,
                            stream};
  launch<multiply_few_rows<T, kTiles, kVectors>>("multiply_few_rows", config, g);
}

}  // namespace

void linear_few_rows(const FfnGemm& g, int32_t type, Stream stream) {
  core::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const bool vectors = g.k % kPerVector<T> == 0 &&
                         takes_vectors(static_cast<const T*>(g.a), {g.a_stride}) &&
                         takes_vectors(static_cast<const T*>(g.b), {g.b_stride});
    // Others are rare, and slow with one tile too.
    if (!vectors) return launch_tiles<T, 2, false>(g, stream);
    if (g.m <= kTileRows) return launch_tiles<T, 1, true>(g, stream);
    launch_tiles<T, 2, true>(g, stream);
  });
}

}  // namespace flashu::cuda
