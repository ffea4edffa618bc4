"""Memory for the keys and values of a batch of prompts and their answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.adapter import Adapter, out_features
from .image_memory import rounded_up
from .modules.attention import Rope

__all__ = ["FIXED_TOKENS", "AnswerMemory", "AnswerShape", "Buffers", "layer_of"]

CAPACITY_STEP = 256
"""Reusable memory rounds its capacity up to a multiple of this, so most later calls fit."""

FIXED_TOKENS = 4096
"""New tokens of an answer up to which memory at fixed addresses is reserved; a longer answer has memory that grows."""

Buffers = tuple[Tensor, Tensor]
"""Keys and values [layers, 2, rows, kv_heads, capacity, head_dim]: of the layers before the pruning layer, and of the rest."""


@dataclass(frozen=True)
class AnswerShape:
    """The shape of the memory that a batch of answers needs."""

    rows: int
    """One per prompt."""
    capacities: tuple[int, int]
    """Tokens per row: in the layers before `split`, and in the rest."""
    split: int
    """The pruning layer; the number of layers where nothing is pruned."""
    dtype: torch.dtype
    """Of keys and values."""

    def rounded(self) -> AnswerShape:
        """With capacity for other prompts."""
        first, second = (rounded_up(capacity, CAPACITY_STEP) for capacity in self.capacities)
        return AnswerShape(self.rows, (first, second), self.split, self.dtype)

    def holds(self, other: AnswerShape) -> bool:
        """Whether a batch of another shape fits, and wastes at most half of the capacity: attention reads every slot."""
        same = (self.rows, self.split, self.dtype) == (other.rows, other.split, other.dtype)
        capacities = zip(self.capacities, other.capacities, other.rounded().capacities, strict=True)
        return same and all(asked <= mine <= 2 * rounded for mine, asked, rounded in capacities)


class AnswerMemory:
    """Keys and values of several rows, and what the next token of each is computed from.

    Attributes:
        fixed: work is captured on this memory: every number in it is read on the device, and `masks` hide the slots that a row
            does not use. Else the host knows the rows' `lengths`.
        buffers: keys and values.
        lengths: for each buffer int64 [live rows] on the CPU, the slots that a row attends to, with the next token's; None
            where fixed.
        masks: for each buffer additive [rows, 1, 1, capacity], or None where every row sees its whole prompt.
        runs: bool [layers, rows, 1, 1], read for layers that only some rows run.
        token, position: int64 [rows, 1].
        slots: int64 [2, rows], where a row's next token is stored in each buffer.
        logits: [rows, vocab].
        rope: rotary table of all positions, [positions, head_dim] each.
    """

    def __init__(self, shape: AnswerShape, parts: Adapter, rope: Rope, fixed: bool):
        self.shape = shape
        self.fixed = fixed
        kv, rows, device = parts.llm_attention, shape.rows, parts.device
        # Without lengths unused slots are only masked: a NaN there would spread.
        make = torch.zeros if fixed else torch.empty
        first, second = (
            make(count, 2, rows, kv.kv_heads, capacity, kv.head_dim, dtype=shape.dtype, device=device)
            for count, capacity in zip((shape.split, len(parts.layers) - shape.split), shape.capacities, strict=True)
        )
        self.buffers: Buffers = (first, second)
        self.lengths: list[Tensor] | None = None
        self.masks: list[Tensor | None] = [
            torch.zeros(rows, 1, 1, count, dtype=shape.dtype, device=device) if fixed else None
            for count in shape.capacities
        ]
        self.runs = torch.zeros(len(parts.layers), rows, 1, 1, dtype=torch.bool, device=device)
        self.token, self.position = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, out_features(parts.lm_head.module), dtype=shape.dtype, device=device)
        self.rope = rope

    def clear(self) -> None:
        """Zero the buffers: an earlier prompt may have left a NaN in a slot that is only masked now."""
        for buffer in self.buffers:
            buffer.zero_()

    def nbytes(self) -> dict[str, int]:
        masks = [mask for mask in self.masks if mask is not None]
        tensors = (*self.buffers, *masks, self.runs, self.token, self.position, self.slots, self.logits)
        return {"answers' keys and values": sum(tensor.nbytes for tensor in tensors)}


def layer_of(buffers: Buffers, split: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, [rows, kv_heads, capacity, head_dim] each."""
    pair = buffers[0][layer] if layer < split else buffers[1][layer - split]
    return pair[0], pair[1]
