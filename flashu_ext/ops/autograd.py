"""What autograd meets in front of every kernel. No op has a gradient, and none is lost silently.

- An op that writes nothing takes tensors that require grad; its backward raises.
- An op that writes, in place or into `out`, raises where any argument requires grad, before it writes. Otherwise it
  counts up the versions of what it wrote: a backward that has saved such a tensor raises torch's own error.
- Both raise in the transforms of torch.func and where an argument carries a forward-mode tangent.

Torch's dispatcher calls these functions, so direct calls of torch.ops.flashu.* and torch.compile meet them too.
Under torch.no_grad() and torch.inference_mode() nothing requires grad, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

_library = torch.library.Library("flashu", "FRAGMENT")  # what it registers lasts as long as it does


def register() -> None:
    """Registers them for every op of the loaded library."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("flashu::"):
            packet, _, overload = name.removeprefix("flashu::").partition(".")
            _register(getattr(getattr(torch.ops.flashu, packet), overload or "default"))


def _register(op: OpOverload) -> None:
    if op._schema.is_mutable:
        # Not Autograd, which inference tensors pass by: outside of inference mode ADInplaceOrView sees them too.
        _library.impl(op.name(), _writing(op), "ADInplaceOrView", with_keyset=True)
    else:
        _library.impl(op.name(), _functional(op), "Autograd", with_keyset=True)
    _library.impl(op.name(), _transformed(op), "FuncTorchDynamicLayerFrontMode")


def _functional(op: OpOverload) -> Callable[..., Any]:
    redispatch, below = op.redispatch, torch._C._after_autograd_keyset

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args, {})
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _NoBackward.apply(op, keyset & below, *args)
        return redispatch(keyset & below, *args)

    return kernel


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: OpOverload, keyset: Any, *args: Any) -> Any:
        ctx.op = op
        return op.redispatch(keyset, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{ctx.op.name()} has no backward: it is for inference; call it under torch.no_grad()")


def _writing(op: OpOverload) -> Callable[..., Any]:
    redispatch, below = op.redispatch, torch._C._after_ADInplaceOrView_keyset
    places = [i for i, a in enumerate(op._schema.arguments) if a.is_write and not a.kwarg_only]

    def kernel(keyset: Any, *args: Any, **outputs: Any) -> Any:  # our only keyword-only arguments are outputs
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args, outputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **outputs):
            _refuse_gradients(op, args, outputs)
        # The dispatcher leaves out trailing arguments that have their defaults.
        written = [args[i] for i in places if i < len(args) and args[i] is not None]
        written += outputs.values()
        if not torch.is_inference_mode_enabled() and any(map(torch.is_inference, written)):
            _refuse_inference_tensors(op, args, outputs)
        result = redispatch(keyset & below, *args, **outputs)
        torch._C._increment_version(written)
        return result

    return kernel


def _transformed(op: OpOverload) -> Callable[..., Any]:
    def kernel(*args: Any, **outputs: Any) -> Any:
        raise NotImplementedError(
            f"{op.name()}: expected a call outside of torch.func's transforms (grad, vjp, jvp, vmap and so on), got one"
            " inside: it has neither a derivative nor a batching rule"
        )

    return kernel


def _refuse_gradients(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> None:
    for name, tensor in _named(op, args, outputs):
        if tensor.requires_grad:
            raise NotImplementedError(
                f"{op.name()}: {name}: expected a tensor that does not require grad, as the op writes and has no backward,"
                f" got {'a leaf' if tensor.is_leaf else 'a result'} that requires grad; call it under torch.no_grad()"
            )


def _refuse_tangents(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> None:
    if not torch._C._is_fwd_grad_enabled():
        return
    for name, tensor in _named(op, args, outputs):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op.name()}: {name}: expected a tensor without a tangent, as the op has no forward-mode derivative,"
                " got a dual tensor"
            )


def _refuse_inference_tensors(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> None:
    for name, tensor in _named(op, args, outputs):
        if name in {a.name for a in op._schema.arguments if a.is_write} and tensor.is_inference():
            raise RuntimeError(
                f"{op.name()}: {name}: expected an ordinary tensor to write into outside of torch.inference_mode(),"
                " got an inference tensor"
            )


def _named(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors of a call with the names of their arguments."""
    names = [a.name for a in op._schema.arguments]
    return [(n, v) for n, v in (*zip(names, args, strict=False), *outputs.items()) if isinstance(v, Tensor)]
