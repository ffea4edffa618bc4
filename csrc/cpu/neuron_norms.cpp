// neuron_norms_ on the CPU: columns split over threads.
#include <algorithm>

#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "cpu/ffn.hpp"
#include "cpu/neuron_norms_kernels.hpp"

namespace flashu::cpu {
namespace {

constexpr int64_t kColumns = 128;  // columns per chunk: their sums stay in L1 while the rows stream by

template <class T, class Kernel>
void run(const flashu_neuron_norms_args& args, const core::Rows& rows, Kernel kernel) {
  const T* h = static_cast<const T*>(args.h.data);
  core::parallel_for(0, (rows.width + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * kColumns;
      const int64_t count = std::min(kColumns, rows.width - column);
      double sums[kColumns] = {};
      kernel(sums, h + column, rows.count, rows.stride, count);
      for (int64_t j = 0; j < count; ++j) {
        if (args.acc.dtype == FLASHU_F64) {
          static_cast<double*>(args.acc.data)[column + j] += sums[j];
        } else {
          float& total = static_cast<float*>(args.acc.data)[column + j];
          total = static_cast<float>(total + sums[j]);
        }
      }
    }
  });
}

}  // namespace

void neuron_norms(const flashu_neuron_norms_args& args) {
  const core::Rows rows = core::as_rows("h", args.h);
  const NeuronNormsKernels& kernels = FLASHU_PICK_ISA(neuron_norms_kernels);
  switch (args.h.dtype) {
    case FLASHU_BF16:
      return run<bfloat16>(args, rows, kernels.bf16);
    case FLASHU_F16:
      return run<float16>(args, rows, kernels.f16);
    default:
      return run<float>(args, rows, kernels.f32);
  }
}

}  // namespace flashu::cpu
