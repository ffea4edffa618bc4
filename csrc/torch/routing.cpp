// torch adapters of the routing family: views in, C API, outputs from torch's allocator.
#include "flashu/routing.h"

#include <algorithm>
#include <tuple>

#include "torch/common.hpp"

namespace flashu::torch_ops {
namespace {

// The first sizes of `like`, all but `dropped` of them, then `extra`.
std::vector<int64_t> leading(const Tensor& like, int64_t dropped, std::initializer_list<int64_t> extra = {}) {
  std::vector<int64_t> sizes = sizes_of(like);
  sizes.resize(static_cast<size_t>(std::max<int64_t>(0, static_cast<int64_t>(sizes.size()) - dropped)));
  sizes.insert(sizes.end(), extra);
  return sizes;
}

Tensor cosine_importance_out(const Tensor& x_in, const Tensor& x_out, int64_t reduce, const Tensor& out) {
  const char* op = "cosine_importance";
  const Tensor in = foldable(x_in);
  const Tensor other = foldable(x_out);
  auto args = make_args<flashu_cosine_importance_args>(x_in);
  args.reduce = static_cast<int32_t>(std::clamp<int64_t>(reduce, -1, 3));
  args.x_in = view(op, "x_in", in);
  args.x_out = view(op, "x_out", other);
  args.out = view(op, "out", out);
  run_with_workspace(args, x_in, flashu_cosine_importance_workspace, flashu_cosine_importance);
  return out;
}

Tensor cosine_importance(const Tensor& x_in, const Tensor& x_out, int64_t reduce) {
  const int64_t dropped = reduce == FLASHU_REDUCE_NONE   ? 1
                          : reduce == FLASHU_REDUCE_LAST ? 2
                                                         : FLASHU_MAX_DIMS;
  return cosine_importance_out(x_in, x_out, reduce,
                               new_empty(x_in, leading(x_in, dropped), ScalarType::Float));
}

Tensor value_norms_out(const Tensor& v, const Tensor& out) {
  const char* op = "value_norms";
  auto args = make_args<flashu_value_norms_args>(v);
  args.v = view(op, "v", v);
  args.out = view(op, "out", out);
  check_status(flashu_value_norms(&args));
  return out;
}

Tensor value_norms(const Tensor& v) {
  const std::vector<int64_t> sizes =
      v.dim() == 4 ? std::vector<int64_t>{v.size(0), v.size(2)} : std::vector<int64_t>{0};
  return value_norms_out(v, new_empty(v, sizes, ScalarType::Float));
}

std::tuple<Tensor, Tensor> select_topk_out(const Tensor& scores, int64_t k, const Tensor& index,
                                           const Tensor& count) {
  const char* op = "select_topk";
  const Tensor rows = foldable(scores);
  auto args = make_args<flashu_select_topk_args>(scores);
  args.scores = view(op, "scores", rows);
  args.k = k;
  args.index = view(op, "index", index);
  args.count = view(op, "count", count);
  check_status(flashu_select_topk(&args));
  return {index, count};
}

// Sizes may be wrong where the arguments are: they only have to be allocatable, the C API refuses.
std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, int64_t k) {
  const int64_t tokens = scores.dim() > 0 ? scores.size(scores.dim() - 1) : 0;
  return select_topk_out(
      scores, k, new_empty(scores, leading(scores, 1, {std::clamp<int64_t>(k, 0, tokens)}), ScalarType::Long),
      new_empty(scores, leading(scores, 1), ScalarType::Int));
}

std::tuple<Tensor, Tensor> select_threshold_out(const Tensor& scores, double threshold, int64_t capacity,
                                                const Tensor& index, const Tensor& count) {
  const char* op = "select_threshold";
  STD_TORCH_CHECK(index.dim() > 0 && index.size(index.dim() - 1) == capacity, "flashu value error: ", op,
                  ": index: expected size ", capacity, " in the last dimension, as capacity says, got ",
                  index.dim() > 0 ? index.size(index.dim() - 1) : 0);
  const Tensor rows = foldable(scores);
  auto args = make_args<flashu_select_threshold_args>(scores);
  args.scores = view(op, "scores", rows);
  args.threshold = threshold;
  args.index = view(op, "index", index);
  args.count = view(op, "count", count);
  check_status(flashu_select_threshold(&args));
  return {index, count};
}

std::tuple<Tensor, Tensor> select_threshold(const Tensor& scores, double threshold, int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0,
                  "flashu value error: select_threshold: capacity: expected a number >= 0, got ", capacity);
  return select_threshold_out(scores, threshold, capacity,
                              new_empty(scores, leading(scores, 1, {capacity}), ScalarType::Long),
                              new_empty(scores, leading(scores, 1), ScalarType::Int));
}

template <class Op>
void move_rows(const char* name, Op op, const Tensor& rows, const Tensor& index, const char* moved_name,
               const Tensor& moved) {
  auto args = make_args<flashu_move_rows_args>(rows);
  args.rows = view(name, "rows", rows);
  args.index = view(name, "index", index);
  args.moved = view(name, moved_name, moved);
  check_status(op(&args));
}

Tensor gather_rows_out(const Tensor& rows, const Tensor& index, const Tensor& out) {
  move_rows("gather_rows", flashu_gather_rows, rows, index, "out", out);
  return out;
}

Tensor gather_rows(const Tensor& rows, const Tensor& index) {
  std::vector<int64_t> sizes = sizes_of(rows);
  if (sizes.size() >= 2 && index.dim() > 0) sizes[sizes.size() - 2] = index.size(index.dim() - 1);
  return gather_rows_out(rows, index, new_empty(rows, sizes));
}

void scatter_rows_(const Tensor& rows, const Tensor& index, const Tensor& moved) {
  move_rows("scatter_rows_", flashu_scatter_rows, rows, index, "moved", moved);
}

void scatter_add_rows_(const Tensor& rows, const Tensor& index, const Tensor& moved) {
  move_rows("scatter_add_rows_", flashu_scatter_add_rows, rows, index, "moved", moved);
}

}  // namespace

template <class Library>
void register_routing(Library& m) {
  m.impl("cosine_importance", TORCH_BOX(&cosine_importance));
  m.impl("cosine_importance.out", TORCH_BOX(&cosine_importance_out));
  m.impl("value_norms", TORCH_BOX(&value_norms));
  m.impl("value_norms.out", TORCH_BOX(&value_norms_out));
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("select_topk.out", TORCH_BOX(&select_topk_out));
  m.impl("select_threshold", TORCH_BOX(&select_threshold));
  m.impl("select_threshold.out", TORCH_BOX(&select_threshold_out));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("gather_rows.out", TORCH_BOX(&gather_rows_out));
  m.impl("scatter_rows_", TORCH_BOX(&scatter_rows_));
  m.impl("scatter_add_rows_", TORCH_BOX(&scatter_add_rows_));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(routing)
