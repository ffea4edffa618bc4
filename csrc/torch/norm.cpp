// torch adapters of the norm family: views in, C API, outputs from torch's allocator.
#include "flashu/norm.h"

#include "torch/common.hpp"

namespace flashu::torch_ops {
namespace {

Tensor rms_norm_out(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& shift,
                    const std::optional<Tensor>& scale, const Tensor& out) {
  const char* op = "rms_norm";
  // Modulated rows keep their dimensions: their batch tells which row of shift and scale is theirs.
  const Tensor rows = shift.has_value() ? x : foldable(x);
  auto args = make_args<flashu_rms_norm_args>(x);
  args.x = view(op, "x", rows);
  args.weight = view(op, "weight", weight);
  args.shift = view(op, "shift", shift);
  args.scale = view(op, "scale", scale);
  args.eps = eps;
  args.out = view(op, "out", out);
  check_status(flashu_rms_norm(&args));
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& scale) {
  return rms_norm_out(x, weight, eps, shift, scale, new_empty(x, sizes_of(x)));
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

void gate_add_(const Tensor& residual, const Tensor& y, const std::optional<Tensor>& gate) {
  const char* op = "gate_add_";
  auto args = make_args<flashu_gate_add_args>(residual);
  args.residual = view(op, "residual", residual);
  args.y = view(op, "y", y);
  args.gate = view(op, "gate", gate);
  check_status(flashu_gate_add(&args));
}

Tensor rotary_cache_out(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
                        const Tensor& sin, const Tensor& keys, const Tensor& values,
                        const std::optional<Tensor>& start, const std::optional<Tensor>& query_norm,
                        const std::optional<Tensor>& key_norm, double eps, const Tensor& out) {
  const char* op = "rotary_cache_";
  auto args = make_args<flashu_rotary_cache_args>(query);
  args.query = view(op, "query", query);
  args.key = view(op, "key", key);
  args.value = view(op, "value", value);
  args.cos = view(op, "cos", cos);
  args.sin = view(op, "sin", sin);
  args.keys = view(op, "keys", keys);
  args.values = view(op, "values", values);
  args.start = view(op, "start", start);
  args.query_norm = view(op, "query_norm", query_norm);
  args.key_norm = view(op, "key_norm", key_norm);
  args.eps = eps;
  args.out = view(op, "out", out);
  check_status(flashu_rotary_cache(&args));
  return out;
}

Tensor rotary_cache_(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
                     const Tensor& sin, const Tensor& keys, const Tensor& values,
                     const std::optional<Tensor>& start, const std::optional<Tensor>& query_norm,
                     const std::optional<Tensor>& key_norm, double eps) {
  // Of another rank only to be refused, by name.
  const std::vector<int64_t> sizes =
      query.dim() == 4 ? std::vector<int64_t>{query.size(0), query.size(2), query.size(1), query.size(3)}
                       : std::vector<int64_t>{0};
  return rotary_cache_out(query, key, value, cos, sin, keys, values, start, query_norm, key_norm, eps,
                          new_empty(query, sizes));
}

}  // namespace

template <class Library>
void register_norm(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&rms_norm_out));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("gate_add_", TORCH_BOX(&gate_add_));
  m.impl("rotary_cache_", TORCH_BOX(&rotary_cache_));
  m.impl("rotary_cache_.out", TORCH_BOX(&rotary_cache_out));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(norm)
