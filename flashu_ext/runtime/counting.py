"""Counts the launches of device work, and the operators that make the host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SYNCS", "Counts", "DispatchCounter"]

# Operators that copy a value from the device to the host: on a GPU each one drains the queue.
SYNCS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_consecutive", "_unique2")

# Operators that launch nothing: allocations and views.
_FREE = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
)

# This library's operators that launch more than one kernel (csrc/cuda): gate and up, then down.
_SEVERAL = {"gathered_ffn": 2}


@dataclass(frozen=True)
class Counts:
    """Launches by operator, and operators that made the host wait.

    A library's operator (a matrix product, an attention) counts as one launch, whatever it launches itself.
    """

    launches: Mapping[str, int] = field(default_factory=dict)
    syncs: Mapping[str, int] = field(default_factory=dict)

    @property
    def launched(self) -> int:
        return sum(self.launches.values())

    @property
    def synced(self) -> int:
        return sum(self.syncs.values())


class DispatchCounter(TorchDispatchMode):
    """Counts torch operators on any device while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: Counter[str] = Counter()
        self._syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in SYNCS or _leaves_device(name, args, kwargs or {}):
            self._syncs[name] += 1
        elif not func.is_view and name not in _FREE:
            self._launches[name] += _SEVERAL.get(name, 1)
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> Counts:
        return Counts(dict(self._launches), dict(self._syncs))


def _leaves_device(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a blocking copy ends on the CPU."""
    if name == "_to_copy":
        target = kwargs.get("device")
        return (
            target is not None
            and torch.device(target).type == "cpu"
            and args[0].device.type != "cpu"
            and not kwargs.get("non_blocking", False)
        )
    if name == "copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return blocking and isinstance(args[1], Tensor) and args[0].device.type == "cpu" != args[1].device.type
    return False
