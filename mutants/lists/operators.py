"""Faults between torch and the kernels: csrc/torch and flashu_ext/ops."""

from __future__ import annotations

from ..mutant import Mutant, Pytest


def contract(op: str) -> Pytest:
    """The contract tests of one op."""
    return Pytest("python_tests/ops/test_contract.py", "-k", op)


def gradients(chosen: str) -> Pytest:
    """What autograd meets."""
    return Pytest("python_tests/ops/test_autograd.py", "-k", chosen)


LAYERS = Pytest("python_tests/ops/test_layers.py")

MUTANTS = [
    # ---- fake kernels: what torch.compile believes
    Mutant("fake: the last token's importance has a shape of all", "flashu_ext/ops/routing.py", "(1, x_in.dim(), 2)[reduce]", "(1, x_in.dim(), 1)[reduce]", contract("cosine"), quick=True),
    Mutant("fake: the mean importance is no scalar", "flashu_ext/ops/routing.py", "(1, x_in.dim(), 2)[reduce]", "(1, x_in.dim() - 1, 2)[reduce]", contract("cosine")),
    Mutant("fake: norms by head", "flashu_ext/ops/routing.py", "v.new_empty((v.shape[0], v.shape[2])", "v.new_empty((v.shape[0], v.shape[1])", contract("value_norms")),
    Mutant("fake: counts are int64", "flashu_ext/ops/routing.py", "scores.new_empty(lead, dtype=torch.int32)", "scores.new_empty(lead, dtype=torch.int64)", contract("select")),
    Mutant("fake: linear keeps the width", "flashu_ext/ops/linear.py", "(*x.shape[:-1], weight.shape[0])", "x.shape", contract("linear")),
    Mutant("fake: attention keeps the order of heads and queries", "flashu_ext/ops/attention.py", "query.new_empty((rows, n, heads, d))", "query.new_empty((rows, heads, n, d))", contract("attention")),
    Mutant("fake: as many rows as before are gathered", "flashu_ext/ops/routing.py", "(*rows.shape[:-2], index.shape[-1], rows.shape[-1])", "rows.shape", contract("gather_rows")),
    Mutant("fake: a predicted feature keeps the order", "flashu_ext/ops/step.py", "state.new_empty(state.shape[1:])", "state.new_empty(state.shape[:1] + state.shape[2:])", contract("taylor_predict")),
    Mutant("fake: queries are not transposed", "flashu_ext/ops/norm.py", "query.new_empty(query.transpose(1, 2).shape)", "query.new_empty(query.shape)", contract("rotary")),
    Mutant("fake: devices may be mixed", "flashu_ext/ops/common.py", "and value.device != first[1].device:", "and value.device.type != first[1].device.type == 'cuda':", contract("gather_rows")),
    # ---- the Python functions
    Mutant("ops: compiled, out stays as it was", "flashu_ext/ops/common.py", "return out.copy_(made)", "return made", contract("compiled_call"), quick=True),
    Mutant("ops: a tuple of three is a run", "flashu_ext/ops/common.py", "if own is entry and len(own) != group:", "if own is entry and len(own) < group:", Pytest("python_tests/ops/test_ffn.py", "-k", "bad_selections")),
    Mutant("ops: True is a number of runs", "flashu_ext/ops/common.py", "not isinstance(number, int) or isinstance(number, bool)", "not isinstance(number, int)", Pytest("python_tests/ops/test_selection.py", "-k", "wrong_neurons")),
    Mutant("ops: norms and out at once", "flashu_ext/ops/ffn.py", "    if out is not None:\n        raise", "    if False:\n        raise", Pytest("python_tests/ops/test_ffn.py", "-k", "norms")),
    Mutant("ops: norms without the residual", "flashu_ext/ops/ffn.py", "norms, **chosen, residual=residual)", "norms, **chosen, residual=None)", contract("gathered_ffn")),
    Mutant("ops: one output of a selection is enough", "flashu_ext/ops/routing.py", "if index is None or count is None:", "if index is None and count is None:", contract("selection_outputs")),
    Mutant("ops: every dtype is supported", "flashu_ext/ops/common.py", "return torch.device(device).type in devices and dtype in dtypes and fits", "return torch.device(device).type in devices and fits", contract("supported")),
    # ---- what autograd meets
    Mutant("autograd: a gradient is lost silently", "flashu_ext/ops/autograd.py", "if is_grad_enabled() and any_requires_grad(*args):", "if False:", gradients("never_lost"), quick=True),
    Mutant("autograd: a leaf is written", "flashu_ext/ops/autograd.py", "if is_grad_enabled() and any_requires_grad(*args, **outputs):", "if False:", gradients("never_lost")),
    Mutant("autograd: out may require grad", "flashu_ext/ops/autograd.py", "any_requires_grad(*args, **outputs)", "any_requires_grad(*args)", gradients("never_lost and rms_norm")),
    Mutant("autograd: gradients are refused under no_grad", "flashu_ext/ops/autograd.py", "is_grad_enabled() and any_requires_grad(*args, **outputs)", "any_requires_grad(*args, **outputs)", gradients("everything_goes and gate_add")),
    Mutant("autograd: versions do not count", "flashu_ext/ops/autograd.py", "        increment_version(written)\n", "", gradients("versions or saved")),
    Mutant("autograd: an output's version does not count", "flashu_ext/ops/autograd.py", "written += outputs.values()", "written += ()", gradients("versions or saved")),
    Mutant("autograd: what was refused counts as written", "flashu_ext/ops/autograd.py", "        result = redispatch(keyset & below_inplace", "        increment_version(written)\n        result = redispatch(keyset & below_inplace", gradients("cannot_be_written or versions")),
    Mutant("autograd: a tangent is lost", "flashu_ext/ops/autograd.py", "if forward_ad.unpack_dual(tensor).tangent is not None:", "if False:", gradients("tangent and taylor")),
    Mutant("autograd: inference tensors are written anywhere", "flashu_ext/ops/autograd.py", "if tensor.is_inference():", "if False:", gradients("inference_tensor and taylor")),
    Mutant("autograd: transforms are let through", "flashu_ext/ops/autograd.py", '    _library.impl(op.name(), _transformed(op), "FuncTorchDynamicLayerFrontMode")\n', "", gradients("transform and rms")),
    Mutant("autograd: dynamo compiles what the dispatcher calls", "flashu_ext/ops/autograd.py", "    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))\n", "", gradients("dynamo")),
    # ---- layers of a Hugging Face kernel
    Mutant("layers: a weight is rounded to x's dtype", "flashu_ext/ops/layers.py", "torch.promote_types(hidden_states.dtype, self.weight.dtype)", "hidden_states.dtype", LAYERS),
    Mutant("layers: a norm has the weight's dtype", "flashu_ext/ops/layers.py", ", eps).to(hidden_states.dtype)", ", eps)", LAYERS),
    Mutant("layers: a selection is forgotten", "flashu_ext/ops/layers.py", "gate, up, down, selection=selection)", "gate, up, down, selection=None)", LAYERS, quick=True),
    Mutant("layers: hooks are passed by", "flashu_ext/ops/layers.py", " and not module._forward_hooks", "", LAYERS),
    Mutant("layers: a forward of its own is passed by", "flashu_ext/ops/layers.py", "return own and module.bias", "return module.bias", LAYERS),
    Mutant("layers: what runs in place of an activation is passed by", "flashu_ext/ops/layers.py", "return known and _runs(module, kind.forward)", "return known", LAYERS),
    Mutant("layers: a quantised weight is read as it lies", "flashu_ext/ops/layers.py", "return type(weight) in (Tensor, nn.Parameter)", "return True", LAYERS),
    Mutant("layers: a subclass's forward is passed over", "flashu_ext/ops/layers.py", "return type(module).forward is not kind.forward", "return False", LAYERS),
    Mutant("layers: biases are passed by", "flashu_ext/ops/layers.py", " and module.bias is None", "", LAYERS),
    Mutant("layers: any activation is SiLU", "flashu_ext/ops/layers.py", "_is_silu(self.act_fn) and all", "all", LAYERS),
    # ---- the adapters
    Mutant("torch: rows of several strides are taken as they are", "csrc/torch/common.cpp", "return torch::stable::contiguous(tensor);", "return tensor;", contract("gathered_down")),
    Mutant("torch: a residual of several strides is refused", "csrc/torch/ffn.cpp", '  const OptionalTensor added = foldable(t.residual);', '  const OptionalTensor added = t.residual;', contract("gathered_ffn")),
    Mutant("torch: with out the residual is left out", "csrc/torch/ffn.cpp",
           '  run_ffn("gathered_ffn", {x, w_gate, w_up, w_down, residual}, {runs, index, listed, block}, std::nullopt,\n          out);\n  return out;\n}\n\nTensor gathered_ffn_norms', '  run_ffn("gathered_ffn", {x, w_gate, w_up, w_down, residual.has_value() ? OptionalTensor() : residual}, {runs, index, listed, block}, std::nullopt,\n          out);\n  return out;\n}\n\nTensor gathered_ffn_norms', contract("gathered_ffn")),
    Mutant("torch: the velocity is not passed on", "csrc/torch/step.cpp", 'view(op, "velocity", velocity);', 'velocity.has_value() ? flashu_tensor{} : view(op, "velocity", velocity);', contract("guided_euler")),
    Mutant("torch: importance of the first dimension's last", "csrc/torch/routing.cpp", "reduce == FLASHU_REDUCE_LAST ? 2\n", "reduce == FLASHU_REDUCE_LAST ? 1\n", contract("cosine")),
    Mutant("torch: capacity need not be the index's size", "csrc/torch/routing.cpp", "index.size(index.dim() - 1) == capacity,", "index.size(index.dim() - 1) >= capacity,", Pytest("python_tests/ops/test_routing.py", "-k", "capacity")),
    Mutant("torch: linear is given no bias", "csrc/torch/linear.cpp", 'args.scale = view(op, "scale", scale);\n  args.bias = view(op, "bias", bias);', 'args.scale = view(op, "scale", scale);\n  static_cast<void>(bias);', contract("linear")),
    Mutant("torch: attention is given no lengths", "csrc/torch/attention.cpp", 'args.lengths = view(op, "lengths", lengths);', 'static_cast<void>(lengths);', contract("attention")),
    Mutant("torch: eps is forgotten", "csrc/torch/norm.cpp", '  args.query_norm = view(op, "query_norm", query_norm);\n  args.key_norm = view(op, "key_norm", key_norm);\n  args.eps = eps;\n', '  args.query_norm = view(op, "query_norm", query_norm);\n  args.key_norm = view(op, "key_norm", key_norm);\n  args.eps = eps > 0 ? 1e-6 : 0;\n', Pytest("python_tests/ops/test_rotary.py", "-k", "norms")),
    Mutant("torch: both head norms are the query's", "csrc/torch/norm.cpp", 'view(op, "key_norm", key_norm);', 'view(op, "key_norm", key_norm.has_value() ? query_norm : key_norm);', contract("rotary")),
    Mutant("schema: the velocity is said to be read only", "csrc/torch/ops.cpp", '"Tensor(b!)? velocity=None) -> ()");', '"Tensor? velocity=None) -> ()");', contract("guided_euler")),
    Mutant("schema: norms are said to be read only", "csrc/torch/ops.cpp", "Tensor(a!) norms, ", "Tensor norms, ", contract("gathered_ffn")),
    # ---- plain torch, used without a kernel
    Mutant("reference: padding reads the first row", "flashu_ext/ops/reference.py", "rows.gather(-2, at).masked_fill((index < 0)[..., None], 0)", "rows.gather(-2, at)", contract("gather_rows")),
    Mutant("reference: the threshold is compared in fp64", "flashu_ext/ops/reference.py", "scores.float() >= torch.tensor(threshold, dtype=torch.float32, device=scores.device)", "scores.double() >= threshold", Pytest("python_tests/ops/test_routing.py", "-k", "threshold")),
    Mutant("reference: of equal scores any", "flashu_ext/ops/reference.py", "scores.argsort(dim=-1, descending=True, stable=True)", "scores.flip(-1).argsort(dim=-1, descending=True, stable=True).neg() + scores.shape[-1] - 1", Pytest("python_tests/ops/test_routing.py", "-k", "topk")),
    Mutant("reference: a slot behind the cache", "flashu_ext/ops/reference.py", "((token >= 0) & (token < n))", "((token >= 0) & (token <= n))", Pytest("python_tests/ops/test_rotary.py", "-k", "slots")),
]  # fmt: skip
