/// @file
/// C++ API of the routing family: typed wrappers over flashu/routing.h that throw flashu::Error.
#pragma once

#include "flashu/flashu.hpp"
#include "flashu/routing.h"

namespace flashu {

/// out = 1 - cosine(x_in, x_out) per token, reduced as `reduce` says
inline void cosine_importance(const flashu_tensor& x_in, const flashu_tensor& x_out, flashu_reduce reduce,
                              const flashu_tensor& out, Workspace workspace = {}, void* stream = nullptr) {
  auto args = make_args<flashu_cosine_importance_args>();
  args.reduce = reduce;
  args.x_in = x_in;
  args.x_out = x_out;
  args.out = out;
  args.workspace = workspace.data;
  args.workspace_bytes = workspace.bytes;
  args.stream = stream;
  detail::run_with_workspace(args, x_in.device, flashu_cosine_importance_workspace, flashu_cosine_importance);
}

/// out[b, t] = L2 norm of v[b, :, t, :]
inline void value_norms(const flashu_tensor& v, const flashu_tensor& out, void* stream = nullptr) {
  auto args = make_args<flashu_value_norms_args>();
  args.v = v;
  args.out = out;
  args.stream = stream;
  check(flashu_value_norms(&args));
}

/// The k best scores of each row, indices ascending
inline void select_topk(const flashu_tensor& scores, int64_t k, const flashu_tensor& index,
                        const flashu_tensor& count, void* stream = nullptr) {
  auto args = make_args<flashu_select_topk_args>();
  args.scores = scores;
  args.k = k;
  args.index = index;
  args.count = count;
  args.stream = stream;
  check(flashu_select_topk(&args));
}

/// The scores >= threshold of each row, indices ascending, then -1
inline void select_threshold(const flashu_tensor& scores, double threshold, const flashu_tensor& index,
                             const flashu_tensor& count, void* stream = nullptr) {
  auto args = make_args<flashu_select_threshold_args>();
  args.scores = scores;
  args.threshold = threshold;
  args.index = index;
  args.count = count;
  args.stream = stream;
  check(flashu_select_threshold(&args));
}

namespace detail {

inline void move_rows(int32_t (*op)(const flashu_move_rows_args*), const flashu_tensor& rows,
                      const flashu_tensor& index, const flashu_tensor& moved, void* stream) {
  auto args = make_args<flashu_move_rows_args>();
  args.rows = rows;
  args.index = index;
  args.moved = moved;
  args.stream = stream;
  check(op(&args));
}

}  // namespace detail

/// moved = rows[index], zeros where the index is -1
inline void gather_rows(const flashu_tensor& rows, const flashu_tensor& index, const flashu_tensor& moved,
                        void* stream = nullptr) {
  detail::move_rows(flashu_gather_rows, rows, index, moved, stream);
}

/// rows[index] = moved, the last entry staying where a row is named twice
inline void scatter_rows(const flashu_tensor& rows, const flashu_tensor& index, const flashu_tensor& moved,
                         void* stream = nullptr) {
  detail::move_rows(flashu_scatter_rows, rows, index, moved, stream);
}

/// rows[index] += moved, in order
inline void scatter_add_rows(const flashu_tensor& rows, const flashu_tensor& index,
                             const flashu_tensor& moved, void* stream = nullptr) {
  detail::move_rows(flashu_scatter_add_rows, rows, index, moved, stream);
}

}  // namespace flashu
