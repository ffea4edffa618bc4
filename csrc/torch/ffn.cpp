// torch adapters of the FFN family: views in, C API, outputs from torch's allocator.
#include "flashu/ffn.h"

#include "torch/common.hpp"

namespace flashu::torch_ops {
namespace {

void neuron_norms_(const Tensor& acc, const Tensor& h) {
  auto args = make_args<flashu_neuron_norms_args>();
  args.acc = view("neuron_norms_", "acc", acc);
  args.h = view("neuron_norms_", "h", h);
  check_status(flashu_neuron_norms(&args));
}

}  // namespace
}  // namespace flashu::torch_ops

STABLE_TORCH_LIBRARY_IMPL(flashu, CPU, m) {
  m.impl("neuron_norms_", TORCH_BOX(&flashu::torch_ops::neuron_norms_));
}
