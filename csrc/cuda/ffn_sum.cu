// Adds what several blocks have made of one result: the neurons' contributions when decoding, the parts of K
// of the down half. Always in the same order.
//
// Floor: the parts' bytes / L2 bandwidth. Few parts leave enough columns for all blocks; many parts of one
// row (128 of 1536 columns) are shared among 16 threads a column, or 1536 columns would be 6 blocks.
#include "core/typed.hpp"
#include "cuda/ffn_sum.hpp"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFewParts = 4;

// kShares threads add a column's parts, each some that follow each other; their sums are added in order.
template <class T, int kShares>
__global__ void __launch_bounds__(kThreads) sum_parts(const FfnSum s) {
  constexpr int kColumns = kThreads / kShares;
  FLASHU_SHARED(float, shares, kThreads);
  griddepcontrol_wait();
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int share = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t numbers = s.rows * s.stride;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  float sum = 0;
  if (i < numbers) {
    const int begin = s.count * share / kShares;
    const int end = s.count * (share + 1) / kShares;
#pragma unroll 8
    for (int part = begin; part < end; ++part) sum += s.parts[part * numbers + i];
  }
  shares[threadIdx.x] = sum;
  __syncthreads();
  if (share != 0 || i >= numbers) return;
  float total = 0;
#pragma unroll
  for (int other = 0; other < kShares; ++other) total += shares[other * kColumns + column];
  const int64_t row = i / s.stride;
  const int64_t c = i % s.stride;
  if (c >= s.width) return;
  if (s.residual != nullptr)
    total += to_float(static_cast<const T*>(s.residual)[row * s.residual_stride + c]);
  static_cast<T*>(s.out)[row * s.out_stride + c] = from_float<T>(total);
}

template <class T, int kShares>
void launch_sum(const FfnSum& s, Stream stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(s.rows * s.stride, kThreads / kShares))),
                            dim3(kThreads), 0, stream, true};
  launch<sum_parts<T, kShares>>("sum_parts", config, s);
}

}  // namespace

void ffn_sum(const FfnSum& sum, int32_t type, Stream stream) {
  core::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 2) {
      if (sum.count <= kFewParts) return launch_sum<T, 1>(sum, stream);
      launch_sum<T, 16>(sum, stream);
    }
  });
}

}  // namespace flashu::cuda
