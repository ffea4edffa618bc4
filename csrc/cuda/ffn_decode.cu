// The whole gathered FFN for at most 16 rows (decoding), bf16 and fp16, sm_80 and newer. Every block takes
// some neurons: it streams their gate and up rows and their columns of down once, and h stays in its shared
// memory. The blocks' contributions are added in order by a second kernel.
//
// Floor: the weights' bytes / bandwidth. The rows ride along: weights are the left operand of mma.sync (16
// neurons or 16 columns), the rows the right one (8 of them, or two times 8). Each lane loads 16 bytes of a
// weight row and uses them as they come: the order of K inside 32 values is the same for both
// operands, so it does not matter.
#include "core/typed.hpp"
#include "cuda/ffn_decode.hpp"
#include "cuda/ffn_sum.hpp"
#include "cuda/primitives/mma.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSplits = 4;                 // of K in the up half
constexpr int kGroups = kWarps / kSplits;  // of 16 neurons at a time
constexpr int kNeuronsOfRound = kGroups * 16;
constexpr int kStep = 32;         // of K: four lanes with eight values each
constexpr int kColumnsAhead = 2;  // groups of 16 columns of down that a warp takes at once

// Rows of x and h stand 64 bytes off a multiple of 128, so that two rows do not meet in a bank.
constexpr int64_t padded(int64_t values) { return (values + 63) / 64 * 64 + 32; }

struct DecodeArguments {
  FfnDecode f;
  int64_t x_stride;  // in shared memory
  int64_t h_stride;
  int64_t out_rows;  // padded to 8 or 16
};

template <class T>
FLASHU_DEVICE uint4 weight_chunk(const T* row, int64_t k, bool inside) {
  return inside ? load16_streaming(row + k) : uint4{0, 0, 0, 0};
}

// Two products of 16 deep with what the lanes have loaded: `low` and `high` are rows g and g + 8 of the left
// operand.
template <class T>
FLASHU_DEVICE void multiply_chunks(float (&sums)[4], const uint4& low, const uint4& high,
                                   const uint4& right) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
  mma_16x8x16<T>(sums, first, right.x, right.y);
  mma_16x8x16<T>(sums, second, right.z, right.w);
}

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
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t at = first_neuron + j + i;
    if (i >= values || at < f.lead) continue;
    const int64_t neuron = f.list != nullptr ? neuron_at(f.list, at, f.intermediate) : f.first + at;
    words[i / 2] |= static_cast<uint32_t>(weights[neuron].bits) << (i % 2 * 16);
  }
  return {words[0], words[1], words[2], words[3]};
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
  const int t = lane % 4;
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
  const int64_t steps = (f.hidden + kStep - 1) / kStep;
  const int64_t begin = steps * split / kSplits * kStep;
  const int64_t end = steps * (split + 1) / kSplits * kStep;
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
    constexpr int kAhead = 4;  // steps whose loads are under way together
    for (int64_t k0 = begin; k0 < end; k0 += kAhead * kStep) {
      uint4 chunks[kAhead][2][2];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t k = k0 + s * kStep + t * 8;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            chunks[s][w][half] = weight_chunk(rows[w][half], k, exists[half] && k < f.hidden && k < end);
        }
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t k = k0 + s * kStep + t * 8;
        if (k0 + s * kStep >= end) break;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 right = load16(x + (tile * 8 + g) * a.x_stride + k);
#pragma unroll
          for (int w = 0; w < 2; ++w)
            multiply_chunks<T>(sums[w][tile], chunks[s][w][0], chunks[s][w][1], right);
        }
      }
    }
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
  const int64_t down_steps = (neurons + kStep - 1) / kStep;
  constexpr int64_t kWarpColumns = kWarps * 16;
  for (int64_t column = warp * 16; column < f.width; column += kColumnsAhead * kWarpColumns) {
    float sums[kColumnsAhead][kTiles][4] = {};
    for (int64_t s = 0; s < down_steps; ++s) {
      const int64_t j = s * kStep + t * 8;
      uint4 chunks[kColumnsAhead][2];
#pragma unroll
      for (int ahead = 0; ahead < kColumnsAhead; ++ahead) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          chunks[ahead][half] =
              down_chunk<T>(f, column + ahead * kWarpColumns + half * 8 + g, first_neuron, j, neurons);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 right = load16(h + (tile * 8 + g) * a.h_stride + j);
#pragma unroll
        for (int ahead = 0; ahead < kColumnsAhead; ++ahead)
          multiply_chunks<T>(sums[ahead][tile], chunks[ahead][0], chunks[ahead][1], right);
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < kColumnsAhead; ++ahead) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = tile * 8 + t * 2 + i % 2;
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
  return f.rows <= 16 && shared_bytes(arguments_of(f), f.rows <= 8 ? 1 : 2) <= shared_limit;
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
