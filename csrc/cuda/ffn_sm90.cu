// Gathered FFN halves in bf16 and fp16 for Hopper (sm_90a): TMA and mbarriers feed two warpgroups of wgmma
// from one that only fetches, in a grid that stays on the device and takes tile after tile.
//
// Floor: operations / dense rate. Prediction, to be measured: at M = 1460 and 1.5B shapes the up half has 12
// x 64 tiles of 128 x (112 + 112), 5.8 waves of 132 blocks, 97 % of the last one filled; products of K = 1536
// are 24 stages, so the epilogue (SiLU, stmatrix, TMA store) is a tenth of a tile's time and is hidden behind
// the next tile's fetches only in part. Sums run over the depth in order, 16 at a time, whatever the tile: a
// row's result does not depend on the others.
#include "core/typed.hpp"
#include "cuda/ffn_gemm.cuh"
#include "cuda/ffn_sm90.hpp"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/wgmma.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

constexpr int kTileRows = 128;  // two warpgroups of 64
constexpr int kDepth = kBoxColumns;
constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * 128;
constexpr int kRowBytes = kBoxRowBytes;
constexpr int kTileBytesA = kTileRows * kRowBytes;
constexpr int kGroupBytes = 64 * kRowBytes;  // 64 rows x 64 columns: what a warpgroup hands to TMA at once
constexpr int kSharedLimit = 227 * 1024;

// How the weights of a tile are fetched.
enum class Fetch {
  kRange,   // one box of TMA for all rows
  kBlocks,  // boxes of eight rows, where the list says
  kRows,    // cp.async by row, where the list says
};

// What a kernel is made for. kColumns: neurons of a tile in the up half, columns of a tile in the down half.
template <class T_, bool kGated_, int kColumns_, Fetch kFetch_>
struct Tile {
  using T = T_;
  static constexpr bool kGated = kGated_;
  static constexpr int kColumns = kColumns_;
  static constexpr Fetch kFetch = kFetch_;
  static constexpr int kProductColumns = kGated ? 2 * kColumns : kColumns;
  static constexpr int kTileBytesB = kProductColumns * kRowBytes;
  static constexpr int kStageBytes = kTileBytesA + kTileBytesB;
  static constexpr int kOutBytes = kConsumers * 2 * kGroupBytes;  // two groups in flight for each warpgroup
  static constexpr int kStages = (kSharedLimit - 1024 - kOutBytes) / kStageBytes > 6
                                     ? 6
                                     : (kSharedLimit - 1024 - kOutBytes) / kStageBytes;
  static constexpr int kSharedBytes = 1024 + kOutBytes + kStages * kStageBytes;
  // ptxas puts what is not dynamic (a tile's part of the list) before it, and the boxes' alignment makes that
  // a KiB.
  static_assert(kSharedBytes + 1024 <= 227 * 1024, "the list's part of a tile has to fit too");
  static_assert(kStages >= 3, "fewer stages do not hide a fetch");
  static_assert(kColumns % 8 == 0 && kColumns >= 64 && kProductColumns <= 256,
                "what wgmma and the epilogue take");
};

// Everything by value: tensor maps must be kernel arguments.
struct Maps {
  TensorMap a, b, b2, out;
};

struct Barriers {
  Mbarrier full[6];
  Mbarrier empty[6];
};

struct TileOrder {
  int64_t row_tiles, tiles;
  FLASHU_DEVICE int64_t first_row(int64_t tile) const { return tile % row_tiles * kTileRows; }
  template <class C>
  FLASHU_DEVICE int64_t first_column(int64_t tile) const {
    return tile / row_tiles * C::kColumns;
  }
};

// The position in the ring of stages that a thread has reached.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;
  FLASHU_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the warpgroup that fetches

template <class C>
FLASHU_DEVICE void fetch_range(const Maps& maps, const FfnGemm& g, char* b, int64_t column, int64_t k,
                               Mbarrier* full) {
  if constexpr (C::kGated) {
    tma_load(b, maps.b, static_cast<int>(k), static_cast<int>(g.first + column), full);
    tma_load(b + C::kTileBytesB / 2, maps.b2, static_cast<int>(k), static_cast<int>(g.first + column), full);
  } else {
    tma_load(b, maps.b, static_cast<int>(g.first + k), static_cast<int>(column), full);
  }
}

// The first neuron of a lane's box of eight. Boxes past the list lie outside the weights and become zero.
template <class C>
FLASHU_DEVICE int neuron_of_box(const FfnGemm& g, int64_t column, int lane) {
  static_assert(C::kProductColumns / 8 == kWarp, "a lane to each box");
  const int64_t j = column + lane % (C::kColumns / 8) * 8;
  return j < g.columns ? g.list[j] : static_cast<int>(g.intermediate);
}

template <class C>
FLASHU_DEVICE void fetch_blocks(const Maps& maps, char* b, int neuron, int64_t k, int lane, Mbarrier* full) {
  char* const to = b + lane * 8 * kRowBytes;
  // Two calls: cicc 13.0 crashes on a reference to one or the other kernel argument.
  if (lane >= C::kColumns / 8) {
    tma_load(to, maps.b2, static_cast<int>(k), neuron, full);
  } else {
    tma_load(to, maps.b, static_cast<int>(k), neuron, full);
  }
}

// All 128 threads: eight lanes to a row of 128 bytes.
template <class C>
FLASHU_DEVICE void fetch_rows(const FfnGemm& g, char* b, const int32_t* neurons, int64_t k, int thread) {
  using T = typename C::T;
  const int chunk = thread % 8;
  const int64_t at = k + chunk * 8;
  // The last values of a row are a part of a chunk where hidden is no multiple of eight; behind them may be
  // anything.
  const int64_t values = min(max(g.depth - at, int64_t{0}), int64_t{8});
  static_assert(C::kProductColumns % 16 == 0, "16 rows at a time");
#pragma unroll 4
  for (int i = 0; i < C::kProductColumns / 16; ++i) {
    const int row = thread / 8 + i * 16;
    const int32_t neuron = neurons[row % C::kColumns];
    const bool second = row >= C::kColumns;
    const auto* const weights = static_cast<const T*>(second ? g.b2 : g.b);
    const int64_t stride = second ? g.b2_stride : g.b_stride;
    const bool inside = neuron >= 0 && values > 0;
    cp_async16(b + row * kRowBytes + (chunk ^ row % 8) * 16, weights + (inside ? neuron * stride + at : 0),
               inside ? static_cast<int>(values) * 2 : 0);
  }
}

// Copies by ordinary threads run this many stages ahead of the one that is handed over.
constexpr int kCopiesAhead = 1;

template <class C>
FLASHU_DEVICE void fetch_tiles(const FfnGemm& g, const Maps& maps, const TileOrder& order, Barriers* barriers,
                               char* stages) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warp = thread / kWarp;
  const int steps = static_cast<int>((g.depth + kDepth - 1) / kDepth);
  Ring<C::kStages> ring;
  if constexpr (C::kFetch != Fetch::kRows) {
    if (warp != 0) return;
    const int lane = thread;
    if (C::kFetch == Fetch::kRange && lane != 0) return;
    for (int64_t tile = blockIdx.x; tile < order.tiles; tile += gridDim.x) {
      const int64_t row = order.first_row(tile);
      const int64_t column = order.template first_column<C>(tile);
      [[maybe_unused]] int neuron = 0;
      if constexpr (C::kFetch == Fetch::kBlocks) neuron = neuron_of_box<C>(g, column, lane);
      for (int step = 0; step < steps; ++step) {
        const int64_t k = static_cast<int64_t>(step) * kDepth;
        Mbarrier* const full = &barriers->full[ring.stage];
        char* const a = stages + ring.stage * C::kStageBytes;
        char* const b = a + kTileBytesA;
        mbarrier_wait(&barriers->empty[ring.stage], ring.parity ^ 1);
        if (lane == 0) {
          mbarrier_expect(full, C::kStageBytes);
          tma_load(a, maps.a, static_cast<int>(k), static_cast<int>(row), full);
        }
        if constexpr (C::kFetch == Fetch::kRange) {
          fetch_range<C>(maps, g, b, column, k, full);
        } else {
          __syncwarp();  // no box before its bytes are expected
          fetch_blocks<C>(maps, b, neuron, k, lane, full);
        }
        ring.advance();
      }
    }
  } else {
    // The list's part of a tile stands in shared memory: 256 rows of pointers do not fit into this group's
    // registers.
    FLASHU_SHARED(int32_t, neurons, C::kColumns);
    Ring<C::kStages> arrived;  // the oldest stage whose copies have not been handed over
    int pending = 0;
    const auto hand_over = [&] {
      fence_proxy_async();  // what cp.async wrote is read by wgmma
      mbarrier_arrive(&barriers->full[arrived.stage]);
      arrived.advance();
      --pending;
    };
    for (int64_t tile = blockIdx.x; tile < order.tiles; tile += gridDim.x) {
      const int64_t row = order.first_row(tile);
      const int64_t column = order.template first_column<C>(tile);
      named_barrier(1, 128);  // the last tile's list is not read any more
      for (int j = thread; j < C::kColumns; j += 128)
        neurons[j] = column + j < g.columns ? g.list[column + j] : -1;
      named_barrier(1, 128);
      for (int step = 0; step < steps; ++step) {
        const int64_t k = static_cast<int64_t>(step) * kDepth;
        char* const a = stages + ring.stage * C::kStageBytes;
        mbarrier_wait(&barriers->empty[ring.stage], ring.parity ^ 1);
        if (thread == 0) {
          mbarrier_expect(&barriers->full[ring.stage], kTileBytesA);
          tma_load(a, maps.a, static_cast<int>(k), static_cast<int>(row), &barriers->full[ring.stage]);
        }
        fetch_rows<C>(g, a + kTileBytesA, neurons, k, thread);
        cp_async_commit();
        ring.advance();
        if (++pending > kCopiesAhead) {
          cp_async_wait<kCopiesAhead>();
          hand_over();
        }
      }
    }
    cp_async_wait<0>();
    while (pending > 0) hand_over();
  }
}

// ---- the warpgroups that multiply

// 64 rows x 64 columns of the result, from registers to TMA's layout. `value(j)`: the two values of the
// thread's row `half` in columns 8 j + lane % 4 * 2.
template <class T, class Value>
FLASHU_DEVICE void write_group(char* box, int warp, int lane, const Value& value) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = value(j + i / 2, i % 2);
      words[i] = pack2<T>(pair.x, pair.y);
    }
    const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
    const int chunk = j + lane / 16;
    stmatrix_x4(box + row * kRowBytes + (chunk ^ row % 8) * 16, words);
  }
}

template <class C>
FLASHU_DEVICE void multiply_tiles(const FfnGemm& g, const Maps& maps, const TileOrder& order,
                                  Barriers* barriers, char* stages, char* outs) {
  using T = typename C::T;
  // The same in all lanes, which the compiler cannot know: it keeps descriptors in uniform registers then.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int steps = static_cast<int>((g.depth + kDepth - 1) / kDepth);
  char* const own_outs = outs + group * 2 * kGroupBytes;
  const auto* const residual = static_cast<const T*>(g.residual);
  Ring<C::kStages> ring;
  int out_slot = 0;
  for (int64_t tile = blockIdx.x; tile < order.tiles; tile += gridDim.x) {
    float sums[C::kProductColumns / 2];
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      const char* const a = stages + ring.stage * C::kStageBytes + group * kGroupBytes;
      const char* const b = stages + ring.stage * C::kStageBytes + kTileBytesA;
      mbarrier_wait(&barriers->full[ring.stage], ring.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        wgmma<C::kProductColumns, T, Major::kDepth>(sums, wgmma_descriptor<Major::kDepth>(a + k * 32, 0),
                                                    wgmma_descriptor<Major::kDepth>(b + k * 32, 0),
                                                    step + k > 0);
      }
      wgmma_commit();
      // One step stays under way; the stage of the one before it is free.
      wgmma_wait<1>();
      if (step > 0 && lane == 0) mbarrier_arrive(&barriers->empty[previous]);
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&barriers->empty[previous]);
#pragma unroll
    for (int i = 0; i < C::kProductColumns / 2; ++i) wgmma_touch(sums[i]);

    const int64_t first_row = order.first_row(tile) + group * 64;
    const int64_t first_column = order.template first_column<C>(tile);
#pragma unroll
    for (int part = 0; part < C::kColumns; part += 64) {
      // The last part of a width that is no multiple of 64 begins earlier and says some columns twice: a
      // whole box would reach into the next tile.
      const int column = part + 64 <= C::kColumns ? part : C::kColumns - 64;
      char* const box = own_outs + out_slot * kGroupBytes;
      // The store before last has left this box.
      if (thread == 0) tma_store_wait_read<1>();
      named_barrier(2 + group, 128);
      write_group<T>(box, warp, lane, [&](int j, int half) {
        const int at = (column / 8 + j) * 4 + half * 2;
        float2 value{sums[at], sums[at + 1]};
        if constexpr (C::kGated) {
          const float* const up = sums + C::kColumns / 2;
          value = {silu(value.x) * up[at], silu(value.y) * up[at + 1]};
        } else if (residual != nullptr) {
          const int64_t r = first_row + warp * 16 + half * 8 + lane / 4;
          const int64_t c = first_column + column + j * 8 + lane % 4 * 2;
          if (r < g.rows && c < g.columns) value.x += to_float(residual[r * g.residual_stride + c]);
          if (r < g.rows && c + 1 < g.columns) value.y += to_float(residual[r * g.residual_stride + c + 1]);
        }
        return value;
      });
      fence_proxy_async();  // stmatrix wrote what TMA reads
      named_barrier(2 + group, 128);
      if (thread == 0 && first_column + column < g.columns) {
        tma_store(maps.out, box, static_cast<int>(first_column + column), static_cast<int>(first_row));
      }
      if (thread == 0) tma_store_commit();
      out_slot ^= 1;
    }
  }
  if (thread == 0) tma_store_wait_read<0>();
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90(const FfnGemm g, const __grid_constant__ Maps maps, const TileOrder order) {
  FLASHU_DYNAMIC_SHARED(char, shared);
  auto* const barriers = reinterpret_cast<Barriers*>(shared);
  char* const outs = shared + 1024;
  char* const stages = outs + C::kOutBytes;
  static_assert(sizeof(Barriers) <= 1024, "the barriers have the first KiB");
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      // Full: the thread that expects TMA's bytes, and every thread that copies rows. Empty: every warp that
      // multiplies, since a warp knows of its own products only.
      mbarrier_init(&barriers->full[s], C::kFetch == Fetch::kRows ? 1 + 128 : 1);
      mbarrier_init(&barriers->empty[s], kConsumers * 4);
    }
    mbarrier_init_fence();
    tma_prefetch(maps.a);
    tma_prefetch(maps.b);
    if (C::kGated) tma_prefetch(maps.b2);
    tma_prefetch(maps.out);
  }
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x / 128 == kConsumers) {
    give_registers<40>();
    fetch_tiles<C>(g, maps, order, barriers, stages);
  } else {
    take_registers<232>();
    multiply_tiles<C>(g, maps, order, barriers, stages, outs);
  }
}

template <class C>
void launch_tile(const FfnGemm& g, Stream stream, int multiprocessors) {
  const int box_b = C::kFetch == Fetch::kBlocks ? 8 : C::kColumns;
  Maps maps{};
  maps.a = encode_tensor_map(g.a, g.rows, g.depth, g.a_stride, kTileRows);
  maps.out = encode_tensor_map(g.out, g.rows, g.columns, g.out_stride, 64);
  if (C::kFetch == Fetch::kRows) {
    maps.b = maps.b2 = maps.a;  // not used
  } else if (C::kGated) {
    // Rows past the selected range are other neurons; they are made, and cut off by the map of the result.
    maps.b = encode_tensor_map(g.b, g.intermediate, g.depth, g.b_stride, box_b);
    maps.b2 = encode_tensor_map(g.b2, g.intermediate, g.depth, g.b2_stride, box_b);
  } else {
    // The depth ends with the selected range: what lies behind it may be anything, NaN too.
    maps.b = encode_tensor_map(g.b, g.columns, g.first + g.depth, g.b_stride, box_b);
    maps.b2 = maps.b;
  }
  const TileOrder order{divide_up(g.rows, kTileRows),
                        divide_up(g.rows, kTileRows) * divide_up(g.columns, C::kColumns)};
  const Launch how{dim3(static_cast<unsigned>(std::min<int64_t>(order.tiles, multiprocessors))),
                   dim3(kThreads), C::kSharedBytes, stream, true};
  launch("gemm_sm90", gemm_sm90<C>, how, g, maps, order);
}

template <class T, bool kGated, int kColumns, Fetch kFetch>
void made_for(const FfnGemm& g, Stream stream, int multiprocessors) {
  launch_tile<Tile<T, kGated, kColumns, kFetch>>(g, stream, multiprocessors);
}

template <class T>
void run(const FfnGemm& g, int columns, Stream stream, int multiprocessors) {
  if (!g.gated()) {
    if (columns == 256) return made_for<T, false, 256, Fetch::kRange>(g, stream, multiprocessors);
    if (columns == 192) return made_for<T, false, 192, Fetch::kRange>(g, stream, multiprocessors);
    return made_for<T, false, 128, Fetch::kRange>(g, stream, multiprocessors);
  }
  if (g.list == nullptr) {
    if (columns == 128) return made_for<T, true, 128, Fetch::kRange>(g, stream, multiprocessors);
    if (columns == 112) return made_for<T, true, 112, Fetch::kRange>(g, stream, multiprocessors);
    return made_for<T, true, 64, Fetch::kRange>(g, stream, multiprocessors);
  }
  if (g.blocks_of_8) return made_for<T, true, 128, Fetch::kBlocks>(g, stream, multiprocessors);
  made_for<T, true, 128, Fetch::kRows>(g, stream, multiprocessors);
}

}  // namespace

void ffn_gemm_sm90(const FfnGemm& g, int32_t type, int columns, Stream stream, int multiprocessors) {
  if (type == FLASHU_BF16) return run<bfloat16>(g, columns, stream, multiprocessors);
  run<float16>(g, columns, stream, multiprocessors);
}

}  // namespace flashu::cuda
