// The whole gathered FFN for at most 16 rows (decoding), bf16 and fp16, sm_80 and newer. Every block takes
// some neurons: it streams their gate and up rows and their columns of down once, and h stays in its shared
// memory. The blocks' contributions are added in order by a second kernel.
//
// Floor: the weights' bytes / bandwidth. How rows are multiplied is said in few_rows.cuh.
#include "core/typed.hpp"
#include "cuda/few_rows.cuh"
#include "cuda/ffn_decode.hpp"
#include "cuda/ffn_sum.hpp"

namespace flashu::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSplits = 4;                 // of K in the up half
constexpr int kGroups = kWarps / kSplits;  // of 16 neurons at a time
constexpr int kNeuronsOfRound = kGroups * 16;
constexpr int kColumnsAhead = 2;  // groups of 16 columns of down that a warp takes at once

// Rows of x and h stand 64 bytes off a multiple of 128, so that two rows do not meet in a bank.
constexpr int64_t padded(int64_t values) { return (values + 63) / 64 * 64 + 32; }

struct DecodeArguments {
  FfnDecode f;
  int64_t x_stride;  // in shared memory
  int64_t h_stride;
  int64_t out_rows;  // padded to 8 or 16
};

// Eight neurons of a row of down, the block's from `j` on; zeros behind its last neuron and for rows that do
// not exist.
template <class T>
FLASHU_DEVICE uint4 down_chunk(const FfnDecode& f, int64_t row, int64_t first_neuron, int64_t j,
                               int64_t neurons) {
  const int64_t values = row < f.width ? min(int64_t{8}, neurons - j) : 0;
  if (values <= 0) return {0, 0, 0, 0};
  const T* const weights = static_cast<const T*>(f.down) + row * f.down_stride;
  if (f.list == nullptr && values == 8) {
    return without_first(load16_streaming(weights + f.first + first_neuron + j), f.lead - first_neuron - j);
  }
  if (f.list != nullptr && f.block >= 8) {
    return load16_streaming(weights + block_at(f.list, first_neuron + j, f.intermediate - 7));
  }
  return chunk_by_value<T>(values, [&](int i) -> uint32_t {
    const int64_t at = first_neuron + j + i;
    if (at < f.lead) return 0;
    return weights[f.list != nullptr ? neuron_at(f.list, at, f.intermediate) : f.first + at].bits;
  });
}

// kTiles: of 8 rows.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) decode_neurons(const DecodeArguments a) {
  FLASHU_DYNAMIC_SHARED(char, shared);
  const FfnDecode& f = a.f;
  T* const x = reinterpret_cast<T*>(shared);  // [8 kTiles][x_stride]
  T* const h = x + 8 * kTiles * a.x_stride;   // [8 kTiles][h_stride]
  float* const parts =
      reinterpret_cast<float*>(h + 8 * kTiles * a.h_stride);  // [warp][gate, up][tile][lane][4]
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int g = lane / 4;
  const int64_t first_neuron = static_cast<int64_t>(blockIdx.x) * f.neurons_of_block;
  const int64_t neurons = min(f.neurons_of_block, f.neurons - first_neuron);

  griddepcontrol_launch_dependents();  // the sum waits for all of this kernel, but need not be launched then

  // Rows that do not exist and what lies behind K are zero in both operands.
  for (int64_t i = thread; i < 8 * kTiles * (a.x_stride / 8); i += kThreads) {
    const int64_t row = i / (a.x_stride / 8);
    const int64_t k = i % (a.x_stride / 8) * 8;
    const bool inside = row < f.rows && k < f.hidden;
    store16(x + row * a.x_stride + k,
            inside ? load16(static_cast<const T*>(f.x) + row * f.x_row_stride + k) : uint4{0, 0, 0, 0});
  }
  for (int64_t i = thread; i < 8 * kTiles * a.h_stride; i += kThreads) h[i] = T{};
  __syncthreads();

  // ---- up: 16 neurons to a warp, a part of K to each of four
  const int group = warp % kGroups;
  const int split = warp / kGroups;
  const int64_t steps = divide_up(f.hidden, kStep<T>);
  const int64_t begin = steps * split / kSplits * kStep<T>;
  const int64_t end = steps * (split + 1) / kSplits * kStep<T>;
  for (int64_t round = 0; round < neurons; round += kNeuronsOfRound) {
    float sums[2][kTiles][4] = {};
    const T* rows[2][2];  // [gate, up][g, g + 8]
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t j = round + group * 16 + half * 8 + g;
      exists[half] = j < neurons;
      const int64_t at = first_neuron + (exists[half] ? j : 0);
      const int64_t neuron = f.list != nullptr ? neuron_at(f.list, at, f.intermediate) : f.first + at;
      rows[0][half] = static_cast<const T*>(f.gate) + neuron * f.gate_stride;
      rows[1][half] = static_cast<const T*>(f.up) + neuron * f.up_stride;
    }
    constexpr int kAhead = 4;
    multiply_rows<T, kAhead, false>(
        sums, lane, begin, end,
        [&](int w, int half, int64_t k) {
          return exists[half] && k < f.hidden ? load16_streaming(rows[w][half] + k) : uint4{0, 0, 0, 0};
        },
        [&](int tile, int row, int64_t k) { return load16(x + (tile * 8 + row) * a.x_stride + k); });
    // The parts of K meet in shared memory and are added in order.
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          parts[(((warp * 2 + w) * kTiles + tile) * kWarp + lane) * 4 + i] = sums[w][tile][i];
      }
    }
    __syncthreads();
    for (int i = thread; i < kGroups * kTiles * kWarp * 4; i += kThreads) {
      const int part_group = i / (kTiles * kWarp * 4);
      const int rest = i % (kTiles * kWarp * 4);
      float gate = 0;
      float up = 0;
      for (int s = 0; s < kSplits; ++s) {
        const int w = s * kGroups + part_group;
        gate += parts[(w * 2 + 0) * kTiles * kWarp * 4 + rest];
        up += parts[(w * 2 + 1) * kTiles * kWarp * 4 + rest];
      }
      const int of_lane = rest / 4 % kWarp;
      const int64_t j = round + part_group * 16 + of_lane / 4 + rest % 4 / 2 * 8;
      const int row = rest / (kWarp * 4) * 8 + of_lane % 4 * 2 + rest % 2;
      if (j < neurons && first_neuron + j >= f.lead) h[row * a.h_stride + j] = from_float<T>(silu(gate) * up);
    }
    __syncthreads();
  }

  // ---- down: 16 columns of the result to a warp, several times at once, so that enough loads are under way
  float* const out = f.partial + static_cast<int64_t>(blockIdx.x) * f.rows * f.width;
  constexpr int64_t kWarpColumns = kWarps * 16;
  for (int64_t column = warp * 16; column < f.width; column += kColumnsAhead * kWarpColumns) {
    float sums[kColumnsAhead][kTiles][4] = {};
    multiply_rows<T, 1, false>(
        sums, lane, 0, neurons,
        [&](int ahead, int half, int64_t j) {
          return down_chunk<T>(f, column + ahead * kWarpColumns + half * 8 + g, first_neuron, j, neurons);
        },
        [&](int tile, int row, int64_t j) { return load16(h + (tile * 8 + row) * a.h_stride + j); });
#pragma unroll
    for (int ahead = 0; ahead < kColumnsAhead; ++ahead) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = tile * 8 + lane % 4 * 2 + i % 2;
          const int64_t c = column + ahead * kWarpColumns + g + i / 2 * 8;
          if (row < f.rows && c < f.width) out[row * f.width + c] = sums[ahead][tile][i];
        }
      }
    }
  }
}

int64_t shared_bytes(const DecodeArguments& a, int tiles) {
  return 8 * tiles * (a.x_stride + a.h_stride) * 2 + int64_t{kWarps} * 2 * tiles * kWarp * 4 * 4;
}

DecodeArguments arguments_of(const FfnDecode& f) {
  return {f, padded(f.hidden), padded(f.neurons_of_block), f.rows <= 8 ? 8 : 16};
}

template <class T, int kTiles>
void launch_decode(const FfnDecode& f, Stream stream) {
  const DecodeArguments a = arguments_of(f);
  const LaunchConfig up{dim3(static_cast<unsigned>(decode_blocks(f))), dim3(kThreads),
                        static_cast<int>(shared_bytes(a, kTiles)), stream};
  launch<decode_neurons<T, kTiles>>("decode_neurons", up, a);
}

}  // namespace

int64_t decode_blocks(const FfnDecode& f) { return divide_up(f.neurons, f.neurons_of_block); }

int64_t decode_neurons_of_block(int64_t neurons) {
  // Whole groups of 8 neurons: 16 bytes of a row of down. One wave of blocks on an H100 or H200, but not as
  // many as the device has multiprocessors: the number of partial sums decides the bits, and devices of one
  // name differ.
  constexpr int64_t kBlocks = 128;
  return std::max<int64_t>(divide_up(divide_up(neurons, kBlocks), 8) * 8, 8);
}

bool decode_fits(const FfnDecode& f, int shared_limit) {
  return f.rows <= core::kFewRows && shared_bytes(arguments_of(f), f.rows <= 8 ? 1 : 2) <= shared_limit;
}

void ffn_decode(const FfnDecode& f, int32_t type, Stream stream) {
  core::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 2) {
      if (f.rows <= 8) {
        launch_decode<T, 1>(f, stream);
      } else {
        launch_decode<T, 2>(f, stream);
      }
    }
  });
  ffn_sum({f.partial, static_cast<int>(decode_blocks(f)), f.rows, f.width, f.width, f.residual,
           f.residual_stride, f.out, f.out_stride},
          type, stream);
}

}  // namespace flashu::cuda
