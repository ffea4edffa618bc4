// Adds what several blocks have made of one result: the neurons' contributions when decoding, the parts of K
// of the down half. Always in the same order.
//
// Floor: the parts' bytes / L2 bandwidth. Few parts leave enough columns for all blocks; many parts of one
// row (128 of 1536 columns) are shared among 16 threads a column, or 1536 columns would be 6 blocks. Where
// there are enough columns a thread takes four: fewer blocks, which are not launched in turns.
#include "core/typed.hpp"
#include "cuda/epilogue.cuh"
#include "cuda/ffn_sum.hpp"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFewParts = 4;
constexpr int kWide = 4;          // columns of a thread
constexpr int64_t kBlocks = 132;  // enough for a device

// kShares threads add a column's parts, each some that follow each other; their sums are added in order. What
// a thread's number of columns is changes no sum.
template <class T, int kShares, int kColumns, bool kFinishes>
FLASHU_DEVICE void add_parts(const FfnSum& s) {
  constexpr int kPlaces = kThreads / kShares;
  FLASHU_SHARED(float, shares, kThreads* kColumns);
  griddepcontrol_wait();
  const int place = static_cast<int>(threadIdx.x) % kPlaces;
  const int share = static_cast<int>(threadIdx.x) / kPlaces;
  const int64_t numbers = s.rows * s.stride;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kPlaces + place) * kColumns;
  float sums[kColumns] = {};
  if (i < numbers) {
    const int begin = s.count * share / kShares;
    const int end = s.count * (share + 1) / kShares;
#pragma unroll 8
    for (int part = begin; part < end; ++part) {
      const float* const from = s.parts + part * numbers + i;
      if constexpr (kColumns == kWide) {
        const Vector<float> values = load_vector(from);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[c] += values.value[c];
      } else {
        sums[0] += *from;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) shares[threadIdx.x * kColumns + c] = sums[c];
  __syncthreads();
  if (share != 0 || i >= numbers) return;
  const int64_t row = i / s.stride;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t column = i % s.stride + c;
    if (column >= s.width) return;
    float total = 0;
#pragma unroll
    for (int other = 0; other < kShares; ++other) total += shares[(other * kPlaces + place) * kColumns + c];
    if constexpr (kFinishes) {
      float sum[1] = {total};
      finish<T>(sum, s.epilogue, s.width, [column](int) { return column; });
      total = sum[0];
    }
    if (s.residual != nullptr)
      total += to_float(static_cast<const T*>(s.residual)[row * s.residual_stride + column]);
    static_cast<T*>(s.out)[row * s.out_stride + column] = from_float<T>(total);
  }
}

template <class T, int kShares, int kColumns>
__global__ void __launch_bounds__(kThreads) sum_parts(const FfnSum s) {
  add_parts<T, kShares, kColumns, false>(s);
}
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) sum_and_finish(const FfnSum s) {
  add_parts<T, 1, kColumns, true>(s);
}

template <class T, int kShares, int kColumns>
void launch_sum(const FfnSum& s, Stream stream) {
  const int64_t blocks = divide_up(s.rows * s.stride, kThreads / kShares * kColumns);
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, true};
  if constexpr (kShares == 1) {
    if (s.epilogue.finishes()) return launch<sum_and_finish<T, kColumns>>("sum_and_finish", config, s);
  }
  launch<sum_parts<T, kShares, kColumns>>("sum_parts", config, s);
}

template <class T, int kShares>
void launch_shares(const FfnSum& s, Stream stream) {
  const bool wide =
      s.rows * s.stride >= kBlocks * (kThreads / kShares) * kWide && takes_vectors(s.parts, {s.stride});
  if (wide) return launch_sum<T, kShares, kWide>(s, stream);
  launch_sum<T, kShares, 1>(s, stream);
}

}  // namespace

void ffn_sum(const FfnSum& sum, int32_t type, Stream stream) {
  core::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 2) {
      if (sum.count <= kFewParts) return launch_shares<T, 1>(sum, stream);
      FLASHU_CHECK(!sum.epilogue.finishes(), FLASHU_INTERNAL, "ffn: expected an epilogue after at most ",
                   kFewParts, " parts, got ", sum.count);
      launch_shares<T, 16>(sum, stream);
    }
  });
}

}  // namespace flashu::cuda
