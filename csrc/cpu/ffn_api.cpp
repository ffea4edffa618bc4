// C API of the gathered FFN: every check, the workspace sizes, and the hand-over to run_ffn().
#include <algorithm>
#include <string>

#include "core/checks.hpp"
#include "core/rows.hpp"
#include "cpu/ffn.hpp"
#include "flashu/ffn.h"

namespace flashu::cpu {
namespace {

// A weight matrix of x's dtype with contiguous rows.
Matrix weight(const char* name, const flashu_tensor& tensor, const char* like_name,
              const flashu_tensor& like) {
  core::check_rank(name, tensor, 2);
  core::check_same_dtype(name, tensor, like_name, like);
  core::check_inner_contiguous(name, tensor);
  return {tensor.data, tensor.strides[0]};
}

// A tensor of rows that must have the leading dimensions of `like` and `width` columns.
Matrix rows_like(const char* name, const flashu_tensor& tensor, const char* like_name,
                 const flashu_tensor& like, int64_t width) {
  core::check_same_dtype(name, tensor, like_name, like);
  core::check_rank(name, tensor, like.ndim);
  for (int d = 0; d < like.ndim - 1; ++d) core::check_size(name, tensor, d, like.sizes[d]);
  core::check_size(name, tensor, like.ndim - 1, width);
  return {tensor.data, core::as_rows(name, tensor).stride};
}

Matrix output(const flashu_tensor& out, const char* like_name, const flashu_tensor& like, int64_t width,
              std::initializer_list<std::pair<const char*, const flashu_tensor*>> inputs) {
  const Matrix matrix = rows_like("out", out, like_name, like, width);
  core::check_non_overlapping("out", out);
  for (const auto& [name, input] : inputs) {
    if (core::present(*input)) core::check_disjoint("out", out, name, *input);
  }
  return matrix;
}

void check_all(std::initializer_list<std::pair<const char*, const flashu_tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (core::present(*tensor)) core::check_tensor(name, *tensor);
  }
  core::check_device(tensors);
}

// x or h: the operand whose dtype and leading dimensions the others follow.
core::Rows leading_operand(const char* name, const flashu_tensor& tensor) {
  core::check_dtype(name, tensor, {FLASHU_F32, FLASHU_BF16, FLASHU_F16});
  return core::as_rows(name, tensor);
}

FfnScratch scratch_of(const FfnProblem& p) {
  return plan_scratch(p.rows, p.hidden, p.width, p.selection->count, p.type, !p.selection->range, p.has_up,
                      p.has_down);
}

void check_up_weights(FfnProblem& p, const flashu_tensor& x, const flashu_tensor& w_gate,
                      const flashu_tensor& w_up) {
  p.w_gate = weight("w_gate", w_gate, "x", x);
  core::check_size("w_gate", w_gate, 1, p.hidden);
  p.w_up = weight("w_up", w_up, "x", x);
  core::check_same_shape("w_up", w_up, "w_gate", w_gate);
  p.intermediate = w_gate.sizes[0];
  p.has_up = true;
}

FfnProblem checked(const flashu_swiglu_args& a, Selection& selection) {
  check_all({{"x", &a.x}, {"w_gate", &a.w_gate}, {"w_up", &a.w_up}, {"out", &a.out}});
  const core::Rows x = leading_operand("x", a.x);
  FfnProblem p{};
  p.type = a.x.dtype;
  p.rows = x.count;
  p.hidden = x.width;
  p.x = {a.x.data, x.stride};
  check_up_weights(p, a.x, a.w_gate, a.w_up);
  selection = resolve(a.selection, p.intermediate);
  p.selection = &selection;
  p.h = output(a.out, "x", a.x, selection.count, {{"x", &a.x}, {"w_gate", &a.w_gate}, {"w_up", &a.w_up}});
  return p;
}

FfnProblem checked(const flashu_down_args& a, Selection& selection) {
  check_all({{"h", &a.h}, {"w_down", &a.w_down}, {"residual", &a.residual}, {"out", &a.out}});
  const core::Rows h = leading_operand("h", a.h);
  FfnProblem p{};
  p.type = a.h.dtype;
  p.rows = h.count;
  p.h = {a.h.data, h.stride};
  p.w_down = weight("w_down", a.w_down, "h", a.h);
  p.width = a.w_down.sizes[0];
  p.has_down = true;
  p.intermediate = a.w_down.sizes[1];
  selection = resolve(a.selection, p.intermediate);
  p.selection = &selection;
  core::check_size("h", a.h, a.h.ndim - 1, selection.count);
  if (core::present(a.residual)) p.residual = rows_like("residual", a.residual, "h", a.h, p.width);
  p.out = output(a.out, "h", a.h, p.width, {{"h", &a.h}, {"w_down", &a.w_down}, {"residual", &a.residual}});
  return p;
}

FfnProblem checked(const flashu_ffn_args& a, Selection& selection) {
  check_all({{"x", &a.x},
             {"w_gate", &a.w_gate},
             {"w_up", &a.w_up},
             {"w_down", &a.w_down},
             {"residual", &a.residual},
             {"norms", &a.norms},
             {"out", &a.out}});
  const core::Rows x = leading_operand("x", a.x);
  FfnProblem p{};
  p.type = a.x.dtype;
  p.rows = x.count;
  p.hidden = x.width;
  p.x = {a.x.data, x.stride};
  check_up_weights(p, a.x, a.w_gate, a.w_up);
  p.w_down = weight("w_down", a.w_down, "x", a.x);
  core::check_size("w_down", a.w_down, 1, p.intermediate);
  p.width = a.w_down.sizes[0];
  p.has_down = true;
  selection = resolve(a.selection, p.intermediate);
  p.selection = &selection;
  if (core::present(a.residual)) p.residual = rows_like("residual", a.residual, "x", a.x, p.width);
  p.out = output(a.out, "x", a.x, p.width,
                 {{"x", &a.x},
                  {"w_gate", &a.w_gate},
                  {"w_up", &a.w_up},
                  {"w_down", &a.w_down},
                  {"residual", &a.residual}});
  if (core::present(a.norms)) {
    core::check_dtype("norms", a.norms, {FLASHU_F32, FLASHU_F64});
    core::check_rank("norms", a.norms, 1);
    core::check_inner_contiguous("norms", a.norms);
    core::check_size("norms", a.norms, 0, selection.count);
    for (const auto& [name, other] : {std::pair{"x", &a.x},
                                      {"w_gate", &a.w_gate},
                                      {"w_up", &a.w_up},
                                      {"w_down", &a.w_down},
                                      {"residual", &a.residual},
                                      {"out", &a.out}}) {
      if (core::present(*other)) core::check_disjoint("norms", a.norms, name, *other);
    }
    p.norms = a.norms;
  }
  return p;
}

template <class Args>
int32_t run(const char* op, const Args* args) {
  return core::guarded(op, [&] {
    const Args& a = core::read_args(args);
    Selection selection;
    const FfnProblem problem = checked(a, selection);
    if (problem.rows > 0) run_ffn(problem, scratch_of(problem), a.workspace, a.workspace_bytes);
  });
}

template <class Args>
int32_t workspace(const char* op, const Args* args, uint64_t* bytes) {
  return core::guarded(op, [&] {
    const Args& a = core::read_args(args);
    FLASHU_CHECK(bytes != nullptr, FLASHU_INVALID_VALUE, "bytes: expected a pointer, got NULL");
    Selection selection;
    *bytes = static_cast<uint64_t>(scratch_of(checked(a, selection)).bytes());
  });
}

}  // namespace
}  // namespace flashu::cpu

extern "C" {

int32_t flashu_gathered_swiglu(const flashu_swiglu_args* args) {
  return flashu::cpu::run("gathered_swiglu", args);
}
int32_t flashu_gathered_swiglu_workspace(const flashu_swiglu_args* args, uint64_t* bytes) {
  return flashu::cpu::workspace("gathered_swiglu", args, bytes);
}
int32_t flashu_gathered_down(const flashu_down_args* args) { return flashu::cpu::run("gathered_down", args); }
int32_t flashu_gathered_down_workspace(const flashu_down_args* args, uint64_t* bytes) {
  return flashu::cpu::workspace("gathered_down", args, bytes);
}
int32_t flashu_gathered_ffn(const flashu_ffn_args* args) { return flashu::cpu::run("gathered_ffn", args); }
int32_t flashu_gathered_ffn_workspace(const flashu_ffn_args* args, uint64_t* bytes) {
  return flashu::cpu::workspace("gathered_ffn", args, bytes);
}
}
