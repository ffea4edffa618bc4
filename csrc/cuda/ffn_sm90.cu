// Gathered FFN halves in bf16 and fp16 for Hopper (sm_90a): TMA and mbarriers feed two warpgroups of wgmma
// from one that only fetches, in a grid that stays on the device and takes tile after tile.
//
// Floor: operations / dense rate. Prediction, to be measured: at M = 1460 and 1.5B shapes the up half has 12
// x 64 tiles of 128 x (112 + 112), 5.8 waves of 132 blocks, 97 % of the last one filled; products of K = 1536
// are 24 stages, so the epilogue (SiLU, stmatrix, TMA store) is a tenth of a tile's time and is hidden behind
// the next tile's fetches only in part. Sums run over K in order, 16 at a time, whatever the tile: a
// row's result does not depend on the others.
//
// The down half has few tiles and a long K (24 tiles for 64 rows at 1.5B). Its sums are made of up to four
// parts of K, as K alone decides. Where the tiles do not fill the device a block makes one part, and
// ffn_sum() adds them; elsewhere a block makes all of them and adds them in the same order, in a second set
// of registers.
//
// Where there are several rows of tiles two blocks form a cluster: one fetches gate for both of them and the
// other one up, or each a half of down's columns, so that L2 gives a third less. Predicted times:
// docs/redesigns.md.
#include <iterator>
#include <utility>

#include "core/ffn_tiles.hpp"
#include "core/typed.hpp"
#include "cuda/epilogue.cuh"
#include "cuda/ffn_gemm.cuh"
#include "cuda/ffn_sm90.hpp"
#include "cuda/primitives/cluster.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/wgmma.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

constexpr int kConsumers = 2;  // warpgroups of 64 rows
constexpr int kBlockM = kConsumers * 64;
constexpr int kBlockK = kBoxColumns;
constexpr int kThreads = (kConsumers + 1) * 128;
constexpr int kRowBytes = kBoxRowBytes;
constexpr int kTileBytesA = kBlockM * kRowBytes;
constexpr int kGroupBytes = 64 * kRowBytes;  // 64 rows x 64 columns: what a warpgroup hands to TMA at once
constexpr int kSharedLimit = 227 * 1024;

using core::FfnTile;
using Fetch = core::FfnFetch;

// What a tile of values of T makes of the kernel.
template <class T_, bool kGated_, int kBlockN_, Fetch kFetch_, int kCluster_>
struct Config {
  using T = T_;
  static constexpr bool kGated = kGated_;
  static constexpr bool kFinishes = false;
  static constexpr int kBlockN = kBlockN_;
  static constexpr Fetch kFetch = kFetch_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kProductN = kGated ? 2 * kBlockN : kBlockN;
  static constexpr int kTileBytesB = kProductN * kRowBytes;
  // Of the weights, in the up half gate's first. Of a range of down each block of a cluster fetches a box.
  static constexpr int kBoxRows = kFetch == Fetch::kRuns     ? 64
                                  : kFetch == Fetch::kBlocks ? 8
                                  : kGated                   ? kBlockN
                                                             : kBlockN / kCluster;
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
  static_assert(kBlockN % 8 == 0 && kBlockN >= 64 && kProductN <= 256, "what wgmma and the epilogue take");
  static_assert(kCluster == 1 || (kCluster == 2 && kFetch != Fetch::kRows && kBoxRows % 8 == 0),
                "the weights are fetched in two halves of whole swizzled boxes");
};

// Of the weights in a stage.
template <class C>
constexpr int kBoxes = C::kProductN / C::kBoxRows;

// Everything by value: tensor maps must be kernel arguments.
struct Maps {
  TensorMap a, b, b2, out;
};

struct Barriers {
  Mbarrier full[6];
  Mbarrier empty[6];
};

// The columns of a result of n columns that TMA stores: those in whole chunks, which it does not divide.
constexpr int64_t stored_by_tma(int64_t n) { return n / kChunkColumns * kChunkColumns; }

// What blocks take one after another: tiles with all parts of K, or, where the parts are spread over blocks,
// all tiles of one part and then of the next. tiles_m is a multiple of the blocks of a cluster, as the grid
// is: they take neighbouring rows of the same columns and parts at the same time, and equally many pieces. A
// tile whose rows are all past the last one has zeros to multiply and nothing to store.
struct WorkOrder {
  int64_t tiles_m, tiles, pieces;
  int steps;  // of K
  int parts;  // of the steps
  bool spread;
  FLASHU_DEVICE int64_t first_m(int64_t piece) const { return piece % tiles % tiles_m * kBlockM; }
  template <class C>
  FLASHU_DEVICE int64_t first_n(int64_t piece) const {
    return piece % tiles / tiles_m * C::kBlockN;
  }
  FLASHU_DEVICE int first_part(int64_t piece) const { return spread ? static_cast<int>(piece / tiles) : 0; }
  FLASHU_DEVICE int end_part(int64_t piece) const { return spread ? first_part(piece) + 1 : parts; }
  FLASHU_DEVICE int first_step(int part) const { return steps * part / parts; }
};

// The position in the ring of stages that a thread has reached.
template <int kStages>
struct Ring {
  int stage = 0;
  int phase = 0;
  FLASHU_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---- the warpgroup that fetches

// A box of weights, to all blocks of the cluster. Its bytes may come to another block's barrier before that
// block has expected any: the phase there stays open until it has, since that is an arrival too.
template <class C>
FLASHU_DEVICE void fetch_weights(char* to, const TensorMap& map, int64_t column, int64_t row,
                                 Mbarrier* full) {
  if constexpr (C::kCluster > 1) {
    constexpr uint32_t kAll = (1u << C::kCluster) - 1;
    tma_load_multicast(to, map, static_cast<int>(column), static_cast<int>(row), full, kAll);
  } else {
    tma_load(to, map, static_cast<int>(column), static_cast<int>(row), full);
  }
}

// `rank`: of the block in its cluster, which decides what it fetches.
template <class C>
FLASHU_DEVICE void fetch_range(const Maps& maps, const FfnGemm& g, char* b, int64_t first_n, int64_t k,
                               int rank, Mbarrier* full) {
  if constexpr (C::kGated) {
    if (C::kCluster == 1 || rank == 0) fetch_weights<C>(b, maps.b, k, g.first + first_n, full);
    if (C::kCluster == 1 || rank == 1) {
      fetch_weights<C>(b + C::kTileBytesB / 2, maps.b2, k, g.first + first_n, full);
    }
  } else {
    const int64_t first = g.list == nullptr ? g.first + k : block_at(g.list, k, g.intermediate);
    const int row = rank * C::kBoxRows;
    fetch_weights<C>(b + row * kRowBytes, maps.b, first, first_n + row, full);
  }
}

// Zeros for the neurons in front of the run, in the first stage of a tile of the down half. All threads that
// multiply.
template <class C>
FLASHU_DEVICE void clear_lead(char* b, int64_t lead) {
  const int row = static_cast<int>(threadIdx.x);
  static_assert(C::kBlockN <= kConsumers * 128, "a thread to each row");
  if (row < C::kBlockN) {
    char* const chunk = b + row * kRowBytes + row % 8 * 16;  // the row's first
    store16(chunk, without_first(load16(chunk), lead));
  }
  fence_proxy_async();  // wgmma reads it
  named_barrier(2 + kConsumers, kConsumers * 128);
}

// The first neuron of a lane's box. Boxes past the list lie outside the weights and become zero.
template <class C>
FLASHU_DEVICE int neuron_of_box(const FfnGemm& g, int64_t first_n, int lane) {
  static_assert(kBoxes<C> <= kWarp, "a lane to each box");
  const int64_t j = first_n + lane % (kBoxes<C> / 2) * C::kBoxRows;
  return j < g.n ? g.list[j] : static_cast<int>(g.intermediate);
}

template <class C>
FLASHU_DEVICE void fetch_blocks(const Maps& maps, char* b, int neuron, int64_t k, int lane, int rank,
                                Mbarrier* full) {
  if (lane >= kBoxes<C>) return;
  const int half = lane >= kBoxes<C> / 2 ? 1 : 0;  // gate's, or up's
  if (C::kCluster > 1 && half != rank) return;
  char* const to = b + lane * C::kBoxRows * kRowBytes;
  // Two calls: cicc 13.0 crashes on a reference to one or the other kernel argument.
  if (half == 1) {
    fetch_weights<C>(to, maps.b2, k, neuron, full);
  } else {
    fetch_weights<C>(to, maps.b, k, neuron, full);
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
  const int64_t values = min(max(g.k - at, int64_t{0}), int64_t{8});
  static_assert(C::kProductN % 16 == 0, "16 rows at a time");
#pragma unroll 4
  for (int i = 0; i < C::kProductN / 16; ++i) {
    const int row = thread / 8 + i * 16;
    const int32_t neuron = neurons[row % C::kBlockN];
    const bool second = row >= C::kBlockN;
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
FLASHU_DEVICE void fetch_tiles(const FfnGemm& g, const Maps& maps, const WorkOrder& order, Barriers* barriers,
                               char* stages) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warp = thread / kWarp;
  Ring<C::kStages> ring;
  if constexpr (C::kFetch != Fetch::kRows) {
    if (warp != 0) return;
    const int lane = thread;
    if (C::kFetch == Fetch::kRange && !elect_one()) return;
    const int rank = C::kCluster > 1 ? cluster_rank() : 0;
    for (int64_t piece = blockIdx.x; piece < order.pieces; piece += gridDim.x) {
      const int64_t first_m = order.first_m(piece);
      const int64_t first_n = order.template first_n<C>(piece);
      const int end = order.first_step(order.end_part(piece));
      [[maybe_unused]] int neuron = 0;
      if constexpr (C::kFetch != Fetch::kRange) neuron = neuron_of_box<C>(g, first_n, lane);
      for (int step = order.first_step(order.first_part(piece)); step < end; ++step) {
        const int64_t k = static_cast<int64_t>(step) * kBlockK;
        Mbarrier* const full = &barriers->full[ring.stage];
        char* const a = stages + ring.stage * C::kStageBytes;
        char* const b = a + kTileBytesA;
        mbarrier_wait(&barriers->empty[ring.stage], ring.phase ^ 1);
        if (C::kFetch == Fetch::kRange || lane == 0) {
          mbarrier_expect(full, C::kStageBytes);
          tma_load(a, maps.a, static_cast<int>(k), static_cast<int>(first_m), full);
        }
        if constexpr (C::kFetch == Fetch::kRange) {
          fetch_range<C>(maps, g, b, first_n, k, rank, full);
        } else {
          __syncwarp();  // no box before its bytes are expected
          fetch_blocks<C>(maps, b, neuron, k, lane, rank, full);
        }
        ring.advance();
      }
    }
  } else {
    // The list's part of a tile stands in shared memory: 256 rows of pointers do not fit into this group's
    // registers.
    FLASHU_SHARED(int32_t, neurons, C::kBlockN);
    Ring<C::kStages> arrived;  // the oldest stage whose copies have not been handed over
    int pending = 0;
    const auto hand_over = [&] {
      fence_proxy_async();  // what cp.async wrote is read by wgmma
      mbarrier_arrive(&barriers->full[arrived.stage]);
      arrived.advance();
      --pending;
    };
    for (int64_t piece = blockIdx.x; piece < order.pieces; piece += gridDim.x) {
      const int64_t first_m = order.first_m(piece);
      const int64_t first_n = order.template first_n<C>(piece);
      const int end = order.first_step(order.end_part(piece));
      named_barrier(1, 128);  // the last tile's list is not read any more
      for (int j = thread; j < C::kBlockN; j += 128)
        neurons[j] =
            first_n + j < g.n ? static_cast<int32_t>(neuron_at(g.list, first_n + j, g.intermediate)) : -1;
      named_barrier(1, 128);
      for (int step = order.first_step(order.first_part(piece)); step < end; ++step) {
        const int64_t k = static_cast<int64_t>(step) * kBlockK;
        char* const a = stages + ring.stage * C::kStageBytes;
        mbarrier_wait(&barriers->empty[ring.stage], ring.phase ^ 1);
        if (thread == 0) {
          mbarrier_expect(&barriers->full[ring.stage], kTileBytesA);
          tma_load(a, maps.a, static_cast<int>(k), static_cast<int>(first_m), &barriers->full[ring.stage]);
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

// A warp does not read a stage any more. In a cluster a lane tells each block.
template <class C>
FLASHU_DEVICE void release_stage(Mbarrier* empty, int lane) {
  if constexpr (C::kCluster > 1) {
    if (lane < C::kCluster) mbarrier_arrive_at(empty, lane);
  } else {
    if (lane == 0) mbarrier_arrive(empty);
  }
}

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

// A warpgroup's sums of one part, for ffn_sum(). Four lanes fill a sector.
template <class C>
FLASHU_DEVICE void store_part(const FfnGemm& g, int part, int64_t first_m, int64_t first_n, int warp,
                              int lane, const float (&sums)[C::kProductN / 2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = first_m + warp * 16 + half * 8 + lane / 4;
    if (r >= g.m) continue;
    float* const row = g.partial + (part * g.m + r) * g.partial_stride;
#pragma unroll
    for (int j = 0; j < C::kBlockN / 8; ++j) {
      const int64_t c = first_n + j * 8 + lane % 4 * 2;
      if (c >= g.n) continue;  // the stride is a multiple of four: the value after the last one lies in it
      *reinterpret_cast<float2*>(row + c) = {sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]};
    }
  }
}

template <class C>
FLASHU_DEVICE void multiply_tiles(const FfnGemm& g, const Maps& maps, const WorkOrder& order,
                                  Barriers* barriers, char* stages, char* outs) {
  using T = typename C::T;
  // The same in all lanes, which the compiler cannot know: it keeps descriptors in uniform registers then.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  char* const own_outs = outs + group * 2 * kGroupBytes;
  const auto* const residual = static_cast<const T*>(g.residual);
  const bool pairs = reinterpret_cast<uintptr_t>(residual) % 4 == 0 && g.residual_stride % 2 == 0;
  Ring<C::kStages> ring;
  int out_slot = 0;
  for (int64_t piece = blockIdx.x; piece < order.pieces; piece += gridDim.x) {
    float totals[C::kProductN / 2] = {};
    // The up half has one part, and no registers for two sets of sums.
    const int first_part = C::kGated ? 0 : order.first_part(piece);
    const int end_part = C::kGated ? 1 : order.end_part(piece);
    for (int part = first_part; part < end_part; ++part) {
      float sums[C::kProductN / 2] = {};
      int previous = 0;
      if (!C::kGated && g.lead > 0 && part == 0) {
        mbarrier_wait(&barriers->full[ring.stage], ring.phase);
        clear_lead<C>(stages + ring.stage * C::kStageBytes + kTileBytesA, g.lead);
      }
      const int begin = order.first_step(part);
      const int end = order.first_step(part + 1);
      for (int step = begin; step < end; ++step) {
        const char* const a = stages + ring.stage * C::kStageBytes + group * kGroupBytes;
        const char* const b = stages + ring.stage * C::kStageBytes + kTileBytesA;
        mbarrier_wait(&barriers->full[ring.stage], ring.phase);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockK / 16; ++k) {
          wgmma<C::kProductN, T>(sums, wgmma_descriptor(a + k * 32), wgmma_descriptor(b + k * 32));
        }
        wgmma_commit();
        // One step stays under way; the stage of the one before it is free.
        wgmma_wait<1>();
        if (step > begin) release_stage<C>(&barriers->empty[previous], lane);
        previous = ring.stage;
        ring.advance();
      }
      wgmma_wait<0>();
      release_stage<C>(&barriers->empty[previous], lane);
#pragma unroll
      for (int i = 0; i < C::kProductN / 2; ++i) {
        wgmma_touch(sums[i]);
        totals[i] = C::kGated ? sums[i] : totals[i] + sums[i];
      }
    }

    const int64_t first_m = order.first_m(piece) + group * 64;
    const int64_t first_n = order.template first_n<C>(piece);
    if constexpr (!C::kGated) {
      if (order.spread) {
        store_part<C>(g, first_part, first_m, first_n, warp, lane, totals);
        continue;
      }
    }
    if constexpr (C::kFinishes) {
      finish<T>(totals, g.epilogue, g.n, [&](int i) { return first_n + i / 4 * 8 + lane % 4 * 2 + i % 2; });
    }
    // Columns of this tile that TMA stores: it writes eight at a time. The others are stored one by one.
    const int whole = static_cast<int>(min(stored_by_tma(g.n) - first_n, int64_t{C::kBlockN}));
#pragma unroll
    for (int part = 0; part < C::kBlockN; part += 64) {
      // The last part of a width that is no multiple of 64 is shifted left and overlaps the previous
      // box: a whole box would reach into the next tile.
      const int column = part + 64 <= C::kBlockN ? part : C::kBlockN - 64;
      char* const box = own_outs + out_slot * kGroupBytes;
      // The store before last has left this box.
      if (thread == 0) tma_store_wait_read<1>();
      named_barrier(2 + group, 128);
      write_group<T>(box, warp, lane, [&](int j, int half) {
        const int at = (column / 8 + j) * 4 + half * 2;
        float2 value{totals[at], totals[at + 1]};
        const int64_t r = first_m + warp * 16 + half * 8 + lane / 4;
        const int64_t c = first_n + column + j * 8 + lane % 4 * 2;
        if constexpr (C::kGated) {
          const float* const up = totals + C::kBlockN / 2;
          value = {silu(value.x) * up[at], silu(value.y) * up[at + 1]};
          if (j == 0 && c < g.lead) value.x = 0;
          if (j == 0 && c + 1 < g.lead) value.y = 0;
        } else if (residual != nullptr) {
          const T* const from = residual + r * g.residual_stride + c;
          if (pairs && r < g.m && c + 1 < g.n) {
            const float2 both = unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
            value.x += both.x;
            value.y += both.y;
          } else {
            if (r < g.m && c < g.n) value.x += to_float(from[0]);
            if (r < g.m && c + 1 < g.n) value.y += to_float(from[1]);
          }
        }
        if (column + j * 8 >= whole && r < g.m) {
          T* const to = static_cast<T*>(g.out) + r * g.out_stride + c;
          if (c < g.n) to[0] = from_float<T>(value.x);
          if (c + 1 < g.n) to[1] = from_float<T>(value.y);
        }
        return value;
      });
      fence_proxy_async();  // stmatrix wrote what TMA reads
      named_barrier(2 + group, 128);
      if (thread == 0 && column < whole) {
        tma_store(maps.out, box, static_cast<int>(first_n + column), static_cast<int>(first_m));
      }
      if (thread == 0) tma_store_commit();
      out_slot ^= 1;
    }
  }
  if (thread == 0) tma_store_wait_read<0>();
}

// The other block of a cluster may arrive at barriers here until it has multiplied its last tile. In both
// branches, so that nothing follows the two with different numbers of registers.
template <class C>
FLASHU_DEVICE void end_of_block() {
  if constexpr (C::kCluster > 1) {
    __syncwarp();  // lanes that fetch nothing come early
    cluster_barrier();
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90(const FfnGemm g, const __grid_constant__ Maps maps, const WorkOrder order) {
  FLASHU_DYNAMIC_SHARED(char, shared);
  auto* const barriers = reinterpret_cast<Barriers*>(shared);
  char* const outs = shared + 1024;
  char* const stages = outs + C::kOutBytes;
  static_assert(sizeof(Barriers) <= 1024, "the barriers have the first KiB");
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      // Full: the thread that expects TMA's bytes, and every thread that copies rows. Empty: every warp that
      // multiplies, since a warp knows of its own products only, of every block of the cluster.
      mbarrier_init(&barriers->full[s], C::kFetch == Fetch::kRows ? 1 + 128 : 1);
      mbarrier_init(&barriers->empty[s], kConsumers * 4 * C::kCluster);
    }
    mbarrier_init_fence();
    tma_prefetch(maps.a);
    tma_prefetch(maps.b);
    if (C::kGated) tma_prefetch(maps.b2);
    tma_prefetch(maps.out);
  }
  if constexpr (C::kCluster > 1) {
    cluster_barrier();  // no box comes before the barriers of both blocks are there
  } else {
    __syncthreads();
  }
  griddepcontrol_wait();
  // Blocks of the next kernel may begin where this one's have ended; it waits before it reads.
  griddepcontrol_launch_dependents();
  if (threadIdx.x / 128 == kConsumers) {
    warpgroup_reg_dealloc<40>();
    fence_proxy_async_global();
    fetch_tiles<C>(g, maps, order, barriers, stages);
    end_of_block<C>();
  } else {
    warpgroup_reg_alloc<232>();
    multiply_tiles<C>(g, maps, order, barriers, stages, outs);
    end_of_block<C>();
  }
}

template <class C>
void launch_tile(const FfnGemm& g, Stream stream, int multiprocessors);

template <class C>
void launch_tiles(const FfnGemm& g, Stream stream, int multiprocessors) {
  LaunchConfig config{dim3(C::kCluster), dim3(kThreads), C::kSharedBytes, stream, true, C::kCluster};
  int clusters = multiprocessors;
  if constexpr (C::kCluster > 1) {
    clusters = std::min(clusters / C::kCluster, resident_clusters<gemm_sm90<C>>("gemm_sm90", config));
    // A slice of a device may have no two neighbours. The bits are the same.
    if (clusters == 0) {
      using Alone = Config<typename C::T, C::kGated, C::kBlockN, C::kFetch, 1>;
      return launch_tile<Alone>(g, stream, multiprocessors);
    }
  }
  Maps maps{};
  maps.a = encode_tensor_map(g.a, g.m, g.k, g.a_stride, kBlockM);
  // Where there is no whole chunk nothing is stored by this map.
  maps.out = encode_tensor_map(g.out, g.m, std::max<int64_t>(stored_by_tma(g.n), 1), g.out_stride, 64);
  if (C::kFetch == Fetch::kRows) {
    maps.b = maps.b2 = maps.a;  // not used
  } else if (C::kGated) {
    // Rows past the selected range are other neurons; they are made, and cut off by the map of the result.
    maps.b = encode_tensor_map(g.b, g.intermediate, g.k, g.b_stride, C::kBoxRows);
    maps.b2 = encode_tensor_map(g.b2, g.intermediate, g.k, g.b2_stride, C::kBoxRows);
  } else {
    // K ends with the selected range: what lies behind it may be anything, NaN too. A list has whole steps.
    maps.b = encode_tensor_map(g.b, g.n, g.list == nullptr ? g.first + g.k : g.intermediate, g.b_stride,
                               C::kBoxRows);
    maps.b2 = maps.b;
  }
  const int64_t tiles_m = divide_up(g.m, kBlockM * C::kCluster) * C::kCluster;
  const int64_t tiles = tiles_m * divide_up(g.n, C::kBlockN);
  const bool spread = g.partial != nullptr;
  const WorkOrder order{
      tiles_m, tiles, spread ? tiles * g.parts : tiles, static_cast<int>(divide_up(g.k, kBlockK)),
      g.parts, spread};
  const int64_t blocks = int64_t{clusters} * C::kCluster;
  config.grid = dim3(static_cast<unsigned>(std::min(order.pieces, blocks)));
  launch<gemm_sm90<C>>("gemm_sm90", config, g, maps, order);
}

// Parts are not finished: their sum is.
template <class C>
void launch_tile(const FfnGemm& g, Stream stream, int multiprocessors) {
  if constexpr (!C::kGated) {
    if (g.epilogue.finishes() && g.partial == nullptr) {
      return launch_tiles<Finished<C>>(g, stream, multiprocessors);
    }
  }
  launch_tiles<C>(g, stream, multiprocessors);
}

// Launches the entry of the table that is `tile`; false where that is not one of this kernel.
template <class T, size_t kIndex>
bool launch_if(const FfnTile& tile, const FfnGemm& g, Stream stream, int multiprocessors) {
  constexpr FfnTile kTile = core::kFfnTiles[kIndex];
  if constexpr (kTile.kernel == core::FfnKernel::kSm90) {
    static_assert(kTile.block_m == kBlockM, "the kernel has two warpgroups of 64 rows");
    if (tile != kTile) return false;
    launch_tile<Config<T, kTile.up, kTile.block_n, kTile.fetch, kTile.cluster>>(g, stream, multiprocessors);
    return true;
  }
  return false;
}

template <class T, size_t... kIndices>
bool launch_any(const FfnTile& tile, const FfnGemm& g, Stream stream, int multiprocessors,
                std::index_sequence<kIndices...>) {
  return (launch_if<T, kIndices>(tile, g, stream, multiprocessors) || ...);
}

// Whether a way to fetch brings the neurons that the selection names.
bool fetch_serves(Fetch fetch, const FfnGemm& g) {
  if (g.list == nullptr) return fetch == Fetch::kRange;
  if (!g.gated) return fetch == Fetch::kRange && g.block == 64;
  return fetch == Fetch::kRows || (fetch == Fetch::kBlocks && g.block >= 8) ||
         (fetch == Fetch::kRuns && g.block == 64);
}

template <class T>
void run(const FfnTile& tile, const FfnGemm& g, Stream stream, int multiprocessors) {
  using All = std::make_index_sequence<std::size(core::kFfnTiles)>;
  FLASHU_CHECK(launch_any<T>(tile, g, stream, multiprocessors, All{}), FLASHU_INTERNAL,
               "ffn: expected a tile of core::kFfnTiles for sm_90, got ", tile.block_m, " x ", tile.block_n,
               " of the ", tile.up ? "up" : "down", " half, fetched by way ", static_cast<int>(tile.fetch),
               " in clusters of ", tile.cluster);
}

}  // namespace

void ffn_gemm_sm90(const FfnTile& tile, const FfnGemm& g, int32_t type, Stream stream, int multiprocessors) {
  FLASHU_CHECK(tile.up == g.gated && fetch_serves(tile.fetch, g), FLASHU_INTERNAL,
               "ffn: expected a tile of the half that runs, and of its way to name neurons");
  if (type == FLASHU_BF16) return run<bfloat16>(tile, g, stream, multiprocessors);
  run<float16>(tile, g, stream, multiprocessors);
}

}  // namespace flashu::cuda
