// Kernel table of the norm family: one row at a time, one table per storage type and CPU instruction set.
// Arithmetic is one step wider than the storage (fp64 for fp32, fp32 for bf16 and fp16) and rounded once.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"

namespace flashu::cpu {

template <class T>
struct NormKernels {
  // sum of x[j]^2, over a fixed number of lanes, so that its order depends on n only
  double (*sum_squares)(const T* x, int64_t n);
  // residual[j] = round(residual[j] + x[j]); returns the sum of squares of what was stored
  double (*add_sum_squares)(T* residual, const T* x, int64_t n);
  // out[j] = x[j] * inverse * weight[j]
  void (*scale)(T* out, const T* x, const T* weight, double inverse, int64_t n);
  // out[j] = x[j] * inverse * weight[j] * (1 + scale[j]) + shift[j]
  void (*modulate)(T* out, const T* x, const T* weight, const T* shift, const T* scale, double inverse,
                   int64_t n);
  // residual[j] += y[j]
  void (*add)(T* residual, const T* y, int64_t n);
  // residual[j] += gate[j] * y[j]
  void (*gate_add)(T* residual, const T* y, const T* gate, int64_t n);
  // out[j] = x[j] * cos[j] - x[j + half] * sin[j]; out[j + half] = x[j + half] * cos[j + half] + x[j] * sin[j
  // + half]
  void (*rotate)(T* out, const T* x, const T* cos, const T* sin, int64_t half);
};

FLASHU_DECLARE_ISA(NormKernels<float>, norm_f32)
FLASHU_DECLARE_ISA(NormKernels<bfloat16>, norm_bf16)
FLASHU_DECLARE_ISA(NormKernels<float16>, norm_f16)

}  // namespace flashu::cpu
