"""What autograd meets in front of every kernel. No op has a gradient, and none is lost silently.

- An op that writes nothing takes tensors that require grad; its backward raises.
- An op that writes, in place or into `out`, raises where any argument requires grad, before it writes. Otherwise it
  counts up the versions of what it wrote: a backward that has saved such a tensor raises torch's own error.
- Both raise in the transforms of torch.func and where an argument carries a forward-mode tangent.

Torch's dispatcher calls these functions, so direct calls of torch.ops.flashu.* and torch.compile meet them too.
Under torch.no_grad() and torch.inference_mode() nothing requires grad, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch._C import _after_ADInplaceOrView_keyset as below_inplace
from torch._C import _after_autograd_keyset as below_autograd
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _increment_version as increment_version
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ._ops import NAMESPACE

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # what it registers lasts as long as it does


def register() -> None:
    """Registers them for every op of the loaded library."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == NAMESPACE:
            packet, _, overload = op.partition(".")
            _register(getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default"))


def _register(op: OpOverload) -> None:
    if op._schema.is_mutable:
        # Not Autograd: inference tensors pass it by, and outside of inference mode they may not be written.
        _library.impl(op.name(), _writing(op), "ADInplaceOrView", with_keyset=True)
    else:
        _library.impl(op.name(), _functional(op), "Autograd", with_keyset=True)
    _library.impl(op.name(), _transformed(op), "FuncTorchDynamicLayerFrontMode")


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Dynamo from compiling what the dispatcher calls; costs nothing at a call, unlike torch.compiler.disable."""
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP  # the frame and what it calls
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    return function


def _functional(op: OpOverload) -> Callable[..., Any]:
    redispatch = op._handle.redispatch_boxed

    @_untraced
    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args, {})
        if is_grad_enabled() and any_requires_grad(*args):
            return _NoBackward.apply(op, keyset & below_autograd, args, *(t for _, t in _tensors(op, args, {})))
        return redispatch(keyset & below_autograd, *args)

    return kernel


class _NoBackward(torch.autograd.Function):
    @staticmethod
    @_untraced
    def forward(ctx: Any, op: OpOverload, keyset: Any, args: tuple[Any, ...], *_: Tensor) -> Any:
        ctx.op = op  # the tensors come by themselves too: torch does not look into lists
        return op.redispatch(keyset, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.op.name()} has no backward: it is for inference; call it under torch.no_grad()"
        )


def _writing(op: OpOverload) -> Callable[..., Any]:
    redispatch = op._handle.redispatch_boxed
    places = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and not a.kwarg_only]

    @_untraced
    def kernel(keyset: Any, *args: Any, **outputs: Any) -> Any:  # no op has other keyword-only arguments
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args, outputs)
        if is_grad_enabled() and any_requires_grad(*args, **outputs):
            _refuse_gradients(op, args, outputs)
        # The dispatcher leaves out trailing arguments that have their defaults.
        written = [args[i] for i in places if i < len(args) and args[i] is not None]
        written += outputs.values()
        if not is_inference_mode_enabled():
            for tensor in written:
                if tensor.is_inference():
                    _refuse_inference_tensor(op, tensor, args, outputs)
        result = redispatch(keyset & below_inplace, *args, **outputs)
        increment_version(written)
        return result

    return kernel


def _transformed(op: OpOverload) -> Callable[..., Any]:
    @_untraced
    def kernel(*args: Any, **outputs: Any) -> Any:
        raise NotImplementedError(
            f"{op.name()}: expected a call outside of torch.func's transforms (grad, vjp, jvp, vmap and so on), got one"
            " inside: it has neither a derivative nor a batching rule"
        )

    return kernel


def _refuse_gradients(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> None:
    name, tensor = next((n, t) for n, t in _tensors(op, args, outputs) if t.requires_grad)
    raise NotImplementedError(
        f"{op.name()}: {name}: expected a tensor that does not require grad, as the op writes and has no backward, got"
        f" {'a leaf' if tensor.is_leaf else 'a result'} that requires grad; call it under torch.no_grad()"
    )


def _refuse_tangents(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> None:
    for name, tensor in _tensors(op, args, outputs):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op.name()}: {name}: expected a tensor without a tangent, as the op has no forward-mode derivative,"
                " got a dual tensor"
            )


def _refuse_inference_tensor(op: OpOverload, written: Tensor, args: tuple[Any, ...], outputs: dict[str, Any]) -> None:
    name = next(n for n, t in _tensors(op, args, outputs) if t is written)
    raise RuntimeError(
        f"{op.name()}: {name}: expected an ordinary tensor to write into outside of torch.inference_mode(), got an"
        " inference tensor"
    )


def named_tensors(names: Iterable[str], values: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among arguments, those in lists too, with the names that errors give them."""
    for name, value in zip(names, values, strict=False):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from named_tensors([f"{name}[{i}]" for i in range(len(value))], value)


def _tensors(op: OpOverload, args: tuple[Any, ...], outputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a call with the names of their arguments."""
    names = [argument.name for argument in op._schema.arguments]
    yield from named_tensors([*names[: len(args)], *outputs], [*args, *outputs.values()])
