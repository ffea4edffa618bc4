// C API of the routing family: checks, then scores by row, selection by row, and row moves.
#include "flashu/routing.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "cpu/op_support.hpp"
#include "cpu/routing_kernels.hpp"

namespace flashu::cpu {
namespace {

constexpr double kSmallestNorm = 1e-8;

template <class T>
const RoutingKernels<T>& kernels();
template <>
const RoutingKernels<float>& kernels<float>() {
  return FLASHU_PICK_ISA(routing_f32);
}
template <>
const RoutingKernels<bfloat16>& kernels<bfloat16>() {
  return FLASHU_PICK_ISA(routing_bf16);
}
template <>
const RoutingKernels<float16>& kernels<float16>() {
  return FLASHU_PICK_ISA(routing_f16);
}

// `out` has the first `dims` sizes of `like`, then `extra` if it is >= 0, and is contiguous.
void check_leading(const char* name, const flashu_tensor& out, const flashu_tensor& like, int dims,
                   int64_t extra = -1) {
  core::check_rank(name, out, dims + (extra >= 0 ? 1 : 0));
  for (int d = 0; d < dims; ++d) core::check_size(name, out, d, like.sizes[d]);
  if (extra >= 0) core::check_size(name, out, dims, extra);
  check_contiguous(name, out);
}

// ---- scores

double importance(const DotAndSquares& sums) {
  const double a = std::max(std::sqrt(sums.a_squares), kSmallestNorm);
  const double b = std::max(std::sqrt(sums.b_squares), kSmallestNorm);
  return 1.0 - sums.dot / (a * b);
}

void cosine_importance(const flashu_cosine_importance_args& args) {
  core::check_tensor("x_in", args.x_in);
  core::check_tensor("x_out", args.x_out);
  core::check_tensor("out", args.out);
  core::check_device({{"x_in", &args.x_in}, {"x_out", &args.x_out}, {"out", &args.out}});
  check_floating("x_in", args.x_in);
  check_like("x_out", args.x_out, "x_in", args.x_in);
  const core::Rows in = core::as_rows("x_in", args.x_in);
  const core::Rows other = core::as_rows("x_out", args.x_out);
  core::check_dtype("out", args.out, {FLASHU_F32});
  const int leading = args.x_in.ndim - 1;
  int64_t step = 1;  // every how many rows one is scored
  switch (args.reduce) {
    case FLASHU_REDUCE_NONE:
      check_leading("out", args.out, args.x_in, leading);
      break;
    case FLASHU_REDUCE_MEAN:
      check_leading("out", args.out, args.x_in, 0);
      break;
    case FLASHU_REDUCE_LAST:
      core::check_rank_at_least("x_in", args.x_in, 2);
      check_leading("out", args.out, args.x_in, leading - 1);
      step = args.x_in.sizes[leading - 1];
      FLASHU_CHECK(step > 0 || core::numel(args.out) == 0, FLASHU_INVALID_VALUE,
                   "x_in: expected at least one token to take the last of, got shape ",
                   core::shape_text(args.x_in));
      break;
    default:
      core::fail(FLASHU_INVALID_VALUE, "reduce: expected none, mean or last (0 to 2), got ", args.reduce);
  }
  check_output("out", args.out, {{"x_in", &args.x_in}, {"x_out", &args.x_out}});
  const int64_t scored = step > 0 ? in.count / step : 0;
  const bool mean = args.reduce == FLASHU_REDUCE_MEAN;
  std::vector<double> terms(mean ? static_cast<size_t>(scored) : 0);
  float* out = pointer<float>(args.out);
  with_type(args.x_in.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = kernels<T>().dot_and_squares;
    core::parallel_for(0, scored, row_grain(in.width), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i * step + step - 1;
        const double value = importance(kernel(pointer<T>(args.x_in) + r * in.stride,
                                               pointer<T>(args.x_out) + r * other.stride, in.width));
        if (mean) {
          terms[static_cast<size_t>(i)] = value;
        } else {
          out[i] = static_cast<float>(value);
        }
      }
    });
  });
  if (!mean) return;
  double sum = 0;
  for (const double term : terms) sum += term;
  *out = static_cast<float>(sum / static_cast<double>(scored));  // 0 / 0 is NaN, as torch's mean
}

void value_norms(const flashu_value_norms_args& args) {
  core::check_tensor("v", args.v);
  core::check_tensor("out", args.out);
  core::check_device({{"v", &args.v}, {"out", &args.out}});
  check_floating("v", args.v);
  core::check_rank("v", args.v, 4);
  core::check_inner_contiguous("v", args.v);
  core::check_dtype("out", args.out, {FLASHU_F32});
  core::check_rank("out", args.out, 2);
  core::check_size("out", args.out, 0, args.v.sizes[0]);
  core::check_size("out", args.out, 1, args.v.sizes[2]);
  check_contiguous("out", args.out);
  check_output("out", args.out, {{"v", &args.v}});
  const int64_t heads = args.v.sizes[1];
  const int64_t tokens = args.v.sizes[2];
  const int64_t width = args.v.sizes[3];
  float* out = pointer<float>(args.out);
  with_type(args.v.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = kernels<T>().sum_squares;
    core::parallel_for(
        0, args.v.sizes[0] * tokens, row_grain(heads * width), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const T* token =
                pointer<T>(args.v) + (i / tokens) * args.v.strides[0] + (i % tokens) * args.v.strides[2];
            double squares = 0;
            for (int64_t h = 0; h < heads; ++h) squares += kernel(token + h * args.v.strides[1], width);
            out[i] = static_cast<float>(std::sqrt(squares));
          }
        });
  });
}

// ---- selection

// All scores as float, [rows, tokens]; fails at the first NaN, before anything is written.
std::vector<float> read_scores(const flashu_tensor& scores, const core::Rows& rows) {
  std::vector<float> values(static_cast<size_t>(rows.count * rows.width));
  with_type(scores.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t r = 0; r < rows.count; ++r) {
      const T* row = pointer<T>(scores) + r * rows.stride;
      for (int64_t t = 0; t < rows.width; ++t) {
        const float value = to_float(row[t]);
        FLASHU_CHECK(!std::isnan(value), FLASHU_INVALID_VALUE, "scores: expected numbers, got NaN at row ", r,
                     ", token ", t);
        values[static_cast<size_t>(r * rows.width + t)] = value;
      }
    }
  });
  return values;
}

void check_selection(const flashu_tensor& scores, const flashu_tensor& index, const flashu_tensor& count) {
  core::check_tensor("scores", scores);
  core::check_tensor("index", index);
  core::check_tensor("count", count);
  core::check_device({{"scores", &scores}, {"index", &index}, {"count", &count}});
  check_floating("scores", scores);
  core::check_rank_at_least("scores", scores, 1);
  core::check_dtype("index", index, {FLASHU_I64});
  core::check_dtype("count", count, {FLASHU_I32});
  check_output("index", index, {{"scores", &scores}, {"count", &count}});
  check_output("count", count, {{"scores", &scores}});
}

void select_topk(const flashu_select_topk_args& args) {
  check_selection(args.scores, args.index, args.count);
  const core::Rows rows = core::as_rows("scores", args.scores);
  FLASHU_CHECK(args.k >= 0 && args.k <= rows.width, FLASHU_INVALID_VALUE, "k: expected a number in [0, ",
               rows.width, "], got ", args.k);
  FLASHU_CHECK(rows.width <= std::numeric_limits<int32_t>::max(), FLASHU_INVALID_VALUE,
               "scores: expected fewer than 2^31 tokens, got ", rows.width);
  check_leading("index", args.index, args.scores, args.scores.ndim - 1, args.k);
  check_leading("count", args.count, args.scores, args.scores.ndim - 1);
  const std::vector<float> values = read_scores(args.scores, rows);
  std::vector<float> sorted = values;
  core::parallel_for(0, rows.count, row_grain(4 * rows.width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      pointer<int32_t>(args.count)[r] = static_cast<int32_t>(args.k);
      if (args.k == 0) continue;
      const float* row = values.data() + r * rows.width;
      float* scratch = sorted.data() + r * rows.width;
      std::nth_element(scratch, scratch + args.k - 1, scratch + rows.width, std::greater<float>());
      const float least = scratch[args.k - 1];
      int64_t ties = args.k;  // how many equal to the least are taken: what the greater ones leave
      for (int64_t t = 0; t < rows.width; ++t) ties -= row[t] > least;
      int64_t* out = pointer<int64_t>(args.index) + r * args.k;
      for (int64_t t = 0; t < rows.width; ++t) {
        if (row[t] > least || (row[t] == least && ties-- > 0)) *out++ = t;
      }
    }
  });
}

void select_threshold(const flashu_select_threshold_args& args) {
  check_selection(args.scores, args.index, args.count);
  const core::Rows rows = core::as_rows("scores", args.scores);
  FLASHU_CHECK(!std::isnan(args.threshold), FLASHU_INVALID_VALUE, "threshold: expected a number, got NaN");
  FLASHU_CHECK(rows.width <= std::numeric_limits<int32_t>::max(), FLASHU_INVALID_VALUE,
               "scores: expected fewer than 2^31 tokens, got ", rows.width);
  core::check_rank("index", args.index, args.scores.ndim);
  const int64_t capacity = args.index.sizes[args.index.ndim - 1];
  check_leading("index", args.index, args.scores, args.scores.ndim - 1, capacity);
  check_leading("count", args.count, args.scores, args.scores.ndim - 1);
  const std::vector<float> values = read_scores(args.scores, rows);
  const float threshold = static_cast<float>(args.threshold);
  core::parallel_for(0, rows.count, row_grain(rows.width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      int64_t* out = pointer<int64_t>(args.index) + r * capacity;
      int32_t passed = 0;
      for (int64_t t = 0; t < rows.width; ++t) {
        if (values[static_cast<size_t>(r * rows.width + t)] < threshold) continue;
        if (passed < capacity) out[passed] = t;
        ++passed;
      }
      for (int64_t i = passed; i < capacity; ++i) out[i] = -1;
      pointer<int32_t>(args.count)[r] = passed;
    }
  });
}

// ---- row moves

// One sequence or a batch of them, as a batch.
struct Move {
  int64_t batch, tokens, width, count;  // count: rows of the short side
  int64_t rows_batch, rows_stride, moved_batch, moved_stride;
  std::vector<int64_t> index;  // [batch, count], each in [-1, tokens)
};

Move check_move(const flashu_move_rows_args& args, bool writes_rows) {
  core::check_tensor("rows", args.rows);
  core::check_tensor("index", args.index);
  core::check_tensor("moved", args.moved);
  core::check_device({{"rows", &args.rows}, {"index", &args.index}, {"moved", &args.moved}});
  check_floating("rows", args.rows);
  FLASHU_CHECK(args.rows.ndim == 2 || args.rows.ndim == 3, FLASHU_INVALID_VALUE,
               "rows: expected 2 or 3 dimensions, got ", args.rows.ndim, " (shape ",
               core::shape_text(args.rows), ")");
  const int lead = args.rows.ndim - 2;
  core::check_rank("moved", args.moved, args.rows.ndim);
  core::check_same_dtype("moved", args.moved, "rows", args.rows);
  core::check_rank("index", args.index, args.rows.ndim - 1);
  core::check_dtype("index", args.index, {FLASHU_I32, FLASHU_I64});
  if (lead == 1) {
    core::check_size("index", args.index, 0, args.rows.sizes[0]);
    core::check_size("moved", args.moved, 0, args.rows.sizes[0]);
  }
  core::check_size("moved", args.moved, lead, args.index.sizes[lead]);
  core::check_size("moved", args.moved, lead + 1, args.rows.sizes[lead + 1]);
  core::check_inner_contiguous("rows", args.rows);
  core::check_inner_contiguous("moved", args.moved);
  if (writes_rows) {
    check_output("rows", args.rows, {{"moved", &args.moved}, {"index", &args.index}});
  } else {
    check_output("moved", args.moved, {{"rows", &args.rows}, {"index", &args.index}});
  }
  Move m{lead == 1 ? args.rows.sizes[0] : 1,
         args.rows.sizes[lead],
         args.rows.sizes[lead + 1],
         args.index.sizes[lead],
         lead == 1 ? args.rows.strides[0] : 0,
         args.rows.strides[lead],
         lead == 1 ? args.moved.strides[0] : 0,
         args.moved.strides[lead],
         {}};
  m.index.reserve(static_cast<size_t>(m.batch * m.count));
  for (int64_t b = 0; b < m.batch; ++b) {
    for (int64_t i = 0; i < m.count; ++i) {
      const int64_t at = (lead == 1 ? b * args.index.strides[0] : 0) + i * args.index.strides[lead];
      const int64_t row = args.index.dtype == FLASHU_I32 ? pointer<int32_t>(args.index)[at]
                                                         : pointer<int64_t>(args.index)[at];
      FLASHU_CHECK(row >= -1 && row < m.tokens, FLASHU_INVALID_INDEX, "index: expected rows in [0, ",
                   m.tokens, ") or -1 for padding, got ", row, " at position ", i, " of sequence ", b);
      m.index.push_back(row);
    }
  }
  return m;
}

void gather_rows(const flashu_move_rows_args& args) {
  const Move m = check_move(args, false);
  const int64_t element = core::dtype_size(args.rows.dtype);
  const size_t bytes = static_cast<size_t>(m.width * element);
  if (bytes == 0) return;
  core::parallel_for(0, m.batch * m.count, row_grain(m.width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / m.count;
      char* to = pointer<char>(args.moved) + (b * m.moved_batch + (i % m.count) * m.moved_stride) * element;
      const int64_t row = m.index[static_cast<size_t>(i)];
      if (row < 0) {
        std::memset(to, 0, bytes);
      } else {
        std::memcpy(to, pointer<char>(args.rows) + (b * m.rows_batch + row * m.rows_stride) * element, bytes);
      }
    }
  });
}

// Calls write(row of `rows`, row of `moved`, first column, columns) in the order of the index. Threads share
// columns, not entries, so that entries which name one row keep their order.
template <class T, class Write>
void scatter(const flashu_move_rows_args& args, const Write& write) {
  const Move m = check_move(args, true);
  const int64_t grain = std::max<int64_t>(64, kGrainElements / std::max<int64_t>(1, m.batch * m.count));
  core::parallel_for(0, m.width, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < m.batch * m.count; ++i) {
      const int64_t row = m.index[static_cast<size_t>(i)];
      if (row < 0) continue;
      const int64_t b = i / m.count;
      write(pointer<T>(args.rows) + b * m.rows_batch + row * m.rows_stride + first,
            pointer<const T>(args.moved) + b * m.moved_batch + (i % m.count) * m.moved_stride + first,
            last - first);
    }
  });
}

void scatter_rows(const flashu_move_rows_args& args) {
  with_type(args.rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    scatter<T>(args, [](T* to, const T* from, int64_t n) {
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    });
  });
}

void scatter_add_rows(const flashu_move_rows_args& args) {
  with_type(args.rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    scatter<T>(args, [](T* to, const T* from, int64_t n) {
      for (int64_t j = 0; j < n; ++j) to[j] = from_float<T>(to_float(to[j]) + to_float(from[j]));
    });
  });
}

}  // namespace
}  // namespace flashu::cpu

extern "C" {

int32_t flashu_cosine_importance(const flashu_cosine_importance_args* args) {
  using namespace flashu;
  return core::guarded("cosine_importance", [&] { cpu::cosine_importance(core::read_args(args)); });
}

int32_t flashu_value_norms(const flashu_value_norms_args* args) {
  using namespace flashu;
  return core::guarded("value_norms", [&] { cpu::value_norms(core::read_args(args)); });
}

int32_t flashu_select_topk(const flashu_select_topk_args* args) {
  using namespace flashu;
  return core::guarded("select_topk", [&] { cpu::select_topk(core::read_args(args)); });
}

int32_t flashu_select_threshold(const flashu_select_threshold_args* args) {
  using namespace flashu;
  return core::guarded("select_threshold", [&] { cpu::select_threshold(core::read_args(args)); });
}

int32_t flashu_gather_rows(const flashu_move_rows_args* args) {
  using namespace flashu;
  return core::guarded("gather_rows", [&] { cpu::gather_rows(core::read_args(args)); });
}

int32_t flashu_scatter_rows(const flashu_move_rows_args* args) {
  using namespace flashu;
  return core::guarded("scatter_rows_", [&] { cpu::scatter_rows(core::read_args(args)); });
}

int32_t flashu_scatter_add_rows(const flashu_move_rows_args* args) {
  using namespace flashu;
  return core::guarded("scatter_add_rows_", [&] { cpu::scatter_add_rows(core::read_args(args)); });
}

}  // extern "C"
