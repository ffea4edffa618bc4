// C API of the norm family: every check, then the kernels of the device.
#include "flashu/norm.h"

#include <cmath>

#include "api/dispatch.hpp"
#include "core/rows.hpp"
#include "core/spans.hpp"
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

void rms_norm(const flashu_rms_norm_args& args) {
  core::check_tensor("x", args.x);
  core::check_tensor("weight", args.weight);
  core::check_tensor("out", args.out);
  core::check_device({{"x", &args.x}, {"weight", &args.weight}, {"out", &args.out}});
  core::check_floating("x", args.x);
  core::as_rows("x", args.x);
  check_weight(args.weight, "x", args.x);
  core::check_like("out", args.out, "x", args.x);
  core::as_rows("out", args.out);
  check_eps(args.eps);
  core::check_output("out", args.out, {{"x", &args.x}, {"weight", &args.weight}});
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

void check_modulation(const char* name, const flashu_tensor& tensor, int64_t spans, const char* other_name,
                      const flashu_tensor& other) {
  core::check_rank(name, tensor, 2);
  core::check_same_dtype(name, tensor, other_name, other);
  core::check_size(name, tensor, 0, spans);
  core::check_size(name, tensor, 1, other.sizes[2]);
  core::check_inner_contiguous(name, tensor);
}

void span_modulate(const flashu_span_modulate_args& args) {
  core::check_tensor("x", args.x);
  core::check_tensor("weight", args.weight);
  core::check_tensor("shift", args.shift);
  core::check_tensor("scale", args.scale);
  core::check_tensor("out", args.out);
  core::check_device({{"x", &args.x},
                      {"weight", &args.weight},
                      {"shift", &args.shift},
                      {"scale", &args.scale},
                      {"out", &args.out}});
  core::check_floating("x", args.x);
  core::check_rank("x", args.x, 3);
  core::check_inner_contiguous("x", args.x);
  check_weight(args.weight, "x", args.x);
  check_modulation("shift", args.shift, args.spans.num_spans, "x", args.x);
  check_modulation("scale", args.scale, args.spans.num_spans, "x", args.x);
  core::check_like("out", args.out, "x", args.x);
  core::check_inner_contiguous("out", args.out);
  check_eps(args.eps);
  core::check_output(
      "out", args.out,
      {{"x", &args.x}, {"weight", &args.weight}, {"shift", &args.shift}, {"scale", &args.scale}});
  core::check_spans(args.spans, args.x.sizes[0], args.x.sizes[1]);
  if (core::numel(args.x) == 0) return;
  run_on(args.x.device, [&] { cpu::span_modulate(args); }, [&] { cuda::span_modulate(args); });
}

void span_gate_add(const flashu_span_gate_add_args& args) {
  core::check_tensor("residual", args.residual);
  core::check_tensor("y", args.y);
  core::check_tensor("gate", args.gate);
  core::check_device({{"residual", &args.residual}, {"y", &args.y}, {"gate", &args.gate}});
  core::check_floating("residual", args.residual);
  core::check_rank("residual", args.residual, 3);
  core::check_inner_contiguous("residual", args.residual);
  core::check_like("y", args.y, "residual", args.residual);
  core::check_inner_contiguous("y", args.y);
  check_modulation("gate", args.gate, args.spans.num_spans, "residual", args.residual);
  core::check_output("residual", args.residual, {{"y", &args.y}, {"gate", &args.gate}});
  core::check_spans(args.spans, args.residual.sizes[0], args.residual.sizes[1]);
  if (core::numel(args.residual) == 0) return;
  run_on(args.residual.device, [&] { cpu::span_gate_add(args); }, [&] { cuda::span_gate_add(args); });
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

int32_t flashu_span_modulate(const flashu_span_modulate_args* args) {
  using namespace flashu;
  return core::guarded("span_modulate", [&] { api::span_modulate(core::read_args(args)); });
}

int32_t flashu_span_gate_add(const flashu_span_gate_add_args* args) {
  using namespace flashu;
  return core::guarded("span_gate_add_", [&] { api::span_gate_add(core::read_args(args)); });
}

}  // extern "C"
