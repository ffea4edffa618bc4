"""Memory for the keys and values of a batch of prompts and their answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.parts import Showo2Parts
from .modules.attention import rope_table
from .workspace import rounded_up

__all__ = ["AnswerMemory", "AnswerShape", "Buffers", "GrowingMemory", "layer_of"]

CAPACITY_STEP = 256
"""Capacity for prompts and answers is rounded up to this where memory is kept, so that most of the next calls fit."""

Buffers = tuple[Tensor, Tensor]
"""Keys and values [layers, 2, rows, kv_heads, capacity, head_dim] of the layers before the pruning layer, and of the others."""


@dataclass(frozen=True)
class AnswerShape:
    """What a batch of answers needs.

    Attributes:
        rows: one a prompt. capacities: tokens of a row, in the layers before `split` and in the others.
        split: the pruning layer; the number of layers where nothing is pruned. dtype: of keys and values.
    """

    rows: int
    capacities: tuple[int, int]
    split: int
    dtype: torch.dtype

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
        """Zeros: a slot that a row does not use is masked, and must not hold a NaN."""
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
    """Memory of exactly the asked shape, for answers that are run operator by operator."""

    def __init__(self, shape: AnswerShape, parts: Showo2Parts):
        self.shape = shape
        self.buffers = shape.buffers(parts)

    def nbytes(self) -> dict[str, int]:
        return {"answers' keys and values": sum(buffer.nbytes for buffer in self.buffers)}


class AnswerMemory(GrowingMemory):
    """Memory of fixed place, where work on it is captured.

    Attributes:
        masks: additive [rows, 1, 1, capacity] for each of the buffers.
        runs: bool [layers, rows, 1, 1], where rows differ in the layers they skip.
        token, position: int64 [rows, 1]. slots: int64 [2], where the new token goes in each of the two buffers.
        logits: [rows, vocab].
    """

    def __init__(self, shape: AnswerShape, parts: Showo2Parts):
        super().__init__(shape, parts)
        rows, device = shape.rows, parts.device
        self.masks = [torch.zeros(rows, 1, 1, count, dtype=shape.dtype, device=device) for count in shape.capacities]
        self.runs = torch.zeros(len(parts.layers), rows, 1, 1, dtype=torch.bool, device=device)
        self.token, self.position = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.zeros(2, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, parts.lm_head.weight.shape[0], dtype=shape.dtype, device=device)
        positions = torch.arange(shape.capacities[0], device=device)[None]
        self.rope = rope_table(parts.llm_rope, positions, shape.dtype)

    def clear(self) -> None:
        """A slot that a row does not use is masked, and must not hold the NaN of an earlier prompt."""
        for buffer in self.buffers:
            buffer.zero_()

    def nbytes(self) -> dict[str, int]:
        tensors = (*self.masks, *self.rope, self.runs, self.token, self.position, self.slots, self.logits)
        own = sum(tensor.nbytes for tensor in tensors)
        return {purpose: count + own for purpose, count in super().nbytes().items()}
