// Sum of squares per column; compiled once per CPU instruction set.
#include "cpu/neuron_norms_kernels.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

template <class T>
void column_squares(double* sums, const T* h, int64_t rows, int64_t stride, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = h + r * stride;
    for (int64_t j = 0; j < count; ++j) {
      const double value = to_float(row[j]);
      sums[j] += value * value;
    }
  }
}

}  // namespace

extern const NeuronNormsKernels neuron_norms_kernels{column_squares<float>, column_squares<bfloat16>,
                                                     column_squares<float16>};

}  // namespace flashu::cpu::FLASHU_ISA
