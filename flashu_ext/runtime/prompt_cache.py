"""Prompts being answered, and their keys and values; which prefix of one prompt the next can reuse."""

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
    """Keys and values of several prompts, one a row, and capacity for their answers.

    Layers before the pruning layer hold every token of a prompt, the others those that stay. A row's prompt begins at slot
    0; all answers begin at one slot, behind the longest prompt, so that a new token is written to one slot in every row.

    Attributes:
        lease: the memory. ends: the slot at which answers begin, in each of its two buffers.
        decoding: answers are being written here.
    """

    def __init__(self, prompts: Sequence[Prompt], lease: Lease[GrowingMemory]):
        self.prompts = list(prompts)
        self.lease = lease
        self.ends = _ends(prompts)
        self.decoding = False

    @staticmethod
    def shape(prompts: Sequence[Prompt], new_tokens: int, split: int) -> AnswerShape:
        """The memory that prompts and so many new tokens of each need. split: the pruning layer."""
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
        """Bytes of the prompts; the memory counts its own."""
        return sum(prompt.nbytes() for prompt in self.prompts)


def _ends(prompts: Sequence[Prompt]) -> tuple[int, int]:
    return max(p.length for p in prompts), max(p.slots(p.length) for p in prompts)


def common_prefix(source: Prompt, prompt: Prompt, limit: int) -> int:
    """How many leading tokens, at most `limit`, a prefilled prompt shares with another one, which can reuse them.

    They end at a closed position: nothing before it looks past it in either prompt, so an image is reused whole or not at all.
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
