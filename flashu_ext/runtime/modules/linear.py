"""Linear layers of the model as the runtime runs them: on the kernel, fused with what follows, or as the modules themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...models.int8 import int8_of
from ...models.known import (
    epilogue_of,
    why_not_activation,
    why_not_chain,
    why_not_linear,
    why_not_norm,
)
from ...models.lora import BASE, Update, base_of, is_lora, names_of, updates_of
from ...ops.kernel_sets import ONE_BY_ONE, KernelSet
from ...ops.reference import finish_linear
from .adapters import AdapterRows, RowAdapters
from .norm import Norm

__all__ = ["Chain", "Linear", "Linears", "Unknown", "add_product"]


class Linear:
    """Attributes:
    module: the model's own.
    base: itself, or what LoRA adapters are beside.
    why_itself: why the kernel does not compute this module, which is then called as it is; or None. Rows that name an
        adapter are computed beside the base all the same, where the kernel can.
    """

    def __init__(self, module: Any, kernels: KernelSet, like: Tensor, rows: RowAdapters | None = None):
        """Args:
        like: a weight of the model, for dtype and device.
        rows: the network's; None: all rows are of what is active.
        """
        self.module = module
        self.base = base_of(module)
        self.why_itself = why_not_linear(module, like)
        self._kernels = kernels
        self._rows = rows or RowAdapters()
        adapters = (None, BASE, *names_of(module)) if is_lora(module) else (None,)
        self._updates: dict[str | None, tuple[Update, ...]] = {
            adapter: updates_of(module, adapter)
            for adapter in adapters
            if why_not_linear(module, like, adapter) is None
        }
        self._beside = any(self._updates.values())
        self._int8 = int8_of(self.base.weight) if self.why_itself is None else None
        if self._int8 is not None and kernels.chosen["linear"] != "flashu":
            self.why_itself = (
                "its weight is int8, which only the kernel reads that FlashUConfig.linear_kernels turns off"
            )

    @property
    def plain(self) -> bool:
        """Whether the base is one that `linears` takes."""
        return self.why_itself is None and self._int8 is None

    def __call__(self, x: Tensor, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]: the layer, an activation (`ops.linear`), plus `residual` of that shape where given."""
        if self.why_itself is None:
            return self._computed(x, epilogue, residual, self._rows.groups(x) if self._beside else ())

        def own(adapter: str | None, x: Tensor, residual: Tensor | None) -> Tensor:
            if adapter is not None:  # which is refused where this layer has it and cannot add it
                return self._computed(x, epilogue, residual, (AdapterRows(adapter),))
            return finish_linear(self.module(x), residual, epilogue)

        return self._rows.each(own, x, residual) if is_lora(self.module) else own(None, x, residual)

    def _computed(self, x: Tensor, epilogue: str, residual: Tensor | None, groups: tuple[AdapterRows, ...]) -> Tensor:
        # A module that runs as itself may give columns side by side in memory.
        x, residual = _in_rows(x), None if residual is None else _in_rows(residual)
        if not self._beside:
            return self._of_base(x, residual, epilogue)
        if epilogue == "none":
            return self._updated(x, self._of_base(x, residual), groups)
        # The activation is of the sum; also in rows to which nothing is added, so that they share the call.
        y = self._updated(x, self._of_base(x), groups)
        y = _by_rows(functools.partial(finish_linear, residual=None, epilogue=epilogue), y)
        return y if residual is None else y + residual

    def _of_base(self, x: Tensor, residual: Tensor | None = None, epilogue: str = "none") -> Tensor:
        if self._int8 is not None:
            return ops.int8_linear(x, self._int8.values, self._int8.scale, self.base.bias, residual, epilogue)
        return self._kernels.linear(x, self.base.weight, self.base.bias, residual, epilogue)

    def updated(self, x: Tensor, y: Tensor) -> Tensor:
        """y [rows, ..., N], which the base gave for x and which may be written to, plus what each row's adapters add."""
        return self._updated(x, y, self._rows.groups(x)) if self._beside else y

    def _updated(self, x: Tensor, y: Tensor, groups: tuple[AdapterRows, ...]) -> Tensor:
        for rows in groups:
            if updates := self._updates.get(rows.adapter):
                y = rows.put(add_updates(self._kernels, updates, rows.take(x), rows.take(y)), y)
        return y


def add_updates(kernels: KernelSet, updates: Sequence[Update], x: Tensor, y: Tensor) -> Tensor:
    """y [..., N] plus scaling B A x of each update, in the dtype of its weights; x [..., K] -> [..., N]."""
    dtype = y.dtype
    for update in updates:
        low = kernels.linear(x.to(update.down.weight.dtype), update.down.weight)
        y = add_product(kernels, low * update.scaling, update.up.weight, y)
    return y.to(dtype)


def add_product(kernels: KernelSet, low: Tensor, weight: Tensor, y: Tensor | None) -> Tensor:
    """low [..., r] times weight [N, r] plus y [..., N], in the wider of their dtypes."""
    if y is None or torch.promote_types(low.dtype, y.dtype) == low.dtype:
        return kernels.linear(low, weight, None, None if y is None else y.to(low.dtype))
    return y + kernels.linear(low, weight)


class Linears:
    """Linear layers of the same input, such as the projections to queries, keys and values: one call where all are on the
    kernel."""

    def __init__(self, layers: Sequence[Linear], kernels: KernelSet):
        self.layers = layers
        self._kernels = kernels
        self._together = kernels.chosen["linears"] != ONE_BY_ONE and all(layer.plain for layer in layers)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., K] -> [..., N] of every layer; they may be columns of one tensor."""
        if not self._together:
            return [layer(x) for layer in self.layers]
        x, weights = _in_rows(x), [layer.base.weight for layer in self.layers]
        out = self._kernels.linears(x, weights, [layer.base.bias for layer in self.layers])
        parts = out.split([weight.shape[0] for weight in weights], dim=-1)
        return [layer.updated(x, part) for layer, part in zip(self.layers, parts, strict=True)]


@dataclass(frozen=True)
class Unknown:
    """A member of a Sequential that the runtime does not know, or must not pass over."""

    module: Any
    why_itself: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


class Chain:
    """A Sequential, of which every activation after a linear layer is part of that layer's call.

    Attributes:
        module: the model's own.
        why_itself: why it is called as it is, or None.
        members: those that may have reasons of their own.
    """

    def __init__(self, module: Any, kernels: KernelSet, like: Tensor, rows: RowAdapters):
        self.module = module
        self.why_itself = why_not_chain(module)
        self.members: list[Linear | Norm | Unknown] = []
        own = kernels, like, rows
        self._calls = [module] if self.why_itself is not None else list(self._fused(list(module), *own))

    def _fused(
        self, modules: list[Any], kernels: KernelSet, like: Tensor, rows: RowAdapters
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        while modules:
            module = modules.pop(0)
            if epilogue_of(module) is not None:
                yield functools.partial(_by_rows, module)
                continue
            if isinstance(module, nn.Linear) or is_lora(module):
                linear = Linear(module, kernels, like, rows)
                self.members.append(linear)
                epilogue = epilogue_of(modules[0]) if modules else None
                if epilogue is not None:
                    modules.pop(0)
                yield functools.partial(linear, epilogue=epilogue or "none")
                continue
            if type(module).__name__ == "RMSNorm":
                self.members.append(Norm(module, kernels, why_not_norm(module, like)))
            else:
                self.members.append(Unknown(module, why_not_activation(module)))
            yield self.members[-1]

    def __call__(self, x: Tensor) -> Tensor:
        for call in self._calls:
            x = call(x)
        return x


def _by_rows(activation: Any, x: Tensor) -> Tensor:
    """An activation of x [rows, width], one row at a time: torch computes a tensor's last elements, and those at the end of a
    thread's share, by another function, so bits would depend on the number of rows."""
    return torch.stack([activation(row) for row in x]) if x.device.type == "cpu" and len(x) else activation(x)


def _in_rows(x: Tensor) -> Tensor:
    """The same numbers with neighbours of a row side by side, as the kernels read them."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()
