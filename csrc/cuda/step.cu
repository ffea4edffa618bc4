// The step family on CUDA devices. These move a few hundred kilobytes to a few megabytes; what counts is one
// launch each and 16 bytes to a load.
#include <algorithm>

#include "core/rows.hpp"
#include "core/typed.hpp"
#include "cuda/primitives/launch.cuh"
#include "cuda/step.hpp"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

using core::pointer;
using core::with_type;

// ---- one Euler step

// Latents lie [channels, positions] per image, velocities [positions, channels]: a block turns a tile of
// them.
constexpr int kTilePositions = 64;
constexpr int kTileChannels = 16;

template <class L, class V>
struct EulerArguments {
  L* latents;
  L* velocity;  // or null
  const V* v;
  const float* s;
  const float* dt;
  const int64_t* step;
  int64_t positions, channels, images, steps;
  bool guided;
};

template <class L, class V>
__global__ void __launch_bounds__(256) euler_step(const EulerArguments<L, V> a) {
  FLASHU_SHARED(float, tile, kTileChannels*(kTilePositions + 1));
  // A step outside the tables, which the host cannot see, changes nothing.
  const int64_t step = *a.step;
  if (step < 0 || step >= a.steps) return;
  const int64_t image = blockIdx.z;
  const int64_t first_position = static_cast<int64_t>(blockIdx.x) * kTilePositions;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kTileChannels;
  const int64_t plane = a.positions * a.channels;
  const V* const conditional = a.v + image * plane;
  const V* const unconditional = conditional + a.images * plane;
  const float s = a.guided ? a.s[step] : 0.0f;
  for (int i = threadIdx.x; i < kTilePositions * kTileChannels; i += 256) {
    const int64_t position = first_position + i / kTileChannels;
    const int64_t channel = first_channel + i % kTileChannels;
    if (position >= a.positions || channel >= a.channels) continue;
    const int64_t at = position * a.channels + channel;
    float v = to_float(conditional[at]);
    if (a.guided) {
      const float base = to_float(unconditional[at]);
      v = base + s * (v - base);
    }
    tile[i % kTileChannels * (kTilePositions + 1) + i / kTileChannels] = v;
  }
  __syncthreads();
  const float dt = a.dt[step];
  for (int i = threadIdx.x; i < kTilePositions * kTileChannels; i += 256) {
    const int64_t position = first_position + i % kTilePositions;
    const int64_t channel = first_channel + i / kTilePositions;
    if (position >= a.positions || channel >= a.channels) continue;
    const float v = tile[i / kTilePositions * (kTilePositions + 1) + i % kTilePositions];
    const int64_t at = image * plane + channel * a.positions + position;
    a.latents[at] = from_float<L>(to_float(a.latents[at]) + dt * v);
    if (a.velocity != nullptr) a.velocity[at] = from_float<L>(v);
  }
}

// ---- config far features moved

constexpr int kDeltaSums = 6;
constexpr int kDeltaThreads = 256;
constexpr int64_t kMaxDeltaBlocks = 528;  // fixed, so that the order of summing does not depend on the device

template <class T>
struct DeltaArguments {
  const T* a;
  const T* b;
  int64_t rows, width, a_stride, b_stride;
  float* partial;  // [blocks][kDeltaSums]
};

template <class T>
FLASHU_DEVICE void add_delta(float (&sums)[kDeltaSums], float x, float y) {
  sums[0] += fabsf(x - y);
  sums[1] += fabsf(y);
  sums[2] += (x - y) * (x - y);
  sums[3] += x * x;
  sums[4] += y * y;
  sums[5] += x * y;
}

// kValues values of a row at a time: 16 bytes, or one.
template <class T, int kValues>
__global__ void __launch_bounds__(kDeltaThreads) delta_partial(const DeltaArguments<T> a) {
  FLASHU_SHARED(float, scratch, kDeltaThreads / kWarp);
  float sums[kDeltaSums] = {};
  const int64_t chunks = a.width / kValues;
  const int64_t count = a.rows * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kDeltaThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = i / chunks;
    const int64_t at = i % chunks * kValues;
    const T* const x = a.a + row * a.a_stride + at;
    const T* const y = a.b + row * a.b_stride + at;
    if constexpr (kValues == 1) {
      add_delta<T>(sums, to_float(*x), to_float(*y));
    } else {
      const Vector<T> left = load_vector(x);
      const Vector<T> right = load_vector(y);
#pragma unroll
      for (int j = 0; j < kValues; ++j) add_delta<T>(sums, left.value[j], right.value[j]);
    }
  }
#pragma unroll
  for (int k = 0; k < kDeltaSums; ++k) {
    const float sum = sum_block<kDeltaThreads>(sums[k], scratch);
    if (threadIdx.x == 0) a.partial[static_cast<int64_t>(blockIdx.x) * kDeltaSums + k] = sum;
  }
}

FLASHU_DEVICE float ratio(double numerator, double denominator) {
  return numerator == 0 && denominator == 0 ? 0.0f : static_cast<float>(numerator / denominator);
}

// One block, a warp to each kind of sum, in double.
__global__ void __launch_bounds__(kDeltaSums* kWarp)
    delta_total(const float* partial, int blocks, float* out) {
  griddepcontrol_wait();
  FLASHU_SHARED(double, total, kDeltaSums);
  const int k = static_cast<int>(threadIdx.x) / kWarp;
  double sum = 0;
  for (int b = static_cast<int>(threadIdx.x) % kWarp; b < blocks; b += kWarp)
    sum += static_cast<double>(partial[b * kDeltaSums + k]);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) total[k] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  out[0] = ratio(total[0], total[1]);
  out[1] = ratio(sqrt(total[2]), sqrt(total[4]));
  out[2] = ratio(total[5], sqrt(total[3]) * sqrt(total[4]));
}

int64_t delta_blocks(const flashu_tensor& a) {
  const int64_t values = core::numel(a);
  return std::clamp<int64_t>(divide_up(values, 16 * kDeltaThreads), 1, kMaxDeltaBlocks);
}

// ---- carrying features forward

template <class T>
struct TaylorArguments {
  T* state;  // [order + 1][n]
  const T* feature;
  T* out;
  int64_t n;
  int order, terms;  // terms: differences that exist
  float by;          // the interval, or config far ahead
};

// The numbers of one place in time: kValues neighbours of each order.
template <class T, int kValues>
FLASHU_DEVICE void read_values(float (&out)[kValues], const T* from) {
  if constexpr (kValues == 1) {
    out[0] = to_float(*from);
  } else {
    const Vector<T> chunk = load_vector(from);
#pragma unroll
    for (int j = 0; j < kValues; ++j) out[j] = chunk.value[j];
  }
}
template <class T, int kValues>
FLASHU_DEVICE void write_values(T* to, const float (&in)[kValues]) {
  if constexpr (kValues == 1) {
    *to = from_float<T>(in[0]);
  } else {
    Vector<T> chunk;
#pragma unroll
    for (int j = 0; j < kValues; ++j) chunk.value[j] = in[j];
    store_vector(to, chunk);
  }
}

template <class T, int kValues>
__global__ void __launch_bounds__(256) update_differences(const TaylorArguments<T> a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * kValues;
  if (at >= a.n) return;
  float fresh[kValues];
  read_values<T, kValues>(fresh, a.feature + at);
  for (int i = 0; i <= a.order; ++i) {
    float old[kValues];
    read_values<T, kValues>(old, a.state + i * a.n + at);
    float kept[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      kept[j] = i <= a.terms ? fresh[j] : 0.0f;
      fresh[j] = (fresh[j] - old[j]) / a.by;
    }
    write_values<T, kValues>(a.state + i * a.n + at, kept);
  }
}

template <class T, int kValues>
__global__ void __launch_bounds__(256) extrapolate(const TaylorArguments<T> a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * kValues;
  if (at >= a.n) return;
  float sum[kValues];
  read_values<T, kValues>(sum, a.state + at);
  float weight = a.by;
#pragma unroll 1  // ptxas 12.5 spills around the divisions of an unrolled loop
  for (int i = 1; i <= a.terms; ++i) {
    float term[kValues];
    read_values<T, kValues>(term, a.state + i * a.n + at);
#pragma unroll
    for (int j = 0; j < kValues; ++j) sum[j] += weight * term[j];
    weight = weight * a.by / static_cast<float>(i + 1);
  }
  write_values<T, kValues>(a.out + at, sum);
}

// Launches kVectors where every order and both ends allow 16-byte chunks, else kValues.
template <auto kVectors, auto kValues, class T>
void launch_chunks(const char* name, const TaylorArguments<T>& a, const T* other, Stream stream) {
  const bool whole =
      a.n % kPerVector<T> == 0 && takes_vectors<T>(a.state, {a.n}) && takes_vectors<T>(other, {});
  const int64_t chunks = whole ? a.n / kPerVector<T> : a.n;
  const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(chunks, 256))), dim3(256), 0, stream};
  if (whole) return launch<kVectors>(name, config, a);
  launch<kValues>(name, config, a);
}

}  // namespace

void guided_euler_step(const flashu_guided_euler_step_args& args) {
  const DeviceGuard guard(args.latents.device);
  with_type(args.latents.dtype, [&](auto latent) {
    with_type(args.v.dtype, [&](auto velocity) {
      using L = decltype(latent);
      using V = decltype(velocity);
      const int64_t images = args.latents.sizes[0];
      const EulerArguments<L, V> a{pointer<L>(args.latents),
                                   pointer<L>(args.velocity),
                                   pointer<V>(args.v),
                                   pointer<float>(args.s),
                                   pointer<float>(args.dt),
                                   pointer<int64_t>(args.step),
                                   args.latents.sizes[2] * args.latents.sizes[3],
                                   args.latents.sizes[1],
                                   images,
                                   args.s.sizes[0],
                                   args.v.sizes[0] != images};
      FLASHU_CHECK(images <= 65535 && divide_up(a.channels, kTileChannels) <= 65535, FLASHU_UNSUPPORTED,
                   "latents: expected at most 65535 images on CUDA, got ", images);
      const LaunchConfig config{
          dim3(static_cast<unsigned>(divide_up(a.positions, kTilePositions)),
               static_cast<unsigned>(divide_up(a.channels, kTileChannels)), static_cast<unsigned>(images)),
          dim3(256), 0, static_cast<Stream>(args.stream)};
      launch<euler_step<L, V>>("euler_step", config, a);
    });
  });
}

uint64_t feature_delta_workspace(const flashu_feature_delta_args& args) {
  return static_cast<uint64_t>(delta_blocks(args.a)) * kDeltaSums * sizeof(float);
}

void feature_delta(const flashu_feature_delta_args& args) {
  const DeviceGuard guard(args.a.device);
  core::check_workspace(args.workspace, args.workspace_bytes, feature_delta_workspace(args));
  const auto stream = static_cast<Stream>(args.stream);
  const int64_t blocks = delta_blocks(args.a);
  auto* const partial = static_cast<float*>(args.workspace);
  const core::Rows a = core::as_rows("a", args.a);
  const core::Rows b = core::as_rows("b", args.b);
  with_type(args.a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const DeltaArguments<T> d{pointer<T>(args.a), pointer<T>(args.b), a.count, a.width,
                              a.stride,           b.stride,           partial};
    const bool vectors = takes_vectors(d.a, {d.a_stride, d.width}) && takes_vectors(d.b, {d.b_stride});
    const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kDeltaThreads), 0, stream};
    if (vectors) return launch<delta_partial<T, kPerVector<T>>>("delta_partial", config, d);
    launch<delta_partial<T, 1>>("delta_partial", config, d);
  });
  const LaunchConfig config{dim3(1), dim3(kDeltaSums * kWarp), 0, stream, true};
  launch<delta_total>("delta_total", config, static_cast<const float*>(partial), static_cast<int>(blocks),
                      pointer<float>(args.out));
}

void taylor_update(const flashu_taylor_update_args& args) {
  const DeviceGuard guard(args.state.device);
  with_type(args.state.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int order = static_cast<int>(args.state.sizes[0]) - 1;
    const TaylorArguments<T> a{pointer<T>(args.state),
                               pointer<T>(args.feature),
                               nullptr,
                               core::numel(args.feature),
                               order,
                               static_cast<int>(std::min<int64_t>(order, args.count)),
                               static_cast<float>(args.interval)};
    launch_chunks<update_differences<T, kPerVector<T>>, update_differences<T, 1>>(
        "update_differences", a, a.feature, static_cast<Stream>(args.stream));
  });
}

void taylor_predict(const flashu_taylor_predict_args& args) {
  const DeviceGuard guard(args.state.device);
  with_type(args.state.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int order = static_cast<int>(args.state.sizes[0]) - 1;
    const TaylorArguments<T> a{
        pointer<T>(args.state),        nullptr, pointer<T>(args.out),
        core::numel(args.out),         order,   static_cast<int>(std::min<int64_t>(order, args.count - 1)),
        static_cast<float>(args.ahead)};
    launch_chunks<extrapolate<T, kPerVector<T>>, extrapolate<T, 1>>(
        "extrapolate", a, static_cast<const T*>(a.out), static_cast<Stream>(args.stream));
  });
}

}  // namespace flashu::cuda
