"""Prompts being answered, and their keys and values; what one prompt can lend to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.structure import AttentionShape

__all__ = ["Prompt", "PromptCache", "Span", "common_prefix", "reach"]

Provide = Callable[[int, tuple[int, int], int, Tensor], Any]
"""Rows, capacities of the two buffers, `split` and a tensor of their dtype -> an object with `buffers`, or None."""

Span = tuple[int, int]
"""(first position, count) of an image's tokens in a prompt."""


@dataclass
class Prompt:
    """One prompt.

    Attributes:
        embeds: [1, length, hidden]. allowed: bool [length, length], True where a row may look.
        spans: where its images are. dropped: per span, how many of its tokens the pruning layer drops.
        kept: positions of the tokens that the pruning layer and those after it hold, int64 [slots]; set by the prefill.
    """

    embeds: Tensor
    allowed: Tensor
    spans: tuple[Span, ...]
    dropped: tuple[int, ...]
    kept: Tensor | None = None

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    @property
    def visual(self) -> int:
        return sum(count for _, count in self.spans)

    def slots(self, tokens: int) -> int:
        """How many of the first `tokens` tokens stay. A prefix is never cut inside a span (`common_prefix`)."""
        gone = (drop for (start, count), drop in zip(self.spans, self.dropped, strict=True) if start + count <= tokens)
        return tokens - sum(gone)

    def nbytes(self) -> int:
        return self.embeds.nbytes + self.allowed.nbytes + (self.kept.nbytes if self.kept is not None else 0)


class PromptCache:
    """Keys and values of several prompts, one a row, and room for their answers.

    Layers before the pruning layer hold every token of a prompt, the others those that stay. A row's prompt begins at slot
    0; all answers begin at one slot, behind the longest prompt, so that a new token is written to one slot in every row.

    Attributes:
        buffers: two tensors [layers, 2, rows, kv_heads, capacity, head_dim]: layers before `split`, and the others.
        ends: the slot at which answers begin, in each of the two.
        memory: what the buffers are part of, where they are not the cache's own.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        new_tokens: int,
        split: int,
        layers: int,
        shape: AttentionShape,
        like: Tensor,
        provide: Provide | None = None,
    ):
        """provide: memory of fixed place for these, or None; without it the cache has memory of its own."""
        self.prompts = list(prompts)
        self.split = split
        self.ends = (max(p.length for p in prompts), max(p.slots(p.length) for p in prompts))
        capacities = (self.ends[0] + new_tokens, self.ends[1] + new_tokens)
        self.memory = provide(len(prompts), capacities, split, like) if provide else None
        if self.memory is not None:
            self.buffers = self.memory.buffers
            return
        first, second = (
            # Zeros: a slot that a row does not use is masked, and must not hold a NaN.
            like.new_zeros(count, 2, len(prompts), shape.kv_heads, capacity, shape.head_dim)
            for count, capacity in zip((split, layers - split), capacities, strict=True)
        )
        self.buffers = (first, second)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [rows, kv_heads, capacity, head_dim] each."""
        return layer_of(self.buffers, self.split, layer)

    def borrow(self, row: int, source: PromptCache, source_row: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of another cache's row, or of another row of this one."""
        prompt = source.prompts[source_row]
        for mine, theirs, slots in zip(self.buffers, source.buffers, (tokens, prompt.slots(tokens)), strict=True):
            mine[:, :, row, :, :slots] = theirs[:, :, source_row, :, :slots]

    def nbytes(self) -> int:
        own = sum(buffer.nbytes for buffer in self.buffers) if self.memory is None else 0
        return own + sum(prompt.nbytes() for prompt in self.prompts)


def layer_of(buffers: tuple[Tensor, Tensor], split: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer in a cache's two buffers."""
    pair = buffers[0][layer] if layer < split else buffers[1][layer - split]
    return pair[0], pair[1]


def common_prefix(source: Prompt, prompt: Prompt, limit: int) -> int:
    """How many leading tokens, at most `limit`, a prefilled prompt has in common with another one and can lend.

    They end at a closed position: nothing before it looks past it in either prompt, so an image is lent whole or not at all.
    """
    if source.embeds.dtype != prompt.embeds.dtype or source.embeds.device != prompt.embeds.device:
        return 0
    limit = min(limit, source.length, prompt.length - 1)
    same = (source.embeds[0, :limit] == prompt.embeds[0, :limit]).all(dim=-1)
    same &= (source.allowed[:limit, :limit] == prompt.allowed[:limit, :limit]).all(dim=-1)
    limit = int(same.long().cumprod(0).sum())
    if limit == 0:
        return 0
    farthest = torch.maximum(reach(source.allowed[:limit]), reach(prompt.allowed[:limit])).cummax(0).values
    closed = torch.nonzero(farthest < torch.arange(1, limit + 1, device=farthest.device)).flatten()
    return int(closed[-1]) + 1 if closed.numel() else 0


def reach(allowed: Tensor) -> Tensor:
    """The last position each row of `allowed` (bool [n, m]) looks at; -1 for none."""
    position = torch.arange(1, allowed.shape[1] + 1, device=allowed.device)
    return (allowed * position).amax(dim=1) - 1
