"""Computes one permutation of an FFN's neurons for the sets of several tasks, and the runs that each task reads.

An FFN computes the same function when its neurons are permuted (rows of W_gate and W_up, columns of W_down). Ordered
once as [first task only | both | second task only | neither], the first two tasks' sets are one contiguous range each,
so one weight copy serves every task through views. Further tasks get a list of runs in the same order.

GPU kernels read neurons by whole tiles, so `aligned_sets` chooses sets whose runs start and end at multiples of 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NeuronLayout", "Runs", "aligned_sets", "ffn_weights", "runs_of"]

TILE = 64
"""Runs start and end at multiples of this where kept counts are multiples of it."""

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


def aligned_sets(scores: Mapping[str, Tensor], count: int, multiple: int) -> dict[str, Tensor]:
    """Each task's `count` best neurons, with borderline ones exchanged so that runs start and end at multiples of a unit.

    The unit is gcd(multiple, 64); where `count` is no multiple of it, nothing is exchanged. The first task's set is always
    its best. A layout orders neurons in blocks by the tasks that share them. Of each block a further task takes a multiple
    of the unit: the nearest one to what its best would be, up or down by at most half a unit where the total allows it,
    and always the block's best. So the second task, which meets two blocks, exchanges at most unit / 2 neurons, the third
    unit, the fourth 2 units, if the number of neurons is a multiple of the unit too. Otherwise the last block, of neurons
    that no task keeps, cannot be taken whole, and the bounds are twice as large.

    Args:
        scores: task -> fp [neurons], larger is better; of equal scores the lower index is.
        count: neurons of each set, at most all.
        multiple: kept counts are rounded to it.

    Returns:
        task -> ascending int64 [count].
    """
    unit = math.gcd(multiple, TILE)
    if count % unit:
        unit = 1
    sets: dict[str, Tensor] = {}
    block: Tensor | None = None
    for task, score in scores.items():
        order = torch.sort(score, descending=True, stable=True).indices
        if block is None:
            block = torch.zeros_like(order)
        place = block[order]  # the block of every neuron, best first
        wanted = torch.bincount(place[:count], minlength=int(block.max()) + 1).tolist()
        sizes = torch.bincount(place).tolist()
        taken = [order[place == b][:n] for b, n in enumerate(_whole_units(wanted, sizes, unit))]
        sets[task] = torch.cat(taken).sort().values
        member = torch.zeros_like(block)
        member[sets[task]] = 1
        block = 2 * block + member
    return sets


def _whole_units(wanted: list[int], sizes: list[int], unit: int) -> list[int]:
    """Multiples of `unit` near `wanted`, of the same sum (a multiple too), none above its size; of equal ones the first."""
    counts = [n // unit * unit for n in wanted]
    while sum(counts) < sum(wanted):
        open_blocks = [b for b, size in enumerate(sizes) if counts[b] + unit <= size]
        counts[max(open_blocks, key=lambda b: wanted[b] - counts[b])] += unit
    return counts


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
