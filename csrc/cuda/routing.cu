// The routing family on CUDA devices: scores by row, selection by row in order, and row moves. Nothing here
// reads data on the host: NaN scores count as smaller than every number, and an index outside the rows as
// padding.
#include "core/rows.hpp"
#include "core/typed.hpp"
#include "cuda/primitives/launch.cuh"
#include "cuda/routing.hpp"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

using core::pointer;
using core::with_type;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ---- scores: a warp to a row

template <class T>
struct CosineArguments {
  const T* x_in;
  const T* x_out;
  int64_t in_stride, out_stride;
  int64_t scored, step;  // row r * step + step - 1 is the r-th that is scored
  int32_t width;
  float* importance;  // [scored]
};

// kValues values at a time: 16 bytes, or one.
template <class T, int kValues>
__global__ void __launch_bounds__(kThreads) cosine_rows(const CosineArguments<T> a) {
  constexpr float kSmallestNorm = 1e-8f;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= a.scored) return;
  const int64_t row = i * a.step + a.step - 1;
  const T* const in = a.x_in + row * a.in_stride;
  const T* const out = a.x_out + row * a.out_stride;
  float dot = 0;
  float in_squares = 0;
  float out_squares = 0;
  const auto add = [&](float x, float y) {
    dot += x * y;
    in_squares += x * x;
    out_squares += y * y;
  };
  for (int at = static_cast<int>(threadIdx.x % kWarp) * kValues; at < a.width; at += kWarp * kValues) {
    if constexpr (kValues == 1) {
      add(to_float(in[at]), to_float(out[at]));
    } else {
      const Vector<T> x = load_vector(in + at);
      const Vector<T> y = load_vector(out + at);
#pragma unroll
      for (int j = 0; j < kValues; ++j) add(x.value[j], y.value[j]);
    }
  }
  dot = sum_group<kWarp>(dot);
  in_squares = sum_group<kWarp>(in_squares);
  out_squares = sum_group<kWarp>(out_squares);
  if (threadIdx.x % kWarp == 0) {
    const float norms = max(sqrtf(in_squares), kSmallestNorm) * max(sqrtf(out_squares), kSmallestNorm);
    a.importance[i] = 1.0f - dot / norms;
  }
}

// One block: the mean, in double; NaN where there is nothing.
__global__ void __launch_bounds__(kThreads) mean_of(const float* values, int64_t count, float* out) {
  griddepcontrol_wait();
  FLASHU_SHARED(double, scratch, kWarps);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += static_cast<double>(values[i]);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  *out = static_cast<float>(total / static_cast<double>(count));
}

template <class T>
struct ValueArguments {
  const T* v;
  int64_t batch_stride, head_stride, token_stride;
  int64_t batches, heads, tokens;
  int32_t width;
  float* out;  // [batches, tokens]
};

template <class T, int kValues>
__global__ void __launch_bounds__(kThreads) value_norm_rows(const ValueArguments<T> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= a.batches * a.tokens) return;
  const T* const token = a.v + i / a.tokens * a.batch_stride + i % a.tokens * a.token_stride;
  const int32_t chunks = (a.width + kValues - 1) / kValues;
  float squares = 0;
  for (int64_t p = threadIdx.x % kWarp; p < a.heads * chunks; p += kWarp) {
    const T* const at = token + p / chunks * a.head_stride + p % chunks * kValues;
    if constexpr (kValues == 1) {
      const float x = to_float(*at);
      squares += x * x;
    } else {
      const Vector<T> x = load_vector(at);
#pragma unroll
      for (int j = 0; j < kValues; ++j) squares += x.value[j] * x.value[j];
    }
  }
  squares = sum_group<kWarp>(squares);
  if (threadIdx.x % kWarp == 0) a.out[i] = sqrtf(squares);
}

// ---- selection: a block to a row

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kDigits = 256;  // keys are looked at 8 bits at a time

// Unsigned keys in the order of the scores; equal scores (0 and -0 too) have equal keys.
template <class T>
FLASHU_DEVICE uint32_t score_key(const T* scores, int64_t at) {
  const float score = to_float(scores[at]) + 0.0f;
  const uint32_t bits = __float_as_uint(score);
  if (score != score) return 0;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// How many threads before this one, in the order of the block, have `flag`; `total`: config many have it at
// all. All threads of the block call it. `scratch`: kSelectWarps + 1 ints of shared memory.
FLASHU_DEVICE int rank_in_block(bool flag, int* scratch, int& total) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const uint32_t votes = __ballot_sync(kAllLanes, flag);
  __syncwarp();  // what the last call left for this warp has been read
  if (lane == 0) scratch[warp] = __popc(votes);
  __syncthreads();
  if (warp == 0) {
    const int own = scratch[lane];
    int sum = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(step));
      if (lane >= step) sum += before;
    }
    scratch[lane] = sum - own;
    if (lane == kWarp - 1) scratch[kSelectWarps] = sum;
  }
  __syncthreads();
  total = scratch[kSelectWarps];
  return scratch[warp] + __popc(votes & ((1u << lane) - 1u));
}
static_assert(kSelectWarps == kWarp, "one warp sums up the warps");

template <class T>
struct TopkArguments {
  const T* scores;
  int64_t stride;
  int32_t tokens, k;
  int64_t* index;  // [rows, k]
  int32_t* count;  // [rows]
};

// The k-th largest key by digits, then the row once more in order.
template <class T>
__global__ void __launch_bounds__(kSelectThreads) topk_rows(const TopkArguments<T> a) {
  FLASHU_SHARED(int, histogram, kDigits);
  FLASHU_SHARED(int, scratch, kSelectWarps + 1);
  FLASHU_SHARED(uint32_t, chosen, 2);  // the digit, and config many keys of larger digits there are
  const T* const scores = a.scores + static_cast<int64_t>(blockIdx.x) * a.stride;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) a.count[blockIdx.x] = a.k;
  if (a.k == 0) return;
  uint32_t prefix = 0;  // of the k-th largest key
  uint32_t known = 0;   // its bits that are in prefix
  int wanted = a.k;     // among the keys that begin with prefix
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kDigits) histogram[thread] = 0;
    __syncthreads();
    for (int t = thread; t < a.tokens; t += kSelectThreads) {
      const uint32_t key = score_key(scores, t);
      if ((key & known) == prefix) atomicAdd(&histogram[key >> shift & 0xff], 1);
    }
    __syncthreads();
    if (thread < kWarp) {
      // Lane l has the digits 255 - 8 l and the seven below; sums run from the largest down.
      constexpr int kOfLane = kDigits / kWarp;
      int own = 0;
      for (int d = 0; d < kOfLane; ++d) own += histogram[kDigits - 1 - thread * kOfLane - d];
      int larger = own;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, larger, static_cast<unsigned>(step));
        if (thread >= step) larger += before;
      }
      larger -= own;
      if (larger < wanted && larger + own >= wanted) {
        int digit = kDigits - 1 - thread * kOfLane;
        while (larger + histogram[digit] < wanted) larger += histogram[digit--];
        chosen[0] = static_cast<uint32_t>(digit);
        chosen[1] = static_cast<uint32_t>(larger);
      }
    }
    __syncthreads();
    prefix |= chosen[0] << shift;
    known |= 0xffu << shift;
    wanted -= static_cast<int>(chosen[1]);
  }
  // Keys above the k-th are in; of those equal to it the first `wanted`.
  int64_t* const index = a.index + static_cast<int64_t>(blockIdx.x) * a.k;
  int ties_before = 0;
  int taken = 0;
  for (int first = 0; first < a.tokens; first += kSelectThreads) {
    const int t = first + thread;
    const uint32_t key = t < a.tokens ? score_key(scores, t) : 0;
    const bool tie = t < a.tokens && key == prefix;
    int ties = 0;
    const int tie_rank = rank_in_block(tie, scratch, ties);
    const bool in = t < a.tokens && (key > prefix || (tie && ties_before + tie_rank < wanted));
    int passed = 0;
    const int rank = rank_in_block(in, scratch, passed);
    if (in) index[taken + rank] = t;
    ties_before += ties;
    taken += passed;
  }
}

template <class T>
struct ThresholdArguments {
  const T* scores;
  int64_t stride;
  int32_t tokens;
  float threshold;
  int64_t capacity;
  int64_t* index;  // [rows, capacity]
  int32_t* count;  // [rows]
};

template <class T>
__global__ void __launch_bounds__(kSelectThreads) threshold_rows(const ThresholdArguments<T> a) {
  FLASHU_SHARED(int, scratch, kSelectWarps + 1);
  const T* const scores = a.scores + static_cast<int64_t>(blockIdx.x) * a.stride;
  int64_t* const index = a.index + static_cast<int64_t>(blockIdx.x) * a.capacity;
  int64_t taken = 0;
  for (int first = 0; first < a.tokens; first += kSelectThreads) {
    const int t = first + static_cast<int>(threadIdx.x);
    const bool in = t < a.tokens && to_float(scores[t]) >= a.threshold;
    int passed = 0;
    const int rank = rank_in_block(in, scratch, passed);
    if (in && taken + rank < a.capacity) index[taken + rank] = t;
    taken += passed;
  }
  for (int64_t i = taken + threadIdx.x; i < a.capacity; i += kSelectThreads) index[i] = -1;
  if (threadIdx.x == 0) a.count[blockIdx.x] = static_cast<int32_t>(taken);
}

// ---- row moves: a warp to a row

template <class T, class I>
struct MoveArguments {
  T* rows;
  const I* index;
  T* moved;
  int64_t rows_batch, rows_stride, index_batch, index_stride, moved_batch, moved_stride;
  int64_t batches, tokens, count;
  int32_t width;
};

enum class Move { kGather, kScatter, kScatterAdd };

// The row an entry names, -1 for padding.
template <class T, class I>
FLASHU_DEVICE int64_t named_row(const MoveArguments<T, I>& a, int64_t batch, int64_t entry) {
  const int64_t row = a.index[batch * a.index_batch + entry * a.index_stride];
  return row < 0 || row >= a.tokens ? -1 : row;
}

// The next entry after `entry` that names `row`, or `count`. All lanes of the warp call it and get the same.
template <class T, class I>
FLASHU_DEVICE int64_t next_entry(const MoveArguments<T, I>& a, int64_t batch, int64_t entry, int64_t row) {
  for (int64_t first = entry + 1; first < a.count; first += kWarp) {
    const int64_t e = first + threadIdx.x % kWarp;
    const uint32_t votes = __ballot_sync(kAllLanes, e < a.count && named_row(a, batch, e) == row);
    if (votes != 0) return first + __ffs(votes) - 1;
  }
  return a.count;
}

// Whether an entry before `entry` names `row`.
template <class T, class I>
FLASHU_DEVICE bool named_before(const MoveArguments<T, I>& a, int64_t batch, int64_t entry, int64_t row) {
  for (int64_t first = 0; first < entry; first += kWarp) {
    const int64_t e = first + threadIdx.x % kWarp;
    if (__ballot_sync(kAllLanes, e < entry && named_row(a, batch, e) == row) != 0) return true;
  }
  return false;
}

template <class T, class I, Move kMove, int kValues>
__global__ void __launch_bounds__(kThreads, 6) move_rows(const MoveArguments<T, I> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= a.batches * a.count) return;
  const int64_t batch = i / a.count;
  const int64_t entry = i % a.count;
  const int64_t row = named_row(a, batch, entry);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  T* const far = row < 0 ? nullptr : a.rows + batch * a.rows_batch + row * a.rows_stride;
  T* const near = a.moved + batch * a.moved_batch + entry * a.moved_stride;
  if constexpr (kMove == Move::kGather) {
    for (int at = lane * kValues; at < a.width; at += kWarp * kValues) {
      if constexpr (kValues == 1) {
        near[at] = row < 0 ? T{} : far[at];
      } else {
        store16(near + at, row < 0 ? uint4{0, 0, 0, 0} : load16(far + at));
      }
    }
    return;
  }
  if (row < 0) return;
  // Rows that are named more than once have one writer, so that the order of the entries holds.
  if constexpr (kMove == Move::kScatter) {
    if (next_entry(a, batch, entry, row) < a.count) return;
  } else {
    if (named_before(a, batch, entry, row)) return;
  }
  for (int first = 0; first < a.width; first += kWarp * kValues) {
    const int at = first + lane * kValues;
    const bool inside = at < a.width;
    if constexpr (kMove == Move::kScatter) {
      if (!inside) continue;
      if constexpr (kValues == 1) {
        far[at] = near[at];
      } else {
        store16(far + at, load16(near + at));
      }
    } else {
      // As many roundings as additions, as the CPU has them.
      for (int64_t e = entry; e < a.count; e = next_entry(a, batch, e, row)) {
        if (!inside) continue;
        const T* const more = a.moved + batch * a.moved_batch + e * a.moved_stride + at;
        if constexpr (kValues == 1) {
          far[at] = from_float<T>(to_float(far[at]) + to_float(*more));
        } else {
          Vector<T> sum = load_vector(far + at);
          const Vector<T> chunk = load_vector(more);
#pragma unroll
          for (int j = 0; j < kValues; ++j) sum.value[j] += chunk.value[j];
          store_vector(far + at, sum);
        }
      }
    }
  }
}

template <class T, class I, Move kMove>
void launch_move(const flashu_move_rows_args& args) {
  const int lead = args.rows.ndim - 2;
  const auto batch_stride = [lead](const flashu_tensor& tensor) { return lead == 1 ? tensor.strides[0] : 0; };
  const MoveArguments<T, I> a{pointer<T>(args.rows),
                              pointer<I>(args.index),
                              pointer<T>(args.moved),
                              batch_stride(args.rows),
                              args.rows.strides[lead],
                              batch_stride(args.index),
                              args.index.strides[lead],
                              batch_stride(args.moved),
                              args.moved.strides[lead],
                              lead == 1 ? args.rows.sizes[0] : 1,
                              args.rows.sizes[lead],
                              args.index.sizes[lead],
                              static_cast<int32_t>(args.rows.sizes[lead + 1])};
  const bool vectors = takes_vectors<T>(a.rows, {a.rows_batch, a.rows_stride, a.width}) &&
                       takes_vectors<T>(a.moved, {a.moved_batch, a.moved_stride});
  const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(a.batches * a.count, kWarps))),
                            dim3(kThreads), 0, static_cast<Stream>(args.stream)};
  if (vectors) return launch<move_rows<T, I, kMove, kPerVector<T>>>("move_rows", config, a);
  launch<move_rows<T, I, kMove, 1>>("move_rows", config, a);
}

template <Move kMove>
void move(const flashu_move_rows_args& args) {
  const DeviceGuard guard(args.rows.device);
  with_type(args.rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (args.index.dtype == FLASHU_I32) return launch_move<T, int32_t, kMove>(args);
    launch_move<T, int64_t, kMove>(args);
  });
}

bool is_mean(const flashu_cosine_importance_args& args) { return args.reduce == FLASHU_REDUCE_MEAN; }

}  // namespace

uint64_t cosine_importance_workspace(const flashu_cosine_importance_args& args) {
  return is_mean(args) ? static_cast<uint64_t>(core::as_rows("x_in", args.x_in).count) * sizeof(float) : 0;
}

void cosine_importance(const flashu_cosine_importance_args& args) {
  const DeviceGuard guard(args.x_in.device);
  core::check_workspace(args.workspace, args.workspace_bytes, cosine_importance_workspace(args));
  const auto stream = static_cast<Stream>(args.stream);
  const core::Rows in = core::as_rows("x_in", args.x_in);
  const core::Rows other = core::as_rows("x_out", args.x_out);
  const int64_t step = args.reduce == FLASHU_REDUCE_LAST ? args.x_in.sizes[args.x_in.ndim - 2] : 1;
  float* const importance = is_mean(args) ? static_cast<float*>(args.workspace) : pointer<float>(args.out);
  const int64_t scored = in.count / step;
  if (scored > 0) {
    with_type(args.x_in.dtype, [&](auto tag) {
      using T = decltype(tag);
      const CosineArguments<T> a{pointer<T>(args.x_in),
                                 pointer<T>(args.x_out),
                                 in.stride,
                                 other.stride,
                                 scored,
                                 step,
                                 static_cast<int32_t>(in.width),
                                 importance};
      const bool vectors =
          takes_vectors(a.x_in, {a.in_stride, a.width}) && takes_vectors(a.x_out, {a.out_stride});
      const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(scored, kWarps))), dim3(kThreads), 0,
                                stream};
      if (vectors) return launch<cosine_rows<T, kPerVector<T>>>("cosine_rows", config, a);
      launch<cosine_rows<T, 1>>("cosine_rows", config, a);
    });
  }
  if (!is_mean(args)) return;
  const LaunchConfig config{dim3(1), dim3(kThreads), 0, stream, true};
  launch<mean_of>("mean_of", config, static_cast<const float*>(importance), scored, pointer<float>(args.out));
}

void value_norms(const flashu_value_norms_args& args) {
  const DeviceGuard guard(args.v.device);
  with_type(args.v.dtype, [&](auto tag) {
    using T = decltype(tag);
    const ValueArguments<T> a{
        pointer<T>(args.v),      args.v.strides[0], args.v.strides[1], args.v.strides[2],
        args.v.sizes[0],         args.v.sizes[1],   args.v.sizes[2],   static_cast<int32_t>(args.v.sizes[3]),
        pointer<float>(args.out)};
    const bool vectors = takes_vectors(a.v, {a.batch_stride, a.head_stride, a.token_stride, a.width});
    const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(a.batches * a.tokens, kWarps))),
                              dim3(kThreads), 0, static_cast<Stream>(args.stream)};
    if (vectors) return launch<value_norm_rows<T, kPerVector<T>>>("value_norm_rows", config, a);
    launch<value_norm_rows<T, 1>>("value_norm_rows", config, a);
  });
}

void select_topk(const flashu_select_topk_args& args) {
  const DeviceGuard guard(args.scores.device);
  const core::Rows rows = core::as_rows("scores", args.scores);
  with_type(args.scores.dtype, [&](auto tag) {
    using T = decltype(tag);
    const TopkArguments<T> a{pointer<T>(args.scores),          rows.stride,
                             static_cast<int32_t>(rows.width), static_cast<int32_t>(args.k),
                             pointer<int64_t>(args.index),     pointer<int32_t>(args.count)};
    const LaunchConfig config{dim3(static_cast<unsigned>(rows.count)), dim3(kSelectThreads), 0,
                              static_cast<Stream>(args.stream)};
    launch<topk_rows<T>>("topk_rows", config, a);
  });
}

void select_threshold(const flashu_select_threshold_args& args) {
  const DeviceGuard guard(args.scores.device);
  const core::Rows rows = core::as_rows("scores", args.scores);
  with_type(args.scores.dtype, [&](auto tag) {
    using T = decltype(tag);
    const ThresholdArguments<T> a{pointer<T>(args.scores),
                                  rows.stride,
                                  static_cast<int32_t>(rows.width),
                                  static_cast<float>(args.threshold),
                                  args.index.sizes[args.index.ndim - 1],
                                  pointer<int64_t>(args.index),
                                  pointer<int32_t>(args.count)};
    const LaunchConfig config{dim3(static_cast<unsigned>(rows.count)), dim3(kSelectThreads), 0,
                              static_cast<Stream>(args.stream)};
    launch<threshold_rows<T>>("threshold_rows", config, a);
  });
}

void gather_rows(const flashu_move_rows_args& args) { move<Move::kGather>(args); }
void scatter_rows(const flashu_move_rows_args& args) { move<Move::kScatter>(args); }
void scatter_add_rows(const flashu_move_rows_args& args) { move<Move::kScatterAdd>(args); }

}  // namespace flashu::cuda
