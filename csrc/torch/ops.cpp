// Every op's schema, in one list. Implementations are registered beside their adapters (one file per family);
// fake kernels and autograd guards are in Python (flashu_ext/ops).
#include "torch/common.hpp"

FLASHU_OPS_LIBRARY(FLASHU_OPS_NAMESPACE, m) {
  // ffn: neither runs nor index selects all neurons; runs is flat (start, length) pairs. `listed`: index is
  // what list_neurons wrote, moved to the device, and is read in place; `block` is what came with it.
  m.def("list_neurons(Tensor(a!) list, int limit, int[]? runs=None, Tensor? index=None) -> int");
  m.def(
      "gathered_swiglu(Tensor x, Tensor w_gate, Tensor w_up, int[]? runs=None, Tensor? index=None, "
      "bool listed=False, int block=1, Tensor? gate_add=None, Tensor? up_add=None) -> Tensor");
  m.def(
      "gathered_swiglu.out(Tensor x, Tensor w_gate, Tensor w_up, int[]? runs=None, Tensor? index=None, "
      "bool listed=False, int block=1, Tensor? gate_add=None, Tensor? up_add=None, *, "
      "Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "gathered_down(Tensor h, Tensor w_down, int[]? runs=None, Tensor? index=None, Tensor? residual=None, "
      "bool listed=False, int block=1) -> Tensor");
  m.def(
      "gathered_down.out(Tensor h, Tensor w_down, int[]? runs=None, Tensor? index=None, "
      "Tensor? residual=None, bool listed=False, int block=1, *, Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "gathered_ffn(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int[]? runs=None, "
      "Tensor? index=None, Tensor? residual=None, bool listed=False, int block=1) -> Tensor");
  m.def(
      "gathered_ffn.out(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int[]? runs=None, "
      "Tensor? index=None, Tensor? residual=None, bool listed=False, int block=1, *, "
      "Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "gathered_ffn_norms(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor(a!) norms, "
      "int[]? runs=None, Tensor? index=None, Tensor? residual=None, bool listed=False, "
      "int block=1) -> Tensor");
  m.def(
      "int8_ffn(Tensor x, Tensor w_gate, Tensor gate_scale, Tensor w_up, Tensor up_scale, Tensor w_down, "
      "Tensor down_scale, int[]? runs=None, Tensor? index=None, Tensor? residual=None, bool listed=False, "
      "int block=1) -> Tensor");
  m.def(
      "int8_ffn.out(Tensor x, Tensor w_gate, Tensor gate_scale, Tensor w_up, Tensor up_scale, "
      "Tensor w_down, Tensor down_scale, int[]? runs=None, Tensor? index=None, Tensor? residual=None, "
      "bool listed=False, int block=1, *, Tensor(a!) out) -> Tensor(a!)");
  m.def("neuron_norms_(Tensor(a!) acc, Tensor h) -> ()");

  // linear: epilogue is 0 none, 1 gelu, 2 gelu_tanh, 3 silu
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, int epilogue=0) -> Tensor");
  m.def(
      "linear.out(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, int epilogue=0, *, "
      "Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
      "int epilogue=0) -> Tensor");
  m.def(
      "int8_linear.out(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
      "int epilogue=0, *, Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "linears(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual=None, int epilogue=0) -> "
      "Tensor");
  m.def(
      "linears.out(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual=None, int epilogue=0, *, "
      "Tensor(a!) out) -> Tensor(a!)");

  // attention: softmax(query key^T / sqrt(d) + mask) value of each row's first keys
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? lengths=None, Tensor? mask=None) -> Tensor");
  m.def(
      "attention.out(Tensor query, Tensor key, Tensor value, Tensor? lengths=None, Tensor? mask=None, *, "
      "Tensor(a!) out) -> Tensor(a!)");

  // routing: reduce is 0 none, 1 mean, 2 last; an index of -1 is padding
  m.def("cosine_importance(Tensor x_in, Tensor x_out, int reduce=0) -> Tensor");
  m.def("cosine_importance.out(Tensor x_in, Tensor x_out, int reduce=0, *, Tensor(a!) out) -> Tensor(a!)");
  m.def("value_norms(Tensor v) -> Tensor");
  m.def("value_norms.out(Tensor v, *, Tensor(a!) out) -> Tensor(a!)");
  m.def("select_topk(Tensor scores, int k) -> (Tensor, Tensor)");
  m.def(
      "select_topk.out(Tensor scores, int k, *, Tensor(a!) index, Tensor(b!) count) -> (Tensor(a!), "
      "Tensor(b!))");
  m.def("select_threshold(Tensor scores, float threshold, int capacity) -> (Tensor, Tensor)");
  m.def(
      "select_threshold.out(Tensor scores, float threshold, int capacity, *, Tensor(a!) index, Tensor(b!) "
      "count) "
      "-> (Tensor(a!), Tensor(b!))");
  m.def("gather_rows(Tensor rows, Tensor index) -> Tensor");
  m.def("gather_rows.out(Tensor rows, Tensor index, *, Tensor(a!) out) -> Tensor(a!)");
  m.def("scatter_rows_(Tensor(a!) rows, Tensor index, Tensor moved) -> ()");
  m.def("scatter_add_rows_(Tensor(a!) rows, Tensor index, Tensor moved) -> ()");

  // norm
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? shift=None, Tensor? scale=None) -> Tensor");
  m.def(
      "rms_norm.out(Tensor x, Tensor weight, float eps, Tensor? shift=None, Tensor? scale=None, *, "
      "Tensor(a!) out) -> Tensor(a!)");
  m.def("add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()");
  m.def("gate_add_(Tensor(a!) residual, Tensor y, Tensor? gate=None) -> ()");
  m.def(
      "rotary_cache_(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor? start=None, Tensor? query_norm=None, Tensor? key_norm=None, "
      "float eps=1e-06) -> Tensor");
  m.def(
      "rotary_cache_.out(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor? start=None, Tensor? query_norm=None, Tensor? key_norm=None, "
      "float eps=1e-06, *, Tensor(c!) out) -> Tensor(c!)");

  // step
  m.def(
      "guided_euler_step_(Tensor(a!) latents, Tensor v, Tensor s, Tensor dt, Tensor step, "
      "Tensor(b!)? velocity=None) -> ()");
  m.def("feature_delta(Tensor a, Tensor b) -> Tensor");
  m.def("feature_delta.out(Tensor a, Tensor b, *, Tensor(a!) out) -> Tensor(a!)");
  m.def("taylor_update_(Tensor(a!) state, Tensor feature, float interval, int count) -> ()");
  m.def("taylor_predict(Tensor state, float ahead, int count) -> Tensor");
  m.def("taylor_predict.out(Tensor state, float ahead, int count, *, Tensor(a!) out) -> Tensor(a!)");

  // facts, for people (flashu_ext/ops/explain.py)
  m.def("build_facts() -> str");
  m.def("explain_gemm(int m, int n, int k, str dtype, bool gathered, int threads=0) -> str");
  m.def(
      "explain_ffn(int rows, int hidden, int neurons, str dtype, bool listed, int capability=90, "
      "int multiprocessors=132) -> str");
}
