"""What every op family shares: calling with translated errors, capability, and a backward that refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flashu_ext import _native

_native.load()

FLOATING = (torch.float32, torch.bfloat16, torch.float16)

F = TypeVar("F", bound=Callable[..., Any])


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a torch.ops.flashu overload; a failed C++ check arrives as ValueError, TypeError, IndexError or
    NotImplementedError with the text of the check."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        translated = _native.translate(error)
        if translated is error:
            raise
        raise translated from None


def refuse_backward(name: str) -> None:
    """Gives the functional op `flashu::name` a backward that raises, so that no gradient is lost silently."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"flashu::{name} has no backward: it is for inference; call it under torch.no_grad()")

    torch.library.register_autograd(f"flashu::{name}", backward)


def capability(
    dtypes: tuple[torch.dtype, ...] = FLOATING, devices: tuple[str, ...] = ("cpu",), shape: Callable[[Any], bool] | None = None
) -> Callable[[F], F]:
    """Adds `is_supported(device, dtype, shape=None) -> bool` to an op's function: which calls have a kernel."""

    def decorate(function: F) -> F:
        def is_supported(device: torch.device | str, dtype: torch.dtype, shape_: tuple[int, ...] | None = None) -> bool:
            fits = shape is None or shape_ is None or shape(shape_)
            return torch.device(device).type in devices and dtype in dtypes and fits

        function.is_supported = is_supported  # type: ignore[attr-defined]
        return function

    return decorate
