// The routing family on the CPU: scores by row, selection by row, and row moves. What depends on the data
// (NaN, indices out of range) is checked here, before anything is written.
#include "cpu/routing.hpp"

#include <cmath>
#include <cstring>
#include <functional>
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

double importance(const DotAndSquares& sums) {
  const double a = std::max(std::sqrt(sums.a_squares), kSmallestNorm);
  const double b = std::max(std::sqrt(sums.b_squares), kSmallestNorm);
  return 1.0 - sums.dot / (a * b);
}

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

// One sequence or a batch of them, as a batch.
struct Move {
  int64_t batch, tokens, width, count;  // count: rows of the short side
  int64_t rows_batch, rows_stride, moved_batch, moved_stride;
  std::vector<int64_t> index;  // [batch, count], each in [-1, tokens)
};

Move read_move(const flashu_move_rows_args& args) {
  const int lead = args.rows.ndim - 2;
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

// Calls write(row of `rows`, row of `moved`, first column, columns) in the order of the index. Threads share
// columns, not entries, so that entries which name one row keep their order.
template <class T, class Write>
void scatter(const flashu_move_rows_args& args, const Write& write) {
  const Move m = read_move(args);
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

}  // namespace

void cosine_importance(const flashu_cosine_importance_args& args) {
  const core::Rows in = core::as_rows("x_in", args.x_in);
  const core::Rows other = core::as_rows("x_out", args.x_out);
  // Every how many rows one is scored.
  const int64_t step = args.reduce == FLASHU_REDUCE_LAST ? args.x_in.sizes[args.x_in.ndim - 2] : 1;
  const int64_t scored = in.count / step;
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

void select_topk(const flashu_select_topk_args& args) {
  const core::Rows rows = core::as_rows("scores", args.scores);
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
  const core::Rows rows = core::as_rows("scores", args.scores);
  const int64_t capacity = args.index.sizes[args.index.ndim - 1];
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

void gather_rows(const flashu_move_rows_args& args) {
  const Move m = read_move(args);
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

}  // namespace flashu::cpu
