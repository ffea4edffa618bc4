// C API of the norm family: checks, then rows split over threads.
#include "flashu/norm.h"

#include <cmath>

#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "core/spans.hpp"
#include "cpu/norm_kernels.hpp"
#include "cpu/op_support.hpp"

namespace flashu::cpu {
namespace {

template <class T>
const NormKernels<T>& kernels();
template <>
const NormKernels<float>& kernels<float>() {
  return FLASHU_PICK_ISA(norm_f32);
}
template <>
const NormKernels<bfloat16>& kernels<bfloat16>() {
  return FLASHU_PICK_ISA(norm_bf16);
}
template <>
const NormKernels<float16>& kernels<float16>() {
  return FLASHU_PICK_ISA(norm_f16);
}

double inverse_rms(double squares, int64_t width, double eps) {
  return 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
}

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
  check_floating("x", args.x);
  const core::Rows x = core::as_rows("x", args.x);
  check_weight(args.weight, "x", args.x);
  check_like("out", args.out, "x", args.x);
  const core::Rows out = core::as_rows("out", args.out);
  check_eps(args.eps);
  check_output("out", args.out, {{"x", &args.x}, {"weight", &args.weight}});
  if (x.count == 0 || x.width == 0) return;
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(0, x.count, row_grain(x.width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T* row = pointer<T>(args.x) + r * x.stride;
        const double inverse = inverse_rms(k.sum_squares(row, x.width), x.width, args.eps);
        k.scale(pointer<T>(args.out) + r * out.stride, row, pointer<T>(args.weight), inverse, x.width);
      }
    });
  });
}

void add_rms_norm(const flashu_add_rms_norm_args& args) {
  core::check_tensor("x", args.x);
  core::check_tensor("residual", args.residual);
  core::check_tensor("weight", args.weight);
  core::check_device({{"x", &args.x}, {"residual", &args.residual}, {"weight", &args.weight}});
  check_floating("x", args.x);
  const core::Rows x = core::as_rows("x", args.x);
  check_like("residual", args.residual, "x", args.x);
  const core::Rows residual = core::as_rows("residual", args.residual);
  check_weight(args.weight, "x", args.x);
  check_eps(args.eps);
  check_output("x", args.x, {{"residual", &args.residual}, {"weight", &args.weight}});
  check_output("residual", args.residual, {{"weight", &args.weight}});
  if (x.count == 0 || x.width == 0) return;
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(0, x.count, row_grain(x.width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        T* sum = pointer<T>(args.residual) + r * residual.stride;
        T* row = pointer<T>(args.x) + r * x.stride;
        const double inverse = inverse_rms(k.add_sum_squares(sum, row, x.width), x.width, args.eps);
        k.scale(row, sum, pointer<T>(args.weight), inverse, x.width);
      }
    });
  });
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
  check_floating("x", args.x);
  core::check_rank("x", args.x, 3);
  core::check_inner_contiguous("x", args.x);
  check_weight(args.weight, "x", args.x);
  check_modulation("shift", args.shift, args.spans.num_spans, "x", args.x);
  check_modulation("scale", args.scale, args.spans.num_spans, "x", args.x);
  check_like("out", args.out, "x", args.x);
  core::check_inner_contiguous("out", args.out);
  check_eps(args.eps);
  check_output("out", args.out,
               {{"x", &args.x}, {"weight", &args.weight}, {"shift", &args.shift}, {"scale", &args.scale}});
  const int64_t tokens = args.x.sizes[1];
  const int64_t width = args.x.sizes[2];
  const std::vector<int32_t> span = core::span_map(args.spans, args.x.sizes[0], tokens);
  if (span.empty() || width == 0) return;
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(
        0, static_cast<int64_t>(span.size()), row_grain(width), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t row = i / tokens;
            const int64_t token = i % tokens;
            const T* x = pointer<T>(args.x) + row * args.x.strides[0] + token * args.x.strides[1];
            T* out = pointer<T>(args.out) + row * args.out.strides[0] + token * args.out.strides[1];
            const double inverse = inverse_rms(k.sum_squares(x, width), width, args.eps);
            const int64_t s = span[static_cast<size_t>(i)];
            if (s < 0) {
              k.scale(out, x, pointer<T>(args.weight), inverse, width);
            } else {
              k.modulate(out, x, pointer<T>(args.weight), pointer<T>(args.shift) + s * args.shift.strides[0],
                         pointer<T>(args.scale) + s * args.scale.strides[0], inverse, width);
            }
          }
        });
  });
}

void span_gate_add(const flashu_span_gate_add_args& args) {
  core::check_tensor("residual", args.residual);
  core::check_tensor("y", args.y);
  core::check_tensor("gate", args.gate);
  core::check_device({{"residual", &args.residual}, {"y", &args.y}, {"gate", &args.gate}});
  check_floating("residual", args.residual);
  core::check_rank("residual", args.residual, 3);
  core::check_inner_contiguous("residual", args.residual);
  check_like("y", args.y, "residual", args.residual);
  core::check_inner_contiguous("y", args.y);
  check_modulation("gate", args.gate, args.spans.num_spans, "residual", args.residual);
  check_output("residual", args.residual, {{"y", &args.y}, {"gate", &args.gate}});
  const int64_t tokens = args.residual.sizes[1];
  const int64_t width = args.residual.sizes[2];
  const std::vector<int32_t> span = core::span_map(args.spans, args.residual.sizes[0], tokens);
  if (span.empty() || width == 0) return;
  with_type(args.residual.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(
        0, static_cast<int64_t>(span.size()), row_grain(width), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t row = i / tokens;
            const int64_t token = i % tokens;
            T* residual =
                pointer<T>(args.residual) + row * args.residual.strides[0] + token * args.residual.strides[1];
            const T* y = pointer<T>(args.y) + row * args.y.strides[0] + token * args.y.strides[1];
            const int64_t s = span[static_cast<size_t>(i)];
            if (s < 0) {
              k.add(residual, y, width);
            } else {
              k.gate_add(residual, y, pointer<T>(args.gate) + s * args.gate.strides[0], width);
            }
          }
        });
  });
}

}  // namespace
}  // namespace flashu::cpu

extern "C" {

int32_t flashu_rms_norm(const flashu_rms_norm_args* args) {
  using namespace flashu;
  return core::guarded("rms_norm", [&] { cpu::rms_norm(core::read_args(args)); });
}

int32_t flashu_add_rms_norm(const flashu_add_rms_norm_args* args) {
  using namespace flashu;
  return core::guarded("add_rms_norm_", [&] { cpu::add_rms_norm(core::read_args(args)); });
}

int32_t flashu_span_modulate(const flashu_span_modulate_args* args) {
  using namespace flashu;
  return core::guarded("span_modulate", [&] { cpu::span_modulate(core::read_args(args)); });
}

int32_t flashu_span_gate_add(const flashu_span_gate_add_args* args) {
  using namespace flashu;
  return core::guarded("span_gate_add_", [&] { cpu::span_gate_add(core::read_args(args)); });
}

}  // extern "C"
