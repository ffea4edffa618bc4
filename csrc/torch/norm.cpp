// torch adapters of the norm family: views in, C API, outputs from torch's allocator.
#include "flashu/norm.h"

#include "torch/common.hpp"

namespace flashu::torch_ops {
namespace {

// Flat (row, offset, length) triples; the C API checks what they say.
flashu_spans view_spans(const char* op, const std::vector<int64_t>& spans) {
  STD_TORCH_CHECK(spans.size() % 3 == 0, "flashu value error: ", op,
                  ": spans: expected (row, offset, length) triples, got ", spans.size(), " numbers");
  return {static_cast<int64_t>(spans.size() / 3), spans.data()};
}

Tensor rms_norm_out(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  const char* op = "rms_norm";
  const Tensor rows = foldable(x);
  auto args = make_args<flashu_rms_norm_args>(x);
  args.x = view(op, "x", rows);
  args.weight = view(op, "weight", weight);
  args.eps = eps;
  args.out = view(op, "out", out);
  check_status(flashu_rms_norm(&args));
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return rms_norm_out(x, weight, eps, new_empty(x, sizes_of(x)));
}

void add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const char* op = "add_rms_norm_";
  auto args = make_args<flashu_add_rms_norm_args>(x);
  args.x = view(op, "x", x);
  args.residual = view(op, "residual", residual);
  args.weight = view(op, "weight", weight);
  args.eps = eps;
  check_status(flashu_add_rms_norm(&args));
}

Tensor span_modulate_out(const Tensor& x, const Tensor& weight, const Tensor& shift, const Tensor& scale,
                         std::vector<int64_t> spans, double eps, const Tensor& out) {
  const char* op = "span_modulate";
  auto args = make_args<flashu_span_modulate_args>(x);
  args.x = view(op, "x", x);
  args.weight = view(op, "weight", weight);
  args.shift = view(op, "shift", shift);
  args.scale = view(op, "scale", scale);
  args.spans = view_spans(op, spans);
  args.eps = eps;
  args.out = view(op, "out", out);
  check_status(flashu_span_modulate(&args));
  return out;
}

Tensor span_modulate(const Tensor& x, const Tensor& weight, const Tensor& shift, const Tensor& scale,
                     std::vector<int64_t> spans, double eps) {
  return span_modulate_out(x, weight, shift, scale, std::move(spans), eps, new_empty(x, sizes_of(x)));
}

void span_gate_add_(const Tensor& residual, const Tensor& y, const Tensor& gate, std::vector<int64_t> spans) {
  const char* op = "span_gate_add_";
  auto args = make_args<flashu_span_gate_add_args>(residual);
  args.residual = view(op, "residual", residual);
  args.y = view(op, "y", y);
  args.gate = view(op, "gate", gate);
  args.spans = view_spans(op, spans);
  check_status(flashu_span_gate_add(&args));
}

}  // namespace

template <class Library>
void register_norm(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&rms_norm_out));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("span_modulate", TORCH_BOX(&span_modulate));
  m.impl("span_modulate.out", TORCH_BOX(&span_modulate_out));
  m.impl("span_gate_add_", TORCH_BOX(&span_gate_add_));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(norm)
