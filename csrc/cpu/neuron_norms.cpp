// C API of neuron_norms_: checks, then columns split over threads.
#include <algorithm>

#include "core/checks.hpp"
#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "cpu/neuron_norms_kernels.hpp"
#include "flashu/ffn.h"

namespace flashu::cpu {
namespace {

constexpr int64_t kColumns = 128;  // columns per piece: their sums stay in L1 while the rows stream by

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

void neuron_norms(const flashu_neuron_norms_args& args) {
  core::check_tensor("acc", args.acc);
  core::check_tensor("h", args.h);
  core::check_device({{"acc", &args.acc}, {"h", &args.h}});
  core::check_dtype("acc", args.acc, {FLASHU_F32, FLASHU_F64});
  core::check_dtype("h", args.h, {FLASHU_F32, FLASHU_BF16, FLASHU_F16});
  core::check_rank("acc", args.acc, 1);
  core::check_inner_contiguous("acc", args.acc);
  const core::Rows rows = core::as_rows("h", args.h);
  core::check_size("acc", args.acc, 0, rows.width);
  core::check_disjoint("acc", args.acc, "h", args.h);
  if (rows.count == 0 || rows.width == 0) return;
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

}  // namespace
}  // namespace flashu::cpu

extern "C" int32_t flashu_neuron_norms(const flashu_neuron_norms_args* args) {
  using namespace flashu;
  return core::guarded("neuron_norms_", [&] { cpu::neuron_norms(core::read_args(args)); });
}
