// Gathered FFN halves in fp32: a plain tiled product, for models that are checked rather than served. Sums
// run over K in order.
#include "core/ffn_tiles.hpp"
#include "cuda/epilogue.cuh"
#include "cuda/ffn_gemm.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

constexpr int kBlockM = core::kF32Tile.block_m;
constexpr int kBlockN = core::kF32Tile.block_n;
static_assert(kBlockM == kBlockN, "both operands are fetched alike");
constexpr int kBlockK = 16;
constexpr int kThreads = 256;
constexpr int kOfThread = 4;  // in M, and in N, of a thread

// kGated: the up half, two products at once.
template <bool kGated, bool kFinishes = false>
__global__ void __launch_bounds__(kThreads, 2) gemm_f32(const FfnGemm g) {
  FLASHU_SHARED(float, left, kBlockK*(kBlockM + 1));
  FLASHU_SHARED(float, right, (kGated ? 2 : 1) * kBlockK * (kBlockM + 1));
  constexpr int kRow = kBlockM + 1;
  const int64_t first_m = static_cast<int64_t>(blockIdx.x) * kBlockM;
  const int64_t first_n = static_cast<int64_t>(blockIdx.y) * kBlockN;
  const int thread = static_cast<int>(threadIdx.x);
  const auto* const a = static_cast<const float*>(g.a);
  const auto* const b = static_cast<const float*>(g.b);
  const auto* const b2 = static_cast<const float*>(g.b2);
  float sums[kOfThread][kOfThread] = {};
  float sums2[kOfThread][kOfThread] = {};
  const int row = thread / 16 * kOfThread;
  const int column = thread % 16 * kOfThread;
  for (int64_t k0 = 0; k0 < g.k; k0 += kBlockK) {
    for (int i = thread; i < kBlockM * kBlockK; i += kThreads) {
      const int64_t k = k0 + i % kBlockK;
      const int64_t r = first_m + i / kBlockK;
      const int64_t c = first_n + i / kBlockK;
      const int at = i % kBlockK * kRow + i / kBlockK;
      left[at] = r < g.m && k < g.k ? a[r * g.a_stride + k] : 0.0f;
      const bool inside = c < g.n && k < g.k;
      if constexpr (kGated) {
        const int64_t neuron =
            inside ? (g.list != nullptr ? neuron_at(g.list, c, g.intermediate) : g.first + c) : 0;
        right[at] = inside ? b[neuron * g.b_stride + k] : 0.0f;
        right[kBlockK * kRow + at] = inside ? b2[neuron * g.b2_stride + k] : 0.0f;
      } else {
        const int64_t neuron =
            inside ? (g.list != nullptr ? neuron_at(g.list, k, g.intermediate) : g.first + k) : 0;
        right[at] = inside ? b[c * g.b_stride + neuron] : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kBlockK; ++k) {
      float x[kOfThread];
      float y[kOfThread];
      float z[kOfThread];
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        x[i] = left[k * kRow + row + i];
        y[i] = right[k * kRow + column + i];
        z[i] = kGated ? right[(kBlockK + k) * kRow + column + i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
#pragma unroll
        for (int j = 0; j < kOfThread; ++j) {
          sums[i][j] += x[i] * y[j];
          if constexpr (kGated) sums2[i][j] += x[i] * z[j];
        }
      }
    }
    __syncthreads();
  }
  const auto* const residual = static_cast<const float*>(g.residual);
  auto* const out = static_cast<float*>(g.out);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int64_t r = first_m + row + i;
    if constexpr (kFinishes) {
      finish<float>(sums[i], g.epilogue, g.n, [&](int j) { return first_n + column + j; });
    }
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      const int64_t c = first_n + column + j;
      if (r >= g.m || c >= g.n) continue;
      float value = sums[i][j];
      if constexpr (kGated) {
        value = value / (1.0f + expf(-value)) * sums2[i][j];
      } else if (residual != nullptr) {
        value += residual[r * g.residual_stride + c];
      }
      out[r * g.out_stride + c] = value;
    }
  }
}

}  // namespace

void ffn_gemm_f32(const FfnGemm& g, Stream stream) {
  const LaunchConfig config{
      dim3(static_cast<unsigned>(divide_up(g.m, kBlockM)), static_cast<unsigned>(divide_up(g.n, kBlockN))),
      dim3(kThreads), 0, stream};
  if (g.gated) return launch<gemm_f32<true>>("gemm_f32", config, g);
  if (g.epilogue.finishes()) return launch<gemm_f32<false, true>>("gemm_f32", config, g);
  launch<gemm_f32<false>>("gemm_f32", config, g);
}

}  // namespace flashu::cuda
