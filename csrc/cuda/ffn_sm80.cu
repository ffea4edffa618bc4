// Gathered FFN halves in bf16 and fp16 for sm_80 and newer, and for every layout that the faster kernels do
// not take: cp.async into swizzled tiles, ldmatrix, mma.sync. Sums run over K in order, 16 at a time.
//
// A block makes 128 x 128 or 128 x 256 of a product; the up half interleaves gate and up rows by eight, so
// that both halves of a neuron end in the same thread and SiLU needs no exchange. Wide tiles have warps of
// 64 x 64, which read two thirds of the operands from shared memory for each product, but fewer of them fill
// a device.
#include <iterator>
#include <utility>

#include "core/ffn_tiles.hpp"
#include "core/typed.hpp"
#include "cuda/epilogue.cuh"
#include "cuda/ffn_gemm.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

using core::FfnTile;

constexpr int kBlockM = 128;
constexpr int kBlockK = 32;
constexpr int kStages = 4;
constexpr int kThreads = 256;  // 2 x 4 warps of 64 rows
constexpr int kChunks = kBlockK / 8;
constexpr int kFetchedRows = kThreads / kChunks;  // at once
constexpr int kTileBytesA = kBlockM * kBlockK * 2;

// How 8 neighbours of an operand in K are read.
enum class Reads {
  kVectors,  // 16 aligned bytes, fewer at the end of a row
  kValues,   // one by one: rows that are not aligned
  kListed,   // one by one, where the list says: the columns of down, unless they come in eights
};

// 16-byte chunk `chunk` of row `row`: two rows share a line of banks, so the chunks of a pair of rows are
// exchanged by the number of the pair.
FLASHU_DEVICE int chunk_offset(int row, int chunk) {
  return row * kBlockK * 2 + (chunk ^ (row / 2 & 3)) * 16;
}

// Brings 8 values to shared memory; the first `values` of them are inside, the rest become zero.
template <class T, Reads kReads>
FLASHU_DEVICE void fetch_chunk(char* to, const T* row, int64_t k, int64_t values, const FfnGemm& g) {
  if constexpr (kReads == Reads::kVectors) {
    cp_async16(to, row + k, static_cast<int>(max(values, int64_t{0})) * 2);
  } else {
    uint16_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bits[i] = 0;
      if (i >= values) continue;
      bits[i] = row[kReads == Reads::kListed ? neuron_at(g.list, k + i, g.intermediate) : k + i].bits;
    }
    const auto pair = [&](int i) { return static_cast<uint32_t>(bits[i + 1]) << 16 | bits[i]; };
    store16(to, {pair(0), pair(2), pair(4), pair(6)});
  }
}

// A row's first chunk where it begins in front of the run: zeros there.
template <class T>
FLASHU_DEVICE void fetch_lead(char* to, const T* row, int64_t values, const FfnGemm& g) {
  store16(to, {0, 0, 0, 0});
#pragma unroll 1
  for (int64_t i = g.lead; i < values; ++i) reinterpret_cast<T*>(to)[i] = row[i];
}

// What makes a kernel. kProductN: columns of its product, gate's and up's together or those of down.
template <class T_, bool kGated_, int kProductN_, Reads kReadsA_, Reads kReadsB_>
struct Config {
  using T = T_;
  static constexpr bool kGated = kGated_;
  static constexpr bool kFinishes = false;
  static constexpr int kProductN = kProductN_;
  static constexpr int kBlockN = kGated ? kProductN / 2 : kProductN;
  static constexpr Reads kReadsA = kReadsA_;
  static constexpr Reads kReadsB = kReadsB_;
  static constexpr int kWarpN = kProductN / 4;
  static constexpr int kStageBytes = kTileBytesA + kProductN * kBlockK * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Wide tiles and values that are read one by one need more registers than two blocks leave.
  static constexpr int kBlocks = kProductN == 128 && kReadsB == Reads::kVectors ? 2 : 1;
  static_assert(kSharedBytes <= 99 * 1024, "what a block may have on sm_86 and sm_89");
};

template <class C>
__global__ void __launch_bounds__(kThreads, C::kBlocks) gemm_sm80(const FfnGemm g) {
  using T = typename C::T;
  constexpr bool kGated = C::kGated;
  FLASHU_DYNAMIC_SHARED(char, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int64_t first_m = static_cast<int64_t>(blockIdx.x) * kBlockM;
  const int64_t first_n = static_cast<int64_t>(blockIdx.y) * C::kBlockN;

  // The rows that a thread fetches a chunk of stay the same in every stage.
  constexpr int kRowsA = kBlockM / kFetchedRows;
  constexpr int kRowsB = C::kProductN / kFetchedRows;
  const T* a_rows[kRowsA];
  const T* b_rows[kRowsB];
  bool a_inside[kRowsA];
  bool b_inside[kRowsB];
  const int chunk = thread % kChunks;
  const int fetched_row = thread / kChunks;
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    const int64_t r = first_m + fetched_row + i * kFetchedRows;
    a_inside[i] = r < g.m;
    a_rows[i] = static_cast<const T*>(g.a) + (a_inside[i] ? r * g.a_stride : 0);
  }
#pragma unroll
  for (int i = 0; i < kRowsB; ++i) {
    const int r = fetched_row + i * kFetchedRows;
    if constexpr (kGated) {
      const int64_t j = first_n + r / 16 * 8 + r % 8;
      b_inside[i] = j < g.n;
      const int64_t neuron = !b_inside[i]        ? 0
                             : g.list != nullptr ? neuron_at(g.list, j, g.intermediate)
                                                 : g.first + j;
      b_rows[i] = r % 16 < 8 ? static_cast<const T*>(g.b) + neuron * g.b_stride
                             : static_cast<const T*>(g.b2) + neuron * g.b2_stride;
    } else {
      const int64_t c = first_n + r;
      b_inside[i] = c < g.n;
      b_rows[i] =
          static_cast<const T*>(g.b) + (b_inside[i] ? c * g.b_stride : 0) + (g.list != nullptr ? 0 : g.first);
    }
  }
  const int steps = static_cast<int>((g.k + kBlockK - 1) / kBlockK);
  const auto fetch = [&](int step) {
    char* const stage = shared + step % kStages * C::kStageBytes;
    const int64_t k = static_cast<int64_t>(step) * kBlockK + chunk * 8;
    const int64_t values = min(int64_t{8}, g.k - k);
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      fetch_chunk<T, C::kReadsA>(stage + chunk_offset(fetched_row + i * kFetchedRows, chunk), a_rows[i], k,
                                 a_inside[i] ? values : 0, g);
    }
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      char* const to = stage + kTileBytesA + chunk_offset(fetched_row + i * kFetchedRows, chunk);
      if (!kGated && C::kReadsB == Reads::kVectors && k < g.lead) {
        fetch_lead(to, b_rows[i], b_inside[i] ? values : 0, g);
      } else {
        // Columns of down that a list names by eights.
        const bool listed = !kGated && C::kReadsB == Reads::kVectors && g.list != nullptr && values > 0;
        fetch_chunk<T, C::kReadsB>(to, b_rows[i], listed ? block_at(g.list, k, g.intermediate - 7) : k,
                                   b_inside[i] ? values : 0, g);
      }
    }
  };

  float sums[4][C::kWarpN / 8][4] = {};  // [16 rows][8 columns][register]
  const int warp_row = warp % 2 * 64;
  const int warp_column = warp / 2 * C::kWarpN;
  const auto multiply = [&](int step) {
    const char* const a = shared + step % kStages * C::kStageBytes;
    const char* const b = a + kTileBytesA;
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {
      uint32_t left[4][4];
      uint32_t right[C::kWarpN / 16][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ldmatrix_x4(left[i], a + chunk_offset(warp_row + i * 16 + lane % 16, k + lane / 16));
#pragma unroll
      for (int j = 0; j < C::kWarpN / 16; ++j)
        ldmatrix_x4(right[j], b + chunk_offset(warp_column + j * 16 + lane % 16, k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < C::kWarpN / 8; ++j)
          mma_16x8x16<T>(sums[i][j], left[i], right[j / 2][j % 2], right[j / 2][2 + j % 2]);
      }
    }
  };

  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has come, and the one before it is read
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    cp_async_commit();
    multiply(step);
  }
  cp_async_wait<0>();

  if constexpr (C::kFinishes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < C::kWarpN / 8; ++j) {
        finish<T>(sums[i][j], g.epilogue, g.n,
                  [&](int e) { return first_n + warp_column + j * 8 + lane % 4 * 2 + e % 2; });
      }
    }
  }
  const auto* const residual = static_cast<const T*>(g.residual);
  auto* const out = static_cast<T*>(g.out);
  // Whether two neighbours may be stored as one word.
  const bool words = reinterpret_cast<uintptr_t>(out) % 4 == 0 && g.out_stride % 2 == 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = first_m + warp_row + i * 16 + half * 8 + lane / 4;
      if (r >= g.m) continue;
#pragma unroll
      for (int j = 0; j < C::kWarpN / 8; j += kGated ? 2 : 1) {
        const int64_t c = first_n + (warp_column + j * 8) / (kGated ? 2 : 1) + lane % 4 * 2;
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          value[e] = sums[i][j][half * 2 + e];
          if constexpr (kGated) {
            value[e] = c + e < g.lead ? 0.0f : silu(value[e]) * sums[i][j + 1][half * 2 + e];
          } else if (residual != nullptr && c + e < g.n) {
            value[e] += to_float(residual[r * g.residual_stride + c + e]);
          }
        }
        T* const to = out + r * g.out_stride + c;
        if (words && c + 1 < g.n) {
          *reinterpret_cast<uint32_t*>(to) = pack2<T>(value[0], value[1]);
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (c + e < g.n) to[e] = from_float<T>(value[e]);
          }
        }
      }
    }
  }
}

template <class C>
void launch_gemm(const FfnGemm& g, Stream stream) {
  const LaunchConfig config{
      dim3(static_cast<unsigned>(divide_up(g.m, kBlockM)), static_cast<unsigned>(divide_up(g.n, C::kBlockN))),
      dim3(kThreads), C::kSharedBytes, stream};
  if constexpr (!C::kGated && C::kReadsB != Reads::kListed) {
    if (g.epilogue.finishes()) return launch<gemm_sm80<Finished<C>>>("gemm_sm80", config, g);
  }
  launch<gemm_sm80<C>>("gemm_sm80", config, g);
}

// kIndex: of the tile, in core::kFfnTiles.
template <class T, size_t kIndex>
bool launch_if(const FfnTile& tile, const FfnGemm& g, Stream stream, bool a_vectors, bool b_vectors) {
  constexpr FfnTile kTile = core::kFfnTiles[kIndex];
  if constexpr (kTile.kernel == core::FfnKernel::kSm80) {
    static_assert(kTile.block_m == kBlockM, "warps of 64 rows");
    constexpr bool kGated = kTile.up;
    constexpr int kProductN = kGated ? 2 * kTile.block_n : kTile.block_n;
    if (tile != kTile) return false;
    if (a_vectors && b_vectors) {
      launch_gemm<Config<T, kGated, kProductN, Reads::kVectors, Reads::kVectors>>(g, stream);
      return true;
    }
    if constexpr (kTile.fetch == core::FfnFetch::kThreads) {
      if (kGated || g.list == nullptr) {
        launch_gemm<Config<T, kGated, kProductN, Reads::kValues, Reads::kValues>>(g, stream);
      } else if constexpr (!kGated) {
        if (a_vectors) {
          launch_gemm<Config<T, kGated, kProductN, Reads::kVectors, Reads::kListed>>(g, stream);
        } else {
          launch_gemm<Config<T, kGated, kProductN, Reads::kValues, Reads::kListed>>(g, stream);
        }
      }
      return true;
    }
  }
  return false;
}

template <class T, size_t... kIndices>
bool launch_any(const FfnTile& tile, const FfnGemm& g, Stream stream, bool a_vectors, bool b_vectors,
                std::index_sequence<kIndices...>) {
  return (launch_if<T, kIndices>(tile, g, stream, a_vectors, b_vectors) || ...);
}

template <class T>
void run(const FfnTile& tile, const FfnGemm& g, Stream stream) {
  const auto* const b = static_cast<const T*>(g.b);
  const bool a_vectors = takes_vectors(static_cast<const T*>(g.a), {g.a_stride});
  bool b_vectors = takes_vectors(g.gated ? b : b + g.first, {g.b_stride});
  if (g.gated) {
    b_vectors = b_vectors && takes_vectors(static_cast<const T*>(g.b2), {g.b2_stride});
  } else if (g.list != nullptr) {
    b_vectors = b_vectors && g.block >= 8;
  }
  using All = std::make_index_sequence<std::size(core::kFfnTiles)>;
  FLASHU_CHECK(launch_any<T>(tile, g, stream, a_vectors, b_vectors, All{}), FLASHU_INTERNAL,
               "ffn: expected a tile of core::kFfnTiles for sm_80, got ", tile.block_m, " x ", tile.block_n);
}

}  // namespace

void ffn_gemm_sm80(const FfnTile& tile, const FfnGemm& g, int32_t type, Stream stream) {
  if (type == FLASHU_BF16) return run<bfloat16>(tile, g, stream);
  run<float16>(tile, g, stream);
}

}  // namespace flashu::cuda
