// Kernel table of neuron_norms_: one function per storage type, one table per CPU instruction set.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"

namespace flashu::cpu {

// sums[j] += h[r * stride + j]^2 over rows r, for j < count; row order, so any split by columns gives the
// same bits.
struct NeuronNormsKernels {
  void (*f32)(double* sums, const float* h, int64_t rows, int64_t stride, int64_t count);
  void (*bf16)(double* sums, const bfloat16* h, int64_t rows, int64_t stride, int64_t count);
  void (*f16)(double* sums, const float16* h, int64_t rows, int64_t stride, int64_t count);
};
FLASHU_DECLARE_ISA(NeuronNormsKernels, neuron_norms_kernels)

}  // namespace flashu::cpu
