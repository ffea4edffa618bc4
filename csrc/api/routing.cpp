// C API of the routing family: every check but those that read the data, then the kernels of the device.
#include "flashu/routing.h"

#include <cmath>
#include <limits>

#include "api/dispatch.hpp"
#include "core/rows.hpp"
#include "cpu/routing.hpp"
#include "cuda/routing.hpp"

namespace flashu::api {
namespace {

// `out` has the first `dims` sizes of `like`, then `extra` if it is >= 0, and is contiguous.
void check_leading(const char* name, const flashu_tensor& out, const flashu_tensor& like, int dims,
                   int64_t extra = -1) {
  core::check_rank(name, out, dims + (extra >= 0 ? 1 : 0));
  for (int d = 0; d < dims; ++d) core::check_size(name, out, d, like.sizes[d]);
  if (extra >= 0) core::check_size(name, out, dims, extra);
  core::check_contiguous(name, out);
}

void check_cosine_importance(const flashu_cosine_importance_args& args) {
  core::check_tensor("x_in", args.x_in);
  core::check_tensor("x_out", args.x_out);
  core::check_tensor("out", args.out);
  core::check_device({{"x_in", &args.x_in}, {"x_out", &args.x_out}, {"out", &args.out}});
  core::check_floating("x_in", args.x_in);
  core::check_like("x_out", args.x_out, "x_in", args.x_in);
  core::as_rows("x_in", args.x_in);
  core::as_rows("x_out", args.x_out);
  core::check_dtype("out", args.out, {FLASHU_F32});
  const int leading = args.x_in.ndim - 1;
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
      FLASHU_CHECK(args.x_in.sizes[leading - 1] > 0 || core::numel(args.out) == 0, FLASHU_INVALID_VALUE,
                   "x_in: expected at least one token to take the last of, got shape ",
                   core::shape_text(args.x_in));
      break;
    default:
      core::fail(FLASHU_INVALID_VALUE, "reduce: expected none, mean or last (0 to 2), got ", args.reduce);
  }
  core::check_output("out", args.out, {{"x_in", &args.x_in}, {"x_out", &args.x_out}});
}

void cosine_importance(const flashu_cosine_importance_args& args) {
  check_cosine_importance(args);
  if (core::numel(args.out) == 0) return;
  run_on(args.x_in.device, [&] { cpu::cosine_importance(args); }, [&] { cuda::cosine_importance(args); });
}

void cosine_importance_workspace(const flashu_cosine_importance_args& args, uint64_t* bytes) {
  FLASHU_CHECK(bytes != nullptr, FLASHU_INVALID_VALUE, "bytes: expected a pointer, got NULL");
  check_cosine_importance(args);
  run_on(args.x_in.device, [&] { *bytes = 0; }, [&] { *bytes = cuda::cosine_importance_workspace(args); });
}

void value_norms(const flashu_value_norms_args& args) {
  core::check_tensor("v", args.v);
  core::check_tensor("out", args.out);
  core::check_device({{"v", &args.v}, {"out", &args.out}});
  core::check_floating("v", args.v);
  core::check_rank("v", args.v, 4);
  core::check_inner_contiguous("v", args.v);
  core::check_dtype("out", args.out, {FLASHU_F32});
  core::check_rank("out", args.out, 2);
  core::check_size("out", args.out, 0, args.v.sizes[0]);
  core::check_size("out", args.out, 1, args.v.sizes[2]);
  core::check_contiguous("out", args.out);
  core::check_output("out", args.out, {{"v", &args.v}});
  if (core::numel(args.out) == 0) return;
  run_on(args.v.device, [&] { cpu::value_norms(args); }, [&] { cuda::value_norms(args); });
}

void check_selection(const flashu_tensor& scores, const flashu_tensor& index, const flashu_tensor& count) {
  core::check_tensor("scores", scores);
  core::check_tensor("index", index);
  core::check_tensor("count", count);
  core::check_device({{"scores", &scores}, {"index", &index}, {"count", &count}});
  core::check_floating("scores", scores);
  core::check_rank_at_least("scores", scores, 1);
  core::check_dtype("index", index, {FLASHU_I64});
  core::check_dtype("count", count, {FLASHU_I32});
  core::check_output("index", index, {{"scores", &scores}, {"count", &count}});
  core::check_output("count", count, {{"scores", &scores}});
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
  if (core::numel(args.count) == 0) return;
  run_on(args.scores.device, [&] { cpu::select_topk(args); }, [&] { cuda::select_topk(args); });
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
  if (core::numel(args.count) == 0) return;
  run_on(args.scores.device, [&] { cpu::select_threshold(args); }, [&] { cuda::select_threshold(args); });
}

void check_move(const flashu_move_rows_args& args, bool writes_rows) {
  core::check_tensor("rows", args.rows);
  core::check_tensor("index", args.index);
  core::check_tensor("moved", args.moved);
  core::check_device({{"rows", &args.rows}, {"index", &args.index}, {"moved", &args.moved}});
  core::check_floating("rows", args.rows);
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
    core::check_output("rows", args.rows, {{"moved", &args.moved}, {"index", &args.index}});
  } else {
    core::check_output("moved", args.moved, {{"rows", &args.rows}, {"index", &args.index}});
  }
}

template <class Cpu, class Cuda>
void move_rows(const flashu_move_rows_args& args, bool writes_rows, const Cpu& cpu, const Cuda& cuda) {
  check_move(args, writes_rows);
  if (core::numel(args.index) == 0) return;
  run_on(args.rows.device, [&] { cpu(args); }, [&] { cuda(args); });
}

}  // namespace
}  // namespace flashu::api

extern "C" {

int32_t flashu_cosine_importance(const flashu_cosine_importance_args* args) {
  using namespace flashu;
  return core::guarded("cosine_importance", [&] { api::cosine_importance(core::read_args(args)); });
}

int32_t flashu_cosine_importance_workspace(const flashu_cosine_importance_args* args, uint64_t* bytes) {
  using namespace flashu;
  return core::guarded("cosine_importance",
                       [&] { api::cosine_importance_workspace(core::read_args(args), bytes); });
}

int32_t flashu_value_norms(const flashu_value_norms_args* args) {
  using namespace flashu;
  return core::guarded("value_norms", [&] { api::value_norms(core::read_args(args)); });
}

int32_t flashu_select_topk(const flashu_select_topk_args* args) {
  using namespace flashu;
  return core::guarded("select_topk", [&] { api::select_topk(core::read_args(args)); });
}

int32_t flashu_select_threshold(const flashu_select_threshold_args* args) {
  using namespace flashu;
  return core::guarded("select_threshold", [&] { api::select_threshold(core::read_args(args)); });
}

int32_t flashu_gather_rows(const flashu_move_rows_args* args) {
  using namespace flashu;
  return core::guarded("gather_rows", [&] {
    api::move_rows(core::read_args(args), false, cpu::gather_rows,
                   [](const auto& checked) { cuda::gather_rows(checked); });
  });
}

int32_t flashu_scatter_rows(const flashu_move_rows_args* args) {
  using namespace flashu;
  return core::guarded("scatter_rows_", [&] {
    api::move_rows(core::read_args(args), true, cpu::scatter_rows,
                   [](const auto& checked) { cuda::scatter_rows(checked); });
  });
}

int32_t flashu_scatter_add_rows(const flashu_move_rows_args* args) {
  using namespace flashu;
  return core::guarded("scatter_add_rows_", [&] {
    api::move_rows(core::read_args(args), true, cpu::scatter_add_rows,
                   [](const auto& checked) { cuda::scatter_add_rows(checked); });
  });
}

}  // extern "C"
