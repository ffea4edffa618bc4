"""Memory for the keys and values of a batch of prompts and their answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.parts import Showo2Parts
from .image_memory import rounded_up
from .modules.attention import rope_table

__all__ = ["ANSWER_STEP", "FIXED_TOKENS", "AnswerMemory", "AnswerShape", "Buffers", "GrowingMemory", "layer_of"]

CAPACITY_STEP = 256
"""Reusable memory rounds its capacity up to a multiple of this, so most later calls fit."""

ANSWER_STEP = 256
"""New tokens of each answer that memory which can grow has room for at first."""

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

    def buffers(self, parts: Showo2Parts) -> Buffers:
        """Zeros, because unused slots are only masked: a NaN there would spread."""
        kv = parts.llm_attention
        first, second = (
            torch.zeros(count, 2, self.rows, kv.kv_heads, capacity, kv.head_dim, dtype=self.dtype, device=parts.device)
            for count, capacity in zip((self.split, len(parts.layers) - self.split), self.capacities, strict=True)
        )
        return first, second


def layer_of(buffers: Buffers, split: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, [rows, kv_heads, capacity, head_dim] each."""
    pair = buffers[0][layer] if layer < split else buffers[1][layer - split]
    return pair[0], pair[1]


class GrowingMemory:
    """Memory of exactly the requested shape, for answers run operator by operator; the answer's part is enlarged on the way."""

    def __init__(self, shape: AnswerShape, parts: Showo2Parts):
        self.shape = shape
        self.buffers = shape.buffers(parts)

    def nbytes(self) -> dict[str, int]:
        return {"answers' keys and values": sum(buffer.nbytes for buffer in self.buffers)}


class AnswerMemory(GrowingMemory):
    """Memory at fixed addresses, on which work is captured.

    Attributes:
        masks: additive [rows, 1, 1, capacity], one for each buffer.
        runs: bool [layers, rows, 1, 1], read for layers that only some rows run.
        token, position: int64 [rows, 1].
        slots: int64 [2], the slot of the new token in each buffer.
        logits: [rows, vocab].
        rope: rotary tables of all positions.
    """

    def __init__(self, shape: AnswerShape, parts: Showo2Parts):
        super().__init__(shape, parts)
        rows, device = shape.rows, parts.device
        self.masks = [torch.zeros(rows, 1, 1, count, dtype=shape.dtype, device=device) for count in shape.capacities]
        self.runs = torch.zeros(len(parts.layers), rows, 1, 1, dtype=torch.bool, device=device)
        self.token, self.position = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.zeros(2, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, parts.lm_head.module.weight.shape[0], dtype=shape.dtype, device=device)
        positions = torch.arange(shape.capacities[0], device=device)[None]
        self.rope = rope_table(parts.llm_rope, positions, shape.dtype)

    def clear(self) -> None:
        """Zero the buffers: an earlier prompt may have left a NaN in a slot that is only masked now."""
        for buffer in self.buffers:
            buffer.zero_()

    def nbytes(self) -> dict[str, int]:
        tensors = (*self.masks, *self.rope, self.runs, self.token, self.position, self.slots, self.logits)
        own = sum(tensor.nbytes for tensor in tensors)
        return {purpose: count + own for purpose, count in super().nbytes().items()}
