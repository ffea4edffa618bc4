"""A stand-in for CUDA graphs on the CPU, equally strict: a replay runs the recorded operators on
the recorded memory and numbers, whatever the Python code would do now."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flashu_ext.runtime.counting import SYNCS


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in SYNCS:
            raise RuntimeError(f"{name} brings a value to the host; a capture cannot do that")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._about_to_write(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._about_to_write(argument, kwargs[argument.name])
        out = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in outs:
            where = tensor.untyped_storage().data_ptr()
            if where not in known:
                self.made[where] = tensor
        self.tape.append((func, *tree_map(_where_it_is, (args, kwargs)), outs))
        return out

    def _about_to_write(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
            where = tensor.untyped_storage().data_ptr()
            if where not in self.made and where not in self.before:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.before[where] = (whole, whole.clone())


def _where_it_is(value: Any) -> Any:
    """A weight as the memory that it lies in now: `weight.data = ...` moves the parameter, not what a graph reads."""
    return value.detach() if isinstance(value, nn.Parameter) else value


READ_METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextlib.contextmanager
def no_reads(methods: Sequence[str] = READ_METHODS) -> Iterator[None]:
    """Fails if the host reads a value without an operator, as it can on a CPU."""
    originals = {name: getattr(torch.Tensor, name) for name in methods}

    def refuse(name: str) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"Tensor.{name} brings a value to the host")

        return method

    for name in methods:
        setattr(torch.Tensor, name, refuse(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


class TapeCapture:
    """Captures like CUDA graphs: capturing runs nothing, and memory that the work allocates holds NaN."""

    def __call__(self, work: Callable[[], Any]) -> Callable[[], None]:
        with torch.no_grad(), no_reads(), _Recorder() as recorder:
            work()
        for whole, values in recorder.before.values():
            whole.copy_(values)
        for tensor in recorder.made.values():
            if tensor.is_floating_point():
                torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(float("nan"))
        return lambda: _replay(recorder.tape)


@torch.inference_mode()
def _replay(tape: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
    for func, args, kwargs, outs in tape:
        again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for held, new in zip(outs, again, strict=True):
            if held.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                held.copy_(new)


def capturing(handle: Any, capture: Any = TapeCapture) -> Any:
    """Makes a handle on the CPU capture work as on a GPU."""
    handle.runner.capture.make = capture
    return handle
