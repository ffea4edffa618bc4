// The norm family on CUDA devices. Rows are read once, kept in registers, and written once.
//
// Floor: bytes / bandwidth; a row of 1536 bf16 is 3 KiB in and 3 KiB out, the weight stays in L1. Small rows
// (heads of 64 and 128) share a warp, so that every lane has 16 bytes to load.
#include <algorithm>
#include <vector>

#include "core/rows.hpp"
#include "core/spans.hpp"
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

// Spans travel as kernel arguments: no copy, no allocation, and a captured graph keeps them.
inline constexpr int kMaxSpans = 96;
struct SpanTable {
  struct Span {
    int32_t row, begin, end, modulation;
  };
  int32_t count;
  Span spans[kMaxSpans];

  // The row of the modulation tensors, or -1.
  FLASHU_DEVICE int32_t find(int64_t row, int64_t token) const {
    for (int32_t i = 0; i < count; ++i) {
      const Span& s = spans[i];
      if (s.row == row && s.begin <= token && token < s.end) return s.modulation;
    }
    return -1;
  }
};

enum class Norm { kPlain, kAdd, kModulated };

template <class T>
struct NormArguments {
  Rows3<T> x;         // kAdd: receives the norm
  Rows3<T> residual;  // kAdd only
  Rows3<T> out;       // otherwise
  const T* weight;
  const T* shift;
  const T* scale;
  int64_t shift_stride, scale_stride;
  int64_t first_row;  // rows count through batches and tokens
  int64_t rows, tokens;
  int32_t width;
  float eps;
};

// kGroup threads work on a row, kVectors pieces each; blocks of 256 threads where kGroup is a part of a warp.
constexpr int block_threads(int group) { return group <= kWarp ? 256 : group; }

template <class T, Norm kNorm, int kGroup, int kVectors>
__global__ void __launch_bounds__(block_threads(kGroup))
    norm_vectors(const NormArguments<T> a, const __grid_constant__ SpanTable spans) {
  constexpr int kThreads = block_threads(kGroup);
  constexpr int kRowsOfBlock = kThreads / kGroup;
  FLASHU_SHARED(float, scratch, kThreads / kWarp);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kGroup;
  const bool inside = row < a.rows;  // a warp may reach past the end and still has to take part in sums
  const int64_t batch = (a.first_row + row) / a.tokens;
  const int64_t token = (a.first_row + row) % a.tokens;
  const int member = threadIdx.x % kGroup;
  Vector<T> piece[kVectors];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = (v * kGroup + member) * kPerVector<T>;
    if (!inside || at >= a.width) continue;
    piece[v] = load_vector(a.x.row(batch, token) + at);
    if constexpr (kNorm == Norm::kAdd) {
      T* const residual = a.residual.row(batch, token) + at;
      const Vector<T> old = load_vector(residual);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) piece[v].value[i] += old.value[i];
      // The norm is that of the stored sum.
      const uint4 stored = narrow<T>(piece[v]);
      store16(residual, stored);
      piece[v] = widen<T>(stored);
    }
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) squares += piece[v].value[i] * piece[v].value[i];
  }
  if constexpr (kGroup <= kWarp) {
    squares = sum_group<kGroup>(squares);
  } else {
    squares = sum_block<kThreads>(squares, scratch);
  }
  if (!inside) return;
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.eps);
  const int32_t span = kNorm == Norm::kModulated ? spans.find(batch, token) : -1;
  T* const out = (kNorm == Norm::kAdd ? a.x : a.out).row(batch, token);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = (v * kGroup + member) * kPerVector<T>;
    if (at >= a.width) continue;
    const Vector<T> weight = load_vector(a.weight + at);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) piece[v].value[i] *= inverse * weight.value[i];
    if constexpr (kNorm == Norm::kModulated) {
      if (span >= 0) {
        const Vector<T> shift = load_vector(a.shift + span * a.shift_stride + at);
        const Vector<T> scale = load_vector(a.scale + span * a.scale_stride + at);
#pragma unroll
        for (int i = 0; i < kPerVector<T>; ++i)
          piece[v].value[i] = piece[v].value[i] * (1.0f + scale.value[i]) + shift.value[i];
      }
    }
    store_vector(out + at, piece[v]);
  }
}

// Any width and any alignment: one block a row, value by value.
template <class T, Norm kNorm>
__global__ void __launch_bounds__(256)
    norm_values(const NormArguments<T> a, const __grid_constant__ SpanTable spans) {
  FLASHU_SHARED(float, scratch, 256 / kWarp);
  const int64_t row = a.first_row + blockIdx.x;
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
  const int32_t span = kNorm == Norm::kModulated ? spans.find(batch, token) : -1;
  const T* const from = kNorm == Norm::kAdd ? residual : x;
  T* const out = kNorm == Norm::kAdd ? x : a.out.row(batch, token);
  for (int j = threadIdx.x; j < a.width; j += 256) {
    float value = to_float(from[j]) * (inverse * to_float(a.weight[j]));
    if (span >= 0) {
      value = value * (1.0f + to_float(a.scale[span * a.scale_stride + j])) +
              to_float(a.shift[span * a.shift_stride + j]);
    }
    out[j] = from_float<T>(value);
  }
}

template <class T, Norm kNorm, int kGroup, int kVectors>
void launch_vectors(const NormArguments<T>& a, const SpanTable& spans, Stream stream) {
  constexpr int kThreads = block_threads(kGroup);
  const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(a.rows, kThreads / kGroup))), dim3(kThreads),
                            0, stream};
  launch<norm_vectors<T, kNorm, kGroup, kVectors>>("norm_vectors", config, a, spans);
}

template <class T, Norm kNorm>
void launch_norm(const NormArguments<T>& a, const SpanTable& spans, bool vectors, Stream stream) {
  if (!vectors || a.width > 1024 * kPerVector<T>) {
    const LaunchConfig config{dim3(static_cast<unsigned>(a.rows)), dim3(256), 0, stream};
    return launch<norm_values<T, kNorm>>("norm_values", config, a, spans);
  }
  // The least number of threads whose registers hold the row.
  const int pieces = static_cast<int>(divide_up(a.width, kPerVector<T>));
  if (pieces <= 8) return launch_vectors<T, kNorm, 8, 1>(a, spans, stream);
  if (pieces <= 16) return launch_vectors<T, kNorm, 16, 1>(a, spans, stream);
  if (pieces <= 64) return launch_vectors<T, kNorm, 32, 2>(a, spans, stream);
  if (pieces <= 256) return launch_vectors<T, kNorm, 128, 2>(a, spans, stream);
  if (pieces <= 512) return launch_vectors<T, kNorm, 256, 2>(a, spans, stream);
  launch_vectors<T, kNorm, 256, 4>(a, spans, stream);
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

// Calls part(first batch, end batch, table) for consecutive batches whose spans fit into one table.
template <class Part>
void for_span_tables(const flashu_spans& spans, int64_t batches, const Part& part) {
  std::vector<std::vector<SpanTable::Span>> of_batch(static_cast<size_t>(batches));
  for (int64_t s = 0; s < spans.num_spans; ++s) {
    const int64_t* const span = spans.spans + 3 * s;
    if (span[2] == 0) continue;
    of_batch[static_cast<size_t>(span[0])].push_back(
        {static_cast<int32_t>(span[0]), static_cast<int32_t>(span[1]),
         static_cast<int32_t>(span[1] + span[2]), static_cast<int32_t>(s)});
  }
  for (const auto& list : of_batch) {
    FLASHU_CHECK(list.size() <= kMaxSpans, FLASHU_UNSUPPORTED, "spans: expected at most ", kMaxSpans,
                 " spans in a row on CUDA, got ", list.size());
  }
  for (int64_t first = 0; first < batches;) {
    SpanTable table{};
    int64_t end = first;
    for (; end < batches; ++end) {
      const auto& list = of_batch[static_cast<size_t>(end)];
      if (table.count + list.size() > kMaxSpans) break;
      std::copy(list.begin(), list.end(), table.spans + table.count);
      table.count += static_cast<int32_t>(list.size());
    }
    part(first, end, table);
    first = end;
  }
}

// ---- residual += gate * y

template <class T>
struct GateArguments {
  Rows3<T> residual;
  Rows3<T> y;
  const T* gate;
  int64_t gate_stride;
  int64_t first_row;
  int64_t rows, tokens;
  int32_t width;
};

// kValues values of a row to a thread: a 16-byte piece, or one.
template <class T, int kValues>
__global__ void __launch_bounds__(256)
    gate_add(const GateArguments<T> a, const __grid_constant__ SpanTable spans) {
  const int32_t pieces = (a.width + kValues - 1) / kValues;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= a.rows * pieces) return;
  const int64_t row = a.first_row + i / pieces;
  const int32_t at = static_cast<int32_t>(i % pieces) * kValues;
  const int64_t batch = row / a.tokens;
  const int64_t token = row % a.tokens;
  const int32_t span = spans.find(batch, token);
  T* const residual = a.residual.row(batch, token) + at;
  const T* const y = a.y.row(batch, token) + at;
  if constexpr (kValues == 1) {
    const float gate = span < 0 ? 1.0f : to_float(a.gate[span * a.gate_stride + at]);
    *residual = from_float<T>(to_float(*residual) + gate * to_float(*y));
  } else {
    Vector<T> sum = load_vector(residual);
    const Vector<T> more = load_vector(y);
    Vector<T> gate;
    if (span >= 0) gate = load_vector(a.gate + span * a.gate_stride + at);
#pragma unroll
    for (int j = 0; j < kValues; ++j) sum.value[j] += (span < 0 ? 1.0f : gate.value[j]) * more.value[j];
    store_vector(residual, sum);
  }
}

// What rms_norm and add_rms_norm have in common.
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

}  // namespace

void rms_norm(const flashu_rms_norm_args& args) {
  const DeviceGuard guard(args.x.device);
  core::with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    NormArguments<T> a = plain_arguments<T>(args);
    a.out = folded<T>("out", args.out);
    const bool vectors =
        rows_take_vectors(a.x) && rows_take_vectors(a.out) && takes_vectors(a.weight, {a.width});
    launch_norm<T, Norm::kPlain>(a, {}, vectors, static_cast<Stream>(args.stream));
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
    launch_norm<T, Norm::kAdd>(a, {}, vectors, static_cast<Stream>(args.stream));
  });
}

void span_modulate(const flashu_span_modulate_args& args) {
  const DeviceGuard guard(args.x.device);
  core::with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    NormArguments<T> a{};
    a.x = rows3<T>(args.x);
    a.out = rows3<T>(args.out);
    a.weight = pointer<T>(args.weight);
    a.shift = pointer<T>(args.shift);
    a.scale = pointer<T>(args.scale);
    a.shift_stride = args.shift.strides[0];
    a.scale_stride = args.scale.strides[0];
    a.tokens = args.x.sizes[1];
    a.width = static_cast<int32_t>(args.x.sizes[2]);
    a.eps = static_cast<float>(args.eps);
    const bool vectors = rows_take_vectors(a.x) && rows_take_vectors(a.out) &&
                         takes_vectors(a.weight, {a.width}) && takes_vectors(a.shift, {a.shift_stride}) &&
                         takes_vectors(a.scale, {a.scale_stride});
    for_span_tables(args.spans, args.x.sizes[0], [&](int64_t first, int64_t end, const SpanTable& table) {
      a.first_row = first * a.tokens;
      a.rows = (end - first) * a.tokens;
      launch_norm<T, Norm::kModulated>(a, table, vectors, static_cast<Stream>(args.stream));
    });
  });
}

void span_gate_add(const flashu_span_gate_add_args& args) {
  const DeviceGuard guard(args.residual.device);
  core::with_type(args.residual.dtype, [&](auto tag) {
    using T = decltype(tag);
    GateArguments<T> a{};
    a.residual = rows3<T>(args.residual);
    a.y = rows3<T>(args.y);
    a.gate = pointer<T>(args.gate);
    a.gate_stride = args.gate.strides[0];
    a.tokens = args.residual.sizes[1];
    a.width = static_cast<int32_t>(args.residual.sizes[2]);
    const bool vectors = rows_take_vectors(a.residual) && rows_take_vectors(a.y) &&
                         takes_vectors(a.gate, {a.gate_stride, a.width});
    const int64_t pieces = vectors ? a.width / kPerVector<T> : a.width;
    for_span_tables(args.spans, args.residual.sizes[0],
                    [&](int64_t first, int64_t end, const SpanTable& table) {
                      a.first_row = first * a.tokens;
                      a.rows = (end - first) * a.tokens;
                      const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(a.rows * pieces, 256))),
                                                dim3(256), 0, static_cast<Stream>(args.stream)};
                      if (vectors) return launch<gate_add<T, kPerVector<T>>>("gate_add", config, a, table);
                      launch<gate_add<T, 1>>("gate_add", config, a, table);
                    });
  });
}

}  // namespace flashu::cuda
