// Rotary embedding of queries and keys, with their head norms, and the writing of keys and values into a
// cache, on CUDA devices: one launch, every element read once and written once.
//
// Floor: bytes / bandwidth, or one launch where the tokens are few. A head is the work of a part of a warp:
// each thread has a chunk of its lower half and the same chunk of its upper half, which is what a rotation
// needs together. Heads of one token are neighbours, so its angles come from L1.
#include "core/typed.hpp"
#include "cuda/norm.hpp"
#include "cuda/primitives/launch.cuh"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

using core::pointer;

// Heads of [rows, tokens, heads, d], any strides but the last.
template <class T>
struct Heads {
  T* data;
  int64_t row_stride, token_stride, head_stride;
  FLASHU_DEVICE T* at(int64_t row, int64_t token, int64_t head) const {
    return data + row * row_stride + token * token_stride + head * head_stride;
  }
};

// Angles of [rows, tokens, d]; row stride 0 where one row serves all.
template <class T>
struct Table {
  const T* data;
  int64_t row_stride, token_stride;
  FLASHU_DEVICE const T* at(int64_t row, int64_t token) const {
    return data + row * row_stride + token * token_stride;
  }
};

template <class T>
struct RotaryArguments {
  Heads<T> query, key, value, out, keys, values;
  Table<T> cos, sin;
  const T* query_norm;  // or null, as key_norm
  const T* key_norm;
  const int64_t* start;  // or null: 0
  int64_t start_stride;
  int64_t capacity;
  uint32_t heads, kv_heads;
  uint32_t row_heads;   // of all tokens of a row: queries, keys and values
  uint32_t row_blocks;  // blocks that they take
  int32_t half;         // of a head's width
  float eps;
};

constexpr int kThreads = 256;

// What one group of threads does: a head to read and its place to go; `to` is null where it has none.
template <class T>
struct Task {
  const T* from = nullptr;
  T* to = nullptr;
  const T* norm = nullptr;  // or null
  const T* cos = nullptr;   // null: the head is copied
  const T* sin = nullptr;
};

template <class T, int kGroup>
FLASHU_DEVICE Task<T> task_of(const RotaryArguments<T>& a) {
  Task<T> task;
  const uint32_t index = blockIdx.x % a.row_blocks * (kThreads / kGroup) + threadIdx.x / kGroup;
  if (index >= a.row_heads) return task;
  const int64_t row = blockIdx.x / a.row_blocks;
  const uint32_t of_token = a.heads + 2 * a.kv_heads;
  const int64_t token = index / of_token;
  uint32_t head = index % of_token;
  if (head < a.heads) {
    task.from = a.query.at(row, token, head);
    task.to = a.out.at(row, token, head);
    task.norm = a.query_norm;
  } else {
    head -= a.heads;
    const int64_t start = a.start == nullptr ? 0 : a.start[row * a.start_stride];
    // start + token may not fit; a slot outside the cache, which the host cannot see, is not written.
    if (start < -token || start >= a.capacity - token) return task;
    const int64_t slot = start + token;
    if (head >= a.kv_heads) {
      task.from = a.value.at(row, token, head - a.kv_heads);
      task.to = a.values.at(row, slot, head - a.kv_heads);
      return task;
    }
    task.from = a.key.at(row, token, head);
    task.to = a.keys.at(row, slot, head);
    task.norm = a.key_norm;
  }
  task.cos = a.cos.at(row, token);
  task.sin = a.sin.at(row, token);
  return task;
}

// fma by hand, so that a value does not depend on the path that it takes.
FLASHU_DEVICE float rotated_low(float low, float high, float cos, float sin) {
  return fmaf(-high, sin, low * cos);
}
FLASHU_DEVICE float rotated_high(float low, float high, float cos, float sin) {
  return fmaf(low, sin, high * cos);
}

template <class T>
FLASHU_DEVICE float rounded(float value) {
  return to_float(from_float<T>(value));
}

template <class T>
FLASHU_DEVICE float sum_squares(const Vector<T>& chunk) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) squares += chunk.value[i] * chunk.value[i];
  return squares;
}

template <class T>
FLASHU_DEVICE void scale(Vector<T>& chunk, float inverse, const T* norm) {
  const Vector<T> weight = load_vector(norm);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i)
    chunk.value[i] = rounded<T>(chunk.value[i] * (inverse * weight.value[i]));
}

// Halves of at most kGroup chunks of 16 bytes. Squares are added in the order of norm.cu where a head is 2,
// 4, 8, 16 or 32 chunks.
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) rotary_vectors(const __grid_constant__ RotaryArguments<T> a) {
  const Task<T> task = task_of<T, kGroup>(a);
  const int low_at = threadIdx.x % kGroup * kPerVector<T>;
  const int high_at = a.half + low_at;
  const bool busy = task.to != nullptr && low_at < a.half;
  uint4 low_bits{};
  uint4 high_bits{};
  if (busy) {
    low_bits = load16(in_global(task.from) + low_at);
    high_bits = load16(in_global(task.from) + high_at);
  }
  Vector<T> low = widen<T>(low_bits);
  Vector<T> high = widen<T>(high_bits);
  if (a.query_norm != nullptr) {  // every lane of the warp takes part in sums, whatever its head
    const float squares = sum_group<kGroup>(sum_squares(low) + sum_squares(high));
    if (busy && task.norm != nullptr) {
      const float inverse = 1.0f / sqrtf(squares / static_cast<float>(2 * a.half) + a.eps);
      scale(low, inverse, in_global(task.norm) + low_at);
      scale(high, inverse, in_global(task.norm) + high_at);
    }
  }
  if (!busy) return;
  if (task.cos != nullptr) {
    const Vector<T> low_cos = load_vector(in_global(task.cos) + low_at);
    const Vector<T> low_sin = load_vector(in_global(task.sin) + low_at);
    const Vector<T> high_cos = load_vector(in_global(task.cos) + high_at);
    const Vector<T> high_sin = load_vector(in_global(task.sin) + high_at);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) {
      const float x = low.value[i];
      const float y = high.value[i];
      low.value[i] = rotated_low(x, y, low_cos.value[i], low_sin.value[i]);
      high.value[i] = rotated_high(x, y, high_cos.value[i], high_sin.value[i]);
    }
    low_bits = narrow<T>(low);
    high_bits = narrow<T>(high);
  }
  store16(in_global(task.to) + low_at, low_bits);
  store16(in_global(task.to) + high_at, high_bits);
}

// Any width and any alignment, value by value.
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) rotary_values(const __grid_constant__ RotaryArguments<T> a) {
  const Task<T> task = task_of<T, kGroup>(a);
  const int member = threadIdx.x % kGroup;
  const int32_t half = task.to == nullptr ? 0 : a.half;
  float inverse = 1;
  if (a.query_norm != nullptr) {
    float squares = 0;
    for (int32_t j = member; j < 2 * half; j += kGroup) {
      const float value = to_float(task.from[j]);
      squares += value * value;
    }
    squares = sum_group<kGroup>(squares);
    inverse = 1.0f / sqrtf(squares / static_cast<float>(2 * a.half) + a.eps);
  }
  for (int32_t j = member; j < half; j += kGroup) {
    const T low_bits = task.from[j];
    const T high_bits = task.from[half + j];
    if (task.cos == nullptr) {
      task.to[j] = low_bits;
      task.to[half + j] = high_bits;
      continue;
    }
    float low = to_float(low_bits);
    float high = to_float(high_bits);
    if (task.norm != nullptr) {
      low = rounded<T>(low * (inverse * to_float(task.norm[j])));
      high = rounded<T>(high * (inverse * to_float(task.norm[half + j])));
    }
    task.to[j] = from_float<T>(rotated_low(low, high, to_float(task.cos[j]), to_float(task.sin[j])));
    task.to[half + j] =
        from_float<T>(rotated_high(low, high, to_float(task.cos[half + j]), to_float(task.sin[half + j])));
  }
}

template <auto kKernel, class T>
void launch_rotary(const char* name, int group, RotaryArguments<T> a, int64_t rows, Stream stream) {
  const int64_t row_blocks = divide_up(a.row_heads, kThreads / group);
  FLASHU_CHECK(rows * row_blocks < int64_t{1} << 31, FLASHU_UNSUPPORTED,
               "query: expected less than 2^31 blocks of ", kThreads / group, " heads on CUDA, got ",
               rows * row_blocks);
  a.row_blocks = static_cast<uint32_t>(row_blocks);
  const LaunchConfig config{dim3(static_cast<unsigned>(rows * row_blocks)), dim3(kThreads), 0, stream};
  launch<kKernel>(name, config, a);
}

// A stride that is never used does not say anything of alignment.
int64_t stride_of(const flashu_tensor& tensor, int dim) {
  return tensor.sizes[dim] > 1 ? tensor.strides[dim] : 0;
}

template <class T>
Heads<T> heads_of(const flashu_tensor& tensor, int token_dim = 1) {
  return {pointer<T>(tensor), stride_of(tensor, 0), stride_of(tensor, token_dim),
          stride_of(tensor, 3 - token_dim)};
}

template <class T>
Table<T> table_of(const flashu_tensor& tensor) {
  return {pointer<T>(tensor), stride_of(tensor, 0), stride_of(tensor, 1)};
}

template <class T>
bool take_vectors(const RotaryArguments<T>& a) {
  const auto heads = [](const Heads<T>& h) {
    return takes_vectors(h.data, {h.row_stride, h.token_stride, h.head_stride});
  };
  const auto table = [](const Table<T>& t) { return takes_vectors(t.data, {t.row_stride, t.token_stride}); };
  return a.half % kPerVector<T> == 0 && a.half <= kWarp * kPerVector<T> && heads(a.query) && heads(a.key) &&
         heads(a.value) && heads(a.out) && heads(a.keys) && heads(a.values) && table(a.cos) && table(a.sin) &&
         takes_vectors(a.query_norm, {}) && takes_vectors(a.key_norm, {});
}

}  // namespace

void rotary_cache(const flashu_rotary_cache_args& args) {
  const DeviceGuard guard(args.query.device);
  core::with_type(args.query.dtype, [&](auto tag) {
    using T = decltype(tag);
    RotaryArguments<T> a{};
    a.query = heads_of<T>(args.query);
    a.key = heads_of<T>(args.key);
    a.value = heads_of<T>(args.value);
    a.out = heads_of<T>(args.out, 2);
    a.keys = heads_of<T>(args.keys);
    a.values = heads_of<T>(args.values);
    a.cos = table_of<T>(args.cos);
    a.sin = table_of<T>(args.sin);
    a.query_norm = pointer<T>(args.query_norm);
    a.key_norm = pointer<T>(args.key_norm);
    a.start = pointer<int64_t>(args.start);
    a.start_stride = args.start.ndim == 1 ? stride_of(args.start, 0) : 0;
    a.capacity = args.keys.sizes[1];
    const int64_t of_token = args.query.sizes[2] + 2 * args.key.sizes[2];
    const int64_t of_row = args.query.sizes[1] * of_token;
    FLASHU_CHECK(of_row < int64_t{1} << 31, FLASHU_UNSUPPORTED,
                 "query: expected less than 2^31 heads of all tokens of a row on CUDA, got ", of_row);
    FLASHU_CHECK(args.query.sizes[3] < int64_t{1} << 30, FLASHU_UNSUPPORTED,
                 "query: expected a head dimension below 2^30 on CUDA, got ", args.query.sizes[3]);
    a.heads = static_cast<uint32_t>(args.query.sizes[2]);
    a.kv_heads = static_cast<uint32_t>(args.key.sizes[2]);
    a.row_heads = static_cast<uint32_t>(of_row);
    a.half = static_cast<int32_t>(args.query.sizes[3] / 2);
    a.eps = static_cast<float>(args.eps);
    const int64_t rows = args.query.sizes[0];
    const auto stream = static_cast<Stream>(args.stream);
    if (!take_vectors(a)) {
      // Small heads share a warp.
      if (a.half <= 8) return launch_rotary<rotary_values<T, 8>>("rotary_values", 8, a, rows, stream);
      return launch_rotary<rotary_values<T, 32>>("rotary_values", 32, a, rows, stream);
    }
    // The least number of threads whose registers hold the head.
    const int chunks = a.half / kPerVector<T>;
    if (chunks <= 4) return launch_rotary<rotary_vectors<T, 4>>("rotary_vectors", 4, a, rows, stream);
    if (chunks <= 8) return launch_rotary<rotary_vectors<T, 8>>("rotary_vectors", 8, a, rows, stream);
    if (chunks <= 16) return launch_rotary<rotary_vectors<T, 16>>("rotary_vectors", 16, a, rows, stream);
    launch_rotary<rotary_vectors<T, 32>>("rotary_vectors", 32, a, rows, stream);
  });
}

}  // namespace flashu::cuda
