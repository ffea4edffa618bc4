"""Computes one permutation of an FFN's neurons for the sets of several tasks, and the runs that each task reads.

An FFN computes the same function when its neurons are permuted (rows of W_gate and W_up, columns of W_down). Ordered
once as [first task only | both | second task only | neither], the first two tasks' sets are one contiguous range each,
so one weight copy serves every task through views. Further tasks get a list of runs in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NeuronLayout", "Runs", "ffn_weights", "runs_of"]

Runs = tuple[tuple[int, int], ...]
"""Runs of neurons as (start, length), ascending and disjoint."""


def ffn_weights(ffn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of gate, up and down projection, [I, hidden], [I, hidden] and [hidden, I]."""
    return ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight


def runs_of(sorted_index: Tensor) -> Runs:
    """Runs (start, length) of ascending, distinct indices [n]."""
    if sorted_index.numel() == 0:
        return ()
    breaks = torch.nonzero(sorted_index[1:] - sorted_index[:-1] != 1).flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), sorted_index.numel()]
    return tuple((int(sorted_index[start]), end - start) for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class NeuronLayout:
    """One FFN's neurons in plan order.

    Attributes:
        intermediate: number of neurons I.
        permutation: int32 [I]; position p of the permuted weights holds the original neuron permutation[p].
        runs: for each task the runs of positions that hold its set.
    """

    intermediate: int
    permutation: Tensor
    runs: Mapping[str, Runs]

    @classmethod
    def build(cls, intermediate: int, sets: Mapping[str, Tensor]) -> NeuronLayout:
        """Lay out `sets` (task -> neuron indices, any order, no repeats). The first two tasks become one run each.

        Raises:
            ValueError: an index repeats.
            IndexError: an index is outside [0, intermediate).
        """
        members: dict[str, Tensor] = {}
        for task, index in sets.items():
            index = index.detach().to("cpu", torch.int64).flatten()
            outside = index[(index < 0) | (index >= intermediate)]
            if outside.numel():
                raise IndexError(
                    f"sets[{task!r}]: expected neuron indices in [0, {intermediate}), got {int(outside[0])}"
                )
            mask = torch.zeros(intermediate, dtype=torch.bool, device="cpu")
            mask[index] = True
            if int(mask.sum()) != index.numel():
                raise ValueError(
                    f"sets[{task!r}]: expected distinct neurons, got {index.numel() - int(mask.sum())} repeats"
                )
            members[task] = mask
        tasks = list(members)
        empty = torch.zeros(intermediate, dtype=torch.bool, device="cpu")
        first = members[tasks[0]] if tasks else empty
        second = members[tasks[1]] if len(tasks) > 1 else empty
        # Group 0 first only, 1 both, 2 second only, 3 neither: [0, 1] and [1, 2] are then adjacent groups.
        group = torch.where(first, torch.where(second, 1, 0), torch.where(second, 2, 3))
        # Within a group, neurons of the same further tasks are adjacent, so that those tasks have few runs.
        key = group
        for task in tasks[2:]:
            key = key * 2 + (~members[task]).long()
        permutation = torch.argsort(key, stable=True)
        runs = {task: runs_of(torch.nonzero(mask[permutation]).flatten()) for task, mask in members.items()}
        return cls(intermediate, permutation.to(torch.int32), runs)

    @property
    def inverse(self) -> Tensor:
        """int32 [I]: position of every original neuron."""
        return torch.argsort(self.permutation).to(torch.int32)

    def in_place(self) -> NeuronLayout:
        """The same sets in the model's own order: for weights that may not be moved. They have more runs."""
        order = torch.arange(self.intermediate, dtype=torch.int32, device="cpu")
        return NeuronLayout(self.intermediate, order, {task: runs_of(self.kept(task)) for task in self.runs})

    def kept(self, task: str) -> Tensor:
        """A task's neurons by their original indices, ascending, int64 [n]."""
        positions = [torch.arange(start, start + length, device="cpu") for start, length in self.runs[task]]
        return (
            self.permutation[torch.cat(positions)].long().sort().values
            if positions
            else torch.empty(0, dtype=torch.int64, device="cpu")
        )
