"""Prompts being answered, their keys and values, and the prefix of a prompt that a later one can reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .answer_memory import AnswerShape, Buffers, GrowingMemory, layer_of
from .memory import Lease

__all__ = ["Prompt", "PromptCache", "Span", "common_prefix", "reach"]

Span = tuple[int, int]
"""(first position, count) of an image's tokens in a prompt."""


@dataclass
class Prompt:
    """One prompt."""

    embeds: Tensor
    """[1, length, hidden]."""
    allowed: Tensor
    """bool [length, length], True where a row may attend to a column."""
    spans: tuple[Span, ...]
    """Its images."""
    dropped: tuple[int, ...]
    """For each span the number of tokens that the pruning layer drops."""
    kept: Tensor | None = None
    """Positions of the tokens in the cache from the pruning layer on, int64 [slots]; set by the prefill."""

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    @property
    def visual(self) -> int:
        return sum(count for _, count in self.spans)

    def slots(self, tokens: int) -> int:
        """How many of the first `tokens` tokens are kept. `tokens` never ends inside a span (`common_prefix`)."""
        drops = (drop for (start, count), drop in zip(self.spans, self.dropped, strict=True) if start + count <= tokens)
        return tokens - sum(drops)

    def nbytes(self) -> int:
        return self.embeds.nbytes + self.allowed.nbytes + (self.kept.nbytes if self.kept is not None else 0)


class PromptCache:
    """Keys and values of several prompts, one per row, with capacity for their answers.

    Layers before the pruning layer store every token of a prompt, the others only kept tokens. A row's prompt begins at slot
    0. All answers begin at the same slot, after the longest prompt, so a new token has the same slot in every row.

    Attributes:
        lease: the memory.
        ends: the first answer slot in each of the two buffers.
        decoding: answers are being written.
    """

    def __init__(self, prompts: Sequence[Prompt], lease: Lease[GrowingMemory]):
        self.prompts = list(prompts)
        self.lease = lease
        self.ends = _ends(prompts)
        self.decoding = False

    @staticmethod
    def shape(prompts: Sequence[Prompt], new_tokens: int, split: int) -> AnswerShape:
        """The memory needed for prompts and `new_tokens` more tokens of each. split: the pruning layer."""
        first, second = (end + new_tokens for end in _ends(prompts))
        return AnswerShape(len(prompts), (first, second), split, prompts[0].embeds.dtype)

    @property
    def buffers(self) -> Buffers:
        return self.lease.memory.buffers

    @property
    def split(self) -> int:
        return self.lease.memory.shape.split

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [rows, kv_heads, capacity, head_dim] each."""
        return layer_of(self.buffers, self.split, layer)

    def reuse(self, row: int, source: PromptCache, source_row: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of another cache's row, or of another row of this one."""
        prompt = source.prompts[source_row]
        self.prompts[row].kept = prompt.kept
        for mine, theirs, slots in zip(self.buffers, source.buffers, (tokens, prompt.slots(tokens)), strict=True):
            mine[:, :, row, :, :slots] = theirs[:, :, source_row, :, :slots]

    def nbytes(self) -> int:
        """Bytes of the prompts; the memory is counted by its pool."""
        return sum(prompt.nbytes() for prompt in self.prompts)


def _ends(prompts: Sequence[Prompt]) -> tuple[int, int]:
    return max(p.length for p in prompts), max(p.slots(p.length) for p in prompts)


def common_prefix(source: Prompt, prompt: Prompt, limit: int) -> int:
    """How many leading tokens, at most `limit`, of a prefilled prompt another prompt can reuse.

    They end at a closed position, one that no earlier token looks past in either prompt, so an image is reused whole or not
    at all.
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
    """The last position that each row of `allowed` (bool [n, m]) may attend to; -1 for none."""
    position = torch.arange(1, allowed.shape[1] + 1, device=allowed.device)
    return (allowed * position).amax(dim=1) - 1
