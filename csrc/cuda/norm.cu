// The norm family on CUDA devices. Rows are read once, kept in registers, and written once.
//
// Floor: bytes / bandwidth; a row of 1536 bf16 is 3 KiB in and 3 KiB out, the weight stays in L1. Small rows
// (heads of 64 and 128) share a warp, so that every lane has 16 bytes to load.
#include "core/rows.hpp"
#include "core/typed.hpp"
#include "cuda/norm.hpp"
#include "cuda/primitives/launch.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

using core::pointer;

// Rows of [batches, tokens, width], any strides but the last.
template <class T>
struct Rows3 {
  T* data;
  int64_t batch_stride, token_stride;
  FLASHU_DEVICE T* row(int64_t batch, int64_t token) const {
    return data + batch * batch_stride + token * token_stride;
  }
};

enum class Norm { kPlain, kAdd, kModulated };

template <class T>
struct NormArguments {
  Rows3<T> x;         // kAdd: receives the norm
  Rows3<T> residual;  // kAdd only
  Rows3<T> out;       // otherwise
  const T* weight;
  const T* shift;  // kModulated only, a row to a batch
  const T* scale;
  int64_t shift_stride, scale_stride;
  int64_t rows, tokens;  // of all batches; of one
  int32_t width;
  float eps;
};

// kGroup threads work on a row, kVectors chunks each; blocks of 256 threads where kGroup is a part of a warp.
constexpr int block_threads(int group) { return group <= kWarp ? 256 : group; }

template <class T, Norm kNorm, int kGroup, int kVectors>
__global__ void __launch_bounds__(block_threads(kGroup)) norm_vectors(const NormArguments<T> a) {
  constexpr int kThreads = block_threads(kGroup);
  constexpr int kRowsOfBlock = kThreads / kGroup;
  FLASHU_SHARED(float, scratch, kThreads / kWarp);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kGroup;
  const bool inside = row < a.rows;  // a warp may reach past the end and still has to take part in sums
  const int64_t batch = row / a.tokens;
  const int64_t token = row % a.tokens;
  const int member = threadIdx.x % kGroup;
  Vector<T> chunk[kVectors];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = (v * kGroup + member) * kPerVector<T>;
    if (!inside || at >= a.width) continue;
    chunk[v] = load_vector(a.x.row(batch, token) + at);
    if constexpr (kNorm == Norm::kAdd) {
      T* const residual = a.residual.row(batch, token) + at;
      const Vector<T> old = load_vector(residual);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) chunk[v].value[i] += old.value[i];
      // The norm is that of the stored sum.
      const uint4 stored = narrow<T>(chunk[v]);
      store16(residual, stored);
      chunk[v] = widen<T>(stored);
    }
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) squares += chunk[v].value[i] * chunk[v].value[i];
  }
  if constexpr (kGroup <= kWarp) {
    squares = sum_group<kGroup>(squares);
  } else {
    squares = sum_block<kThreads>(squares, scratch);
  }
  if (!inside) return;
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.eps);
  T* const out = (kNorm == Norm::kAdd ? a.x : a.out).row(batch, token);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = (v * kGroup + member) * kPerVector<T>;
    if (at >= a.width) continue;
    const Vector<T> weight = load_vector(a.weight + at);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) chunk[v].value[i] *= inverse * weight.value[i];
    if constexpr (kNorm == Norm::kModulated) {
      const Vector<T> shift = load_vector(a.shift + batch * a.shift_stride + at);
      const Vector<T> scale = load_vector(a.scale + batch * a.scale_stride + at);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i)
        chunk[v].value[i] = chunk[v].value[i] * (1.0f + scale.value[i]) + shift.value[i];
    }
    store_vector(out + at, chunk[v]);
  }
}

// Any width and any alignment: one block a row, value by value.
template <class T, Norm kNorm>
__global__ void __launch_bounds__(256) norm_values(const NormArguments<T> a) {
  FLASHU_SHARED(float, scratch, 256 / kWarp);
  const int64_t row = blockIdx.x;
  const int64_t batch = row / a.tokens;
  const int64_t token = row % a.tokens;
  T* const x = a.x.row(batch, token);
  T* const residual = kNorm == Norm::kAdd ? a.residual.row(batch, token) : nullptr;
  float squares = 0;
  for (int j = threadIdx.x; j < a.width; j += 256) {
    float value = to_float(x[j]);
    if constexpr (kNorm == Norm::kAdd) {
      const T sum = from_float<T>(value + to_float(residual[j]));
      residual[j] = sum;
      value = to_float(sum);
    }
    squares += value * value;
  }
  squares = sum_block<256>(squares, scratch);
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.eps);
  const T* const from = kNorm == Norm::kAdd ? residual : x;
  T* const out = kNorm == Norm::kAdd ? x : a.out.row(batch, token);
  for (int j = threadIdx.x; j < a.width; j += 256) {
    float value = to_float(from[j]) * (inverse * to_float(a.weight[j]));
    if constexpr (kNorm == Norm::kModulated) {
      value = value * (1.0f + to_float(a.scale[batch * a.scale_stride + j])) +
              to_float(a.shift[batch * a.shift_stride + j]);
    }
    out[j] = from_float<T>(value);
  }
}

template <class T, Norm kNorm, int kGroup, int kVectors>
void launch_vectors(const NormArguments<T>& a, Stream stream) {
  constexpr int kThreads = block_threads(kGroup);
  const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(a.rows, kThreads / kGroup))), dim3(kThreads),
                            0, stream};
  launch<norm_vectors<T, kNorm, kGroup, kVectors>>("norm_vectors", config, a);
}

template <class T, Norm kNorm>
void launch_norm(const NormArguments<T>& a, bool vectors, Stream stream) {
  if (!vectors || a.width > 1024 * kPerVector<T>) {
    const LaunchConfig config{dim3(static_cast<unsigned>(a.rows)), dim3(256), 0, stream};
    return launch<norm_values<T, kNorm>>("norm_values", config, a);
  }
  // The least number of threads whose registers hold the row.
  const int chunks = static_cast<int>(divide_up(a.width, kPerVector<T>));
  if (chunks <= 8) return launch_vectors<T, kNorm, 8, 1>(a, stream);
  if (chunks <= 16) return launch_vectors<T, kNorm, 16, 1>(a, stream);
  if (chunks <= 64) return launch_vectors<T, kNorm, 32, 2>(a, stream);
  if (chunks <= 256) return launch_vectors<T, kNorm, 128, 2>(a, stream);
  if (chunks <= 512) return launch_vectors<T, kNorm, 256, 2>(a, stream);
  launch_vectors<T, kNorm, 256, 4>(a, stream);
}

template <class T>
Rows3<T> rows3(const flashu_tensor& tensor) {
  return {pointer<T>(tensor), tensor.strides[0], tensor.strides[1]};
}

// A tensor that folds into rows of one stride, as one batch of them.
template <class T>
Rows3<T> folded(const char* name, const flashu_tensor& tensor) {
  return {pointer<T>(tensor), 0, core::as_rows(name, tensor).stride};
}

template <class T>
bool rows_take_vectors(const Rows3<T>& rows) {
  return takes_vectors(rows.data, {rows.batch_stride, rows.token_stride});
}

// ---- residual += gate * y

template <class T>
struct GateArguments {
  Rows3<T> residual;
  Rows3<T> y;
  const T* gate;  // a row to a batch, or null
  int64_t gate_stride;
  int64_t rows, tokens;  // of all batches; of one
  int32_t width;
};

// kValues values of a row to a thread: a 16-byte chunk, or one.
template <class T, int kValues>
__global__ void __launch_bounds__(256) gate_add_rows(const GateArguments<T> a) {
  const int32_t chunks = (a.width + kValues - 1) / kValues;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= a.rows * chunks) return;
  const int64_t row = i / chunks;
  const int32_t at = static_cast<int32_t>(i % chunks) * kValues;
  const int64_t batch = row / a.tokens;
  const int64_t token = row % a.tokens;
  const bool gated = a.gate != nullptr;
  T* const residual = a.residual.row(batch, token) + at;
  const T* const y = a.y.row(batch, token) + at;
  if constexpr (kValues == 1) {
    const float gate = gated ? to_float(a.gate[batch * a.gate_stride + at]) : 1.0f;
    *residual = from_float<T>(to_float(*residual) + gate * to_float(*y));
  } else {
    Vector<T> sum = load_vector(residual);
    const Vector<T> more = load_vector(y);
    Vector<T> gate;
    if (gated) gate = load_vector(a.gate + batch * a.gate_stride + at);
#pragma unroll
    for (int j = 0; j < kValues; ++j) sum.value[j] += (gated ? gate.value[j] : 1.0f) * more.value[j];
    store_vector(residual, sum);
  }
}

// What rms_norm and add_rms_norm have in common: rows of one batch.
template <class T, class Args>
NormArguments<T> plain_arguments(const Args& args) {
  NormArguments<T> a{};
  a.x = folded<T>("x", args.x);
  a.weight = pointer<T>(args.weight);
  a.rows = a.tokens = core::as_rows("x", args.x).count;
  a.width = static_cast<int32_t>(args.x.sizes[args.x.ndim - 1]);
  a.eps = static_cast<float>(args.eps);
  return a;
}

template <class T>
NormArguments<T> modulated_arguments(const flashu_rms_norm_args& args) {
  NormArguments<T> a{};
  a.x = rows3<T>(args.x);
  a.out = rows3<T>(args.out);
  a.weight = pointer<T>(args.weight);
  a.shift = pointer<T>(args.shift);
  a.scale = pointer<T>(args.scale);
  a.shift_stride = args.shift.strides[0];
  a.scale_stride = args.scale.strides[0];
  a.tokens = args.x.sizes[1];
  a.rows = args.x.sizes[0] * a.tokens;
  a.width = static_cast<int32_t>(args.x.sizes[2]);
  a.eps = static_cast<float>(args.eps);
  return a;
}

}  // namespace

void rms_norm(const flashu_rms_norm_args& args) {
  const DeviceGuard guard(args.x.device);
  core::with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto stream = static_cast<Stream>(args.stream);
    const bool modulated = core::present(args.shift);
    NormArguments<T> a = modulated ? modulated_arguments<T>(args) : plain_arguments<T>(args);
    if (!modulated) a.out = folded<T>("out", args.out);
    const bool vectors =
        rows_take_vectors(a.x) && rows_take_vectors(a.out) && takes_vectors(a.weight, {a.width});
    if (!modulated) return launch_norm<T, Norm::kPlain>(a, vectors, stream);
    const bool modulation_takes_vectors =
        takes_vectors(a.shift, {a.shift_stride}) && takes_vectors(a.scale, {a.scale_stride});
    launch_norm<T, Norm::kModulated>(a, vectors && modulation_takes_vectors, stream);
  });
}

void add_rms_norm(const flashu_add_rms_norm_args& args) {
  const DeviceGuard guard(args.x.device);
  core::with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    NormArguments<T> a = plain_arguments<T>(args);
    a.residual = folded<T>("residual", args.residual);
    const bool vectors =
        rows_take_vectors(a.x) && rows_take_vectors(a.residual) && takes_vectors(a.weight, {a.width});
    launch_norm<T, Norm::kAdd>(a, vectors, static_cast<Stream>(args.stream));
  });
}

void gate_add(const flashu_gate_add_args& args) {
  const DeviceGuard guard(args.residual.device);
  core::with_type(args.residual.dtype, [&](auto tag) {
    using T = decltype(tag);
    GateArguments<T> a{};
    a.residual = rows3<T>(args.residual);
    a.y = rows3<T>(args.y);
    if (core::present(args.gate)) {
      a.gate = pointer<T>(args.gate);
      a.gate_stride = args.gate.strides[0];
    }
    a.tokens = args.residual.sizes[1];
    a.rows = args.residual.sizes[0] * a.tokens;
    a.width = static_cast<int32_t>(args.residual.sizes[2]);
    const bool vectors = rows_take_vectors(a.residual) && rows_take_vectors(a.y) &&
                         takes_vectors(a.gate, {a.gate_stride, a.width});
    const int64_t chunks = vectors ? a.width / kPerVector<T> : a.width;
    const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(a.rows * chunks, 256))), dim3(256), 0,
                              static_cast<Stream>(args.stream)};
    if (vectors) return launch<gate_add_rows<T, kPerVector<T>>>("gate_add", config, a);
    launch<gate_add_rows<T, 1>>("gate_add", config, a);
  });
}

}  // namespace flashu::cuda
