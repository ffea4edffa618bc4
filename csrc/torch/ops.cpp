// Every op's schema, in one list. Implementations are registered beside their adapters (one file per family);
// fake kernels and autograd guards are in Python (flashu_ext/ops.py).
#include "torch/common.hpp"

STABLE_TORCH_LIBRARY(flashu, m) {
  // ffn: neither runs nor index selects all neurons; runs is flat (start, length) pairs
  m.def(
      "gathered_swiglu(Tensor x, Tensor w_gate, Tensor w_up, *, int[]? runs=None, Tensor? index=None) -> Tensor");
  m.def(
      "gathered_swiglu.out(Tensor x, Tensor w_gate, Tensor w_up, *, int[]? runs=None, Tensor? index=None, "
      "Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "gathered_down(Tensor h, Tensor w_down, *, int[]? runs=None, Tensor? index=None, Tensor? residual=None) "
      "-> Tensor");
  m.def(
      "gathered_down.out(Tensor h, Tensor w_down, *, int[]? runs=None, Tensor? index=None, Tensor? residual=None, "
      "Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "gathered_ffn(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, *, int[]? runs=None, Tensor? index=None, "
      "Tensor? residual=None) -> Tensor");
  m.def(
      "gathered_ffn.out(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, *, int[]? runs=None, "
      "Tensor? index=None, Tensor? residual=None, Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "gathered_ffn_norms(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor(a!) norms, *, "
      "int[]? runs=None, Tensor? index=None, Tensor? residual=None) -> Tensor");
  m.def("neuron_norms_(Tensor(a!) acc, Tensor h) -> ()");
}
