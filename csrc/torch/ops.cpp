// Every op's schema, in one list. Implementations are registered beside their adapters (one file per family);
// fake kernels and autograd guards are in Python (flashu_ext/ops.py).
#include "torch/common.hpp"

STABLE_TORCH_LIBRARY(flashu, m) {
  // ffn
  m.def("neuron_norms_(Tensor(a!) acc, Tensor h) -> ()");
}
