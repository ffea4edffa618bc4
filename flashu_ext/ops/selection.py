"""A validated selection of an FFN's neurons, made once for many calls."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import call, flatten, torch_ops

__all__ = ["Selection"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Validated neurons of an FFN in the kernels' format; a copy, independent of its source.

    Attributes:
        limit: neurons of the FFN.
        count: neurons selected, n; the columns of h have their order.
        runs: [start, count] if they are one range (empty: none selected), else None.
        list: int32 [n], on the device of the weights; None for a range.
        block: the list consists of groups of so many consecutive neurons (64, 8 or 1) that begin at multiples of eight.
    """

    limit: int
    count: int
    runs: list[int] | None
    list: Tensor | None
    block: int

    @classmethod
    def from_runs(cls, runs: Any, limit: int, device: torch.device | str = "cpu") -> Selection:
        """From runs (start, length), also flat or as a tensor or array: ascending and disjoint, lengths at least 1.

        Args:
            limit: neurons of the FFN.
            device: of its weights.

        Raises:
            IndexError: a run is empty, out of range, or begins before the previous one ends.
            ValueError, TypeError: not pairs of integers.
        """
        flat = flatten("runs", runs, 2)
        return cls._resolved(sum(max(0, length) for length in flat[1::2]), limit, device, runs=flat)

    @classmethod
    def from_index(
        cls, index: Tensor | Sequence[int] | Any, limit: int, device: torch.device | str | None = None
    ) -> Selection:
        """From neuron numbers [n] in any order, each at most once.

        Args:
            limit: neurons of the FFN.
            device: of its weights; None: the index tensor's.

        Raises:
            IndexError: a number is out of range or repeated.
            TypeError: not int32 or int64.
            ValueError: not one dimension.
        """
        numbers = index_tensor(index)
        device = numbers.device if device is None else device
        return cls._resolved(numbers.numel(), limit, device, index=numbers.detach().cpu())

    @classmethod
    def _resolved(cls, count: int, limit: int, device: torch.device | str, **neurons: Any) -> Selection:
        if isinstance(limit, bool) or not hasattr(limit, "__index__"):
            raise TypeError(f"limit: expected an integer, got {type(limit).__name__}")
        limit = operator.index(limit)
        numbers = torch.empty(min(count, max(limit, 0)), dtype=torch.int32, device="cpu")
        block = call(torch_ops.list_neurons.default, numbers, limit, **neurons)
        if count == 0:
            return cls(limit, 0, [], None, 1)
        first = int(numbers[0])
        if torch.equal(numbers, torch.arange(first, first + count, dtype=torch.int32, device="cpu")):
            return cls(limit, count, [first, count], None, 1)
        return cls(limit, count, None, numbers.to(device), block)

    def to(self, device: torch.device | str) -> Selection:
        """The same neurons for weights on another device."""
        if self.list is None or self.list.device == torch.device(device):
            return self
        return dataclasses.replace(self, list=self.list.to(device))


def index_tensor(index: Any, like: Any = None) -> Tensor:
    """Numbers of neurons or rows as a tensor; a list or array is put on the device of the tensor `like`, or on the CPU.

    Raises:
        TypeError: a bool mask, or not integers.
    """
    numbers = index if isinstance(index, Tensor) else _as_tensor(index, getattr(like, "device", "cpu"))
    if numbers.dtype == torch.bool:
        raise TypeError("index: expected int32 or int64 numbers, got a bool mask (mask.nonzero().flatten() has them)")
    return numbers


def _as_tensor(index: Any, device: torch.device | str) -> Tensor:
    try:
        numbers = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"index: expected a tensor or a list of integers, got {type(index).__name__}") from error
    return numbers.to(torch.int64) if numbers.numel() == 0 else numbers
