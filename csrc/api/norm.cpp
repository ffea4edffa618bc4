// C API of the norm family: every check, then the kernels of the device.
#include "flashu/norm.h"

#include <cmath>

#include "api/dispatch.hpp"
#include "core/rows.hpp"
#include "cpu/norm.hpp"
#include "cuda/norm.hpp"

namespace flashu::api {
namespace {

void check_eps(double eps) {
  FLASHU_CHECK(std::isfinite(eps) && eps >= 0, FLASHU_INVALID_VALUE,
               "eps: expected a finite number >= 0, got ", eps);
}

void check_weight(const flashu_tensor& weight, const char* name, const flashu_tensor& x) {
  core::check_rank("weight", weight, 1);
  core::check_inner_contiguous("weight", weight);
  core::check_same_dtype("weight", weight, name, x);
  core::check_size("weight", weight, 0, x.sizes[x.ndim - 1]);
}

void check_modulation(const char* name, const flashu_tensor& tensor, const char* other_name,
                      const flashu_tensor& other) {
  core::check_rank(name, tensor, 2);
  core::check_same_dtype(name, tensor, other_name, other);
  core::check_size(name, tensor, 0, other.sizes[0]);
  core::check_size(name, tensor, 1, other.sizes[2]);
  core::check_inner_contiguous(name, tensor);
}

// Modulated rows know their batch, so nothing is folded and all strides but the last are free.
void check_norm_rows(const char* name, const flashu_tensor& tensor, bool modulated) {
  if (!modulated) {
    core::as_rows(name, tensor);
    return;
  }
  core::check_rank(name, tensor, 3);
  core::check_inner_contiguous(name, tensor);
}

void check_rms_norm_shapes(const flashu_rms_norm_args& args, bool modulated) {
  core::check_floating("x", args.x);
  check_norm_rows("x", args.x, modulated);
  check_weight(args.weight, "x", args.x);
  if (modulated) {
    check_modulation("shift", args.shift, "x", args.x);
    check_modulation("scale", args.scale, "x", args.x);
  }
  core::check_like("out", args.out, "x", args.x);
  check_norm_rows("out", args.out, modulated);
}

void rms_norm(const flashu_rms_norm_args& args) {
  const bool modulated = core::present(args.shift);
  FLASHU_CHECK(modulated == core::present(args.scale), FLASHU_INVALID_VALUE, modulated ? "scale" : "shift",
               ": expected a tensor, because ", modulated ? "shift" : "scale", " is given, got none");
  core::check_tensor("x", args.x);
  core::check_tensor("weight", args.weight);
  if (modulated) core::check_tensor("shift", args.shift);
  if (modulated) core::check_tensor("scale", args.scale);
  core::check_tensor("out", args.out);
  core::check_device({{"x", &args.x},
                      {"weight", &args.weight},
                      {"shift", &args.shift},
                      {"scale", &args.scale},
                      {"out", &args.out}});
  check_rms_norm_shapes(args, modulated);
  check_eps(args.eps);
  core::check_output(
      "out", args.out,
      {{"x", &args.x}, {"weight", &args.weight}, {"shift", &args.shift}, {"scale", &args.scale}});
  if (core::numel(args.x) == 0) return;
  run_on(args.x.device, [&] { cpu::rms_norm(args); }, [&] { cuda::rms_norm(args); });
}

void add_rms_norm(const flashu_add_rms_norm_args& args) {
  core::check_tensor("x", args.x);
  core::check_tensor("residual", args.residual);
  core::check_tensor("weight", args.weight);
  core::check_device({{"x", &args.x}, {"residual", &args.residual}, {"weight", &args.weight}});
  core::check_floating("x", args.x);
  core::as_rows("x", args.x);
  core::check_like("residual", args.residual, "x", args.x);
  core::as_rows("residual", args.residual);
  check_weight(args.weight, "x", args.x);
  check_eps(args.eps);
  core::check_output("x", args.x, {{"residual", &args.residual}, {"weight", &args.weight}});
  core::check_output("residual", args.residual, {{"weight", &args.weight}});
  if (core::numel(args.x) == 0) return;
  run_on(args.x.device, [&] { cpu::add_rms_norm(args); }, [&] { cuda::add_rms_norm(args); });
}

void gate_add(const flashu_gate_add_args& args) {
  const bool gated = core::present(args.gate);
  core::check_tensor("residual", args.residual);
  core::check_tensor("y", args.y);
  if (gated) core::check_tensor("gate", args.gate);
  core::check_device({{"residual", &args.residual}, {"y", &args.y}, {"gate", &args.gate}});
  core::check_floating("residual", args.residual);
  core::check_rank("residual", args.residual, 3);
  core::check_inner_contiguous("residual", args.residual);
  core::check_like("y", args.y, "residual", args.residual);
  core::check_inner_contiguous("y", args.y);
  if (gated) check_modulation("gate", args.gate, "residual", args.residual);
  core::check_output("residual", args.residual, {{"y", &args.y}, {"gate", &args.gate}});
  if (core::numel(args.residual) == 0) return;
  run_on(args.residual.device, [&] { cpu::gate_add(args); }, [&] { cuda::gate_add(args); });
}

// A weight of the heads' norm, which is optional.
void check_head_norm(const char* name, const flashu_tensor& weight, const flashu_tensor& query) {
  if (!core::present(weight)) return;
  core::check_rank(name, weight, 1);
  core::check_same_dtype(name, weight, "query", query);
  core::check_size(name, weight, 0, query.sizes[3]);
  core::check_inner_contiguous(name, weight);
}

void check_rotary_table(const char* name, const flashu_tensor& table, const flashu_tensor& query) {
  core::check_rank(name, table, 3);
  core::check_same_dtype(name, table, "query", query);
  FLASHU_CHECK(table.sizes[0] == query.sizes[0] || table.sizes[0] == 1, FLASHU_INVALID_VALUE, name,
               ": expected ", query.sizes[0], " rows as query has, or 1, got ", table.sizes[0], " (shape ",
               core::shape_text(table), ")");
  core::check_size(name, table, 1, query.sizes[1]);
  core::check_size(name, table, 2, query.sizes[3]);
  core::check_inner_contiguous(name, table);
}

void check_start(const flashu_rotary_cache_args& args) {
  const int64_t rows = args.query.sizes[0];
  const int64_t tokens = args.query.sizes[1];
  if (!core::present(args.start)) {
    FLASHU_CHECK(tokens <= args.keys.sizes[1], FLASHU_INVALID_VALUE, "keys: expected a capacity of at least ",
                 tokens, " tokens as query has (no start is given), got ", args.keys.sizes[1], " (shape ",
                 core::shape_text(args.keys), ")");
    return;
  }
  core::check_dtype("start", args.start, {FLASHU_I64});
  const bool fits = args.start.ndim == 0 ||
                    (args.start.ndim == 1 && (args.start.sizes[0] == rows || args.start.sizes[0] == 1));
  FLASHU_CHECK(fits, FLASHU_INVALID_VALUE, "start: expected shape [", rows, "], [1] or [], got ",
               core::shape_text(args.start));
}

void check_rotary_shapes(const flashu_rotary_cache_args& args) {
  core::check_floating("query", args.query);
  core::check_rank("query", args.query, 4);
  core::check_inner_contiguous("query", args.query);
  const int64_t* const sizes = args.query.sizes;
  FLASHU_CHECK(sizes[3] % 2 == 0, FLASHU_INVALID_VALUE, "query: expected an even head dimension, got ",
               sizes[3], " (shape ", core::shape_text(args.query), ")");
  core::check_rank("key", args.key, 4);
  core::check_same_dtype("key", args.key, "query", args.query);
  for (const int dim : {0, 1, 3}) core::check_size("key", args.key, dim, sizes[dim]);
  core::check_inner_contiguous("key", args.key);
  core::check_like("value", args.value, "key", args.key);
  core::check_inner_contiguous("value", args.value);
  check_rotary_table("cos", args.cos, args.query);
  check_rotary_table("sin", args.sin, args.query);
  core::check_rank("keys", args.keys, 4);
  core::check_same_dtype("keys", args.keys, "query", args.query);
  for (const int dim : {0, 2, 3}) core::check_size("keys", args.keys, dim, args.key.sizes[dim]);
  core::check_inner_contiguous("keys", args.keys);
  core::check_like("values", args.values, "keys", args.keys);
  core::check_inner_contiguous("values", args.values);
  check_start(args);
  const bool query_normed = core::present(args.query_norm);
  FLASHU_CHECK(query_normed == core::present(args.key_norm), FLASHU_INVALID_VALUE,
               query_normed ? "key_norm" : "query_norm", ": expected a weight as ",
               query_normed ? "query_norm" : "key_norm", " is one (both or neither), got none");
  check_head_norm("query_norm", args.query_norm, args.query);
  check_head_norm("key_norm", args.key_norm, args.query);
  check_eps(args.eps);
  core::check_rank("out", args.out, 4);
  core::check_same_dtype("out", args.out, "query", args.query);
  constexpr int kOfQuery[] = {0, 2, 1, 3};
  for (int dim = 0; dim < 4; ++dim) core::check_size("out", args.out, dim, sizes[kOfQuery[dim]]);
  core::check_inner_contiguous("out", args.out);
}

void rotary_cache(const flashu_rotary_cache_args& args) {
  const std::pair<const char*, const flashu_tensor*> given[] = {
      {"query", &args.query},      {"key", &args.key},
      {"value", &args.value},      {"cos", &args.cos},
      {"sin", &args.sin},          {"keys", &args.keys},
      {"values", &args.values},    {"out", &args.out},
      {"start", &args.start},      {"query_norm", &args.query_norm},
      {"key_norm", &args.key_norm}};
  for (int i = 0; i < 8; ++i) core::check_tensor(given[i].first, *given[i].second);
  for (int i = 8; i < 11; ++i) {
    if (core::present(*given[i].second)) core::check_tensor(given[i].first, *given[i].second);
  }
  core::check_device({given[0], given[1], given[2], given[3], given[4], given[5], given[6], given[7],
                      given[8], given[9], given[10]});
  check_rotary_shapes(args);
  const std::initializer_list<std::pair<const char*, const flashu_tensor*>> read = {
      {"query", &args.query},
      {"key", &args.key},
      {"value", &args.value},
      {"cos", &args.cos},
      {"sin", &args.sin},
      {"start", &args.start},
      {"query_norm", &args.query_norm},
      {"key_norm", &args.key_norm}};
  core::check_output("keys", args.keys, read);
  core::check_output("values", args.values, read);
  core::check_disjoint("values", args.values, "keys", args.keys);
  core::check_output("out", args.out, read);
  core::check_disjoint("out", args.out, "keys", args.keys);
  core::check_disjoint("out", args.out, "values", args.values);
  if (core::numel(args.query) == 0 && core::numel(args.key) == 0) return;
  run_on(args.query.device, [&] { cpu::rotary_cache(args); }, [&] { cuda::rotary_cache(args); });
}

}  // namespace
}  // namespace flashu::api

extern "C" {

int32_t flashu_rms_norm(const flashu_rms_norm_args* args) {
  using namespace flashu;
  return core::guarded("rms_norm", [&] { api::rms_norm(core::read_args(args)); });
}

int32_t flashu_add_rms_norm(const flashu_add_rms_norm_args* args) {
  using namespace flashu;
  return core::guarded("add_rms_norm_", [&] { api::add_rms_norm(core::read_args(args)); });
}

int32_t flashu_gate_add(const flashu_gate_add_args* args) {
  using namespace flashu;
  return core::guarded("gate_add_", [&] { api::gate_add(core::read_args(args)); });
}

int32_t flashu_rotary_cache(const flashu_rotary_cache_args* args) {
  using namespace flashu;
  return core::guarded("rotary_cache_", [&] { api::rotary_cache(core::read_args(args)); });
}

}  // extern "C"
