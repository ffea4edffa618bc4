"""Shared by all op families: calls with translated errors, fake kernels, `is_supported`."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import autograd, native
from ._ops import NAMESPACE
from .autograd import named_tensors

native.load()
autograd.register()

torch_ops = getattr(torch.ops, NAMESPACE)
"""The operators as torch's dispatcher has them: torch.ops.flashu."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16)

# The library registers all ops for every device that it was built for.
DEVICES = (
    ("cpu", "cuda") if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::rms_norm", "CUDA") else ("cpu",)
)

_KNOWN = (*FLOATING, torch.float64, torch.int32, torch.int64, torch.int8, torch.bool)
"""Dtypes that the adapters know; the kernels say themselves which of them they take."""

_OTHER_DTYPES = {
    "acc": "float32 or float64",
    "count": "int32",
    "index": "int64",
    "lengths": "int64",
    "list": "int32",
    "norms": "float32 or float64",
    **dict.fromkeys(("scale", "gate_scale", "up_scale", "down_scale"), "float32"),
    "start": "int64",
    "step": "int64",
}

F = TypeVar("F", bound=Callable[..., Any])


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a torch.ops.flashu overload; failed C++ checks raise ValueError, TypeError, IndexError or NotImplementedError.

    Arguments that torch's dispatcher or its stable ABI refuses are looked for only once they have been refused, so that a
    call that is right pays nothing.
    """
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        named = _misfit(op._schema, args, kwargs) or native.translate(error)
        if named is error:
            raise
        raise named from None


def _misfit(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """The error for the first argument of a kind that no kernel takes; None if there is none."""
    given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
    for argument in schema.arguments:
        kind, value = str(argument.type), given.get(argument.name, argument.default_value)
        name = f"{schema.name.partition('::')[2]}: {argument.name}"
        where = f"{name}: expected"
        if kind in ("Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]"):
            entries = {name: value}
            if kind.startswith("List"):
                if not isinstance(value, (list, tuple)):
                    return TypeError(f"{where} a list of tensors, got {type(value).__name__}")
                entries = {f"{name}[{i}]": entry for i, entry in enumerate(value)}
            for place, entry in entries.items():
                if entry is None and "Optional" in kind:
                    continue
                error = _tensor_misfit(place, entry, argument)
                if error is not None:
                    return error
        elif kind == "int" and not hasattr(value, "__index__"):
            return TypeError(f"{where} an integer, got {type(value).__name__}")
        elif kind == "int" and not fits_int64(value):
            return ValueError(f"{where} an integer of 64 bits, got one of {int(value).bit_length()}")
        elif kind == "float" and not isinstance(value, numbers.Real):
            return TypeError(f"{where} a number, got {type(value).__name__}")
    return None


def _tensor_misfit(place: str, value: Any, argument: Any) -> Exception | None:
    where = f"{place}: expected"
    if not isinstance(value, Tensor):
        return TypeError(f"{where} a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        return TypeError(f"{where} a dense tensor, got {layout}")
    if value.dtype not in _KNOWN:
        return TypeError(f"{where} {_dtypes(place, argument)}, got {str(value.dtype).removeprefix('torch.')}")
    return None


def _dtypes(place: str, argument: Any) -> str:
    """The dtypes of an argument in words."""
    if place.startswith("int8_") and argument.name.startswith("w"):
        return "int8"
    if argument.name == "index" and argument.alias_info is None:
        return "int32 or int64"
    return _OTHER_DTYPES.get(argument.name, "float32, bfloat16 or float16")


def fits_int64(number: Any) -> bool:
    return -(2**63) <= number < 2**63


def call_into(packet: Any, *args: Any, out: Tensor | None, **kwargs: Any) -> Tensor:
    """Call `packet.default`, or `packet.out` if `out` is given.

    torch.compile cannot trace a custom operator that returns its own argument, so under it `out` is filled by a copy.
    """
    if out is None:
        return call(packet.default, *args, **kwargs)
    if torch.compiler.is_compiling():
        made = packet.default(*args, **kwargs)
        if out.dtype != made.dtype:  # a copy would convert and spread
            raise TypeError(f"out: expected {made.dtype}, got {out.dtype}")
        if out.shape != made.shape:
            raise ValueError(f"out: expected shape {list(made.shape)}, got {list(out.shape)}")
        return out.copy_(made)
    return call(packet.out, *args, out=out, **kwargs)


def flatten(name: str, numbers: Any, group: int) -> list[int]:
    """A flat list of integers from a flat sequence or from tuples of `group` integers, a tensor or an array.

    Raises:
        ValueError: a tuple has another length.
        TypeError: nothing that can be iterated, or an entry is neither an integer nor a tuple of integers.
        IndexError: a number needs more than 64 bits.
    """
    expected = f"{name}: expected integers or tuples of {group} integers"
    entries = _plain(numbers)
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise TypeError(f"{expected}, got {type(entries).__name__}")
    flat: list[int] = []
    for entry in map(_plain, entries):
        own = entry if isinstance(entry, (tuple, list)) else (entry,)
        if own is entry and len(own) != group:
            raise ValueError(f"{name}: expected tuples of {group} numbers, got one of {len(own)}")
        for number in map(_plain, own):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{expected}, got {type(number).__name__}")
            if not fits_int64(number):
                raise IndexError(f"{name}: expected integers of 64 bits, got one of {number.bit_length()}")
            flat.append(number)
    return flat


def _plain(value: Any) -> Any:
    """Tensors, arrays and their numbers as lists and numbers of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def fake(name: str) -> Callable[[F], F]:
    """Register the fake kernel of the op `name`; it checks that all tensors are on one device.

    Torch also runs fake kernels when only some arguments are meta tensors. Shapes and dtypes are checked by the real kernel.
    """
    op = name.split(".")[0]

    def decorate(function: F) -> F:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = named_tensors([*names[: len(args)], *kwargs], [*args, *kwargs.values()])
            first = next(given, None)
            for argument, value in given:
                if first is not None and value.device != first[1].device:
                    raise ValueError(
                        f"{op}: {argument}: expected device {first[1].device} as {first[0]} has, got {value.device}"
                    )
            return function(*args, **kwargs)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked)
        return function

    return decorate


def fake_out(name: str, function: Callable[..., Any]) -> None:
    """Register the fake kernel of `{name}.out`, which returns `out`.

    Args:
        function: the fake kernel of the overload without `out`.
    """

    @fake(f"{name}.out")
    @functools.wraps(function)
    def into(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        return out


def capability(
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    devices: tuple[str, ...] = DEVICES,
    shape: Callable[[Any], bool] | None = None,
) -> Callable[[F], F]:
    """Add `is_supported(device, dtype, shape=None) -> bool` to an op's function: whether a kernel exists."""

    def decorate(function: F) -> F:
        def is_supported(device: torch.device | str, dtype: torch.dtype, shape_: tuple[int, ...] | None = None) -> bool:
            fits = shape is None or shape_ is None or shape(shape_)
            return torch.device(device).type in devices and dtype in dtypes and fits

        function.is_supported = is_supported  # type: ignore[attr-defined]
        return function

    return decorate
