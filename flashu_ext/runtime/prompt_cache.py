"""Prompts being answered, their keys and values, and the prefix of a prompt that a later one can reuse."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..models.adapter import Adapter
from .answer_memory import AnswerMemory, AnswerShape, layer_of
from .memory import Lease, MemoryPool
from .modules.attention import RopeTable

__all__ = ["Prompt", "PromptCache", "PromptStore", "Span", "common_prefix", "reach"]

T = TypeVar("T")

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
    positions: Tensor
    """int64 [length], for the rotary embedding."""
    adapter: str | None = None
    """The LoRA adapter that answers; None: what is active."""
    ahead: int = 0
    """How far an answer's positions are behind its places: those of tokens that share one."""
    finite: Tensor | None = None
    """bool []: whether its last token's output is. A NaN behind a mask spreads to every token of a prompt, so keys and values of
    one that is not finite are not reused. Set by the prefill."""
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

    def seen(self, late: bool) -> Tensor:
        """bool [slots]: what the prompt's last token, and so its answer, may attend to; late: from the pruning layer on."""
        return self.allowed[-1, self.kept] if late and self.kept is not None else self.allowed[-1]

    def nbytes(self) -> int:
        return (
            self.embeds.nbytes
            + self.positions.nbytes
            + self.allowed.nbytes
            + (self.kept.nbytes if self.kept is not None else 0)
        )


class PromptCache:
    """Keys and values of several prompts and their answers, one of each per row.

    Layers before the pruning layer store every token of a prompt, the others only kept tokens. A row's prompt begins at slot
    0, and its answer follows directly, so what a row holds does not depend on the others.

    Attributes:
        prompts: of each row; None: the row holds nothing that can be used.
        written: answer tokens stored in each row.
        ended: for each row when its answer ended, by a count of ends; 0: never.
        lease: the memory.
        in_use: answers are being written.
    """

    def __init__(self, rows: int, lease: Lease[AnswerMemory]):
        self.prompts: list[Prompt | None] = [None] * rows
        self.written = [0] * rows
        self.ended = [0] * rows
        self.lease = lease
        self.in_use = True

    @property
    def memory(self) -> AnswerMemory:
        return self.lease.memory

    @property
    def split(self) -> int:
        return self.memory.shape.split

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [rows, kv_heads, capacity, head_dim] each."""
        return layer_of(self.memory.buffers, self.split, layer)

    def prompt(self, row: int) -> Prompt:
        """The prompt of a row that has one."""
        prompt = self.prompts[row]
        assert prompt is not None
        return prompt

    def filled(self) -> list[int]:
        """The rows that have a prompt."""
        return [row for row, prompt in enumerate(self.prompts) if prompt is not None]

    def used(self, row: int) -> tuple[int, int]:
        """Slots that a row's prompt and answer fill in each of the two buffers."""
        prompt = self.prompts[row]
        if prompt is None:
            return 0, 0
        return prompt.length + self.written[row], prompt.slots(prompt.length) + self.written[row]

    def put(self, row: int, prompt: Prompt | None) -> None:
        """Give a row to another prompt, which is yet to be filled, or to none."""
        self.prompts[row], self.written[row] = prompt, 0

    def end(self, row: int) -> None:
        """The answer of a row has ended."""
        self.ended[row] = 1 + max(self.ended)

    def free(self, row: int, wanted: int | None) -> None:
        """Make a row behind the live ones free for another prompt: its own goes where an answer ended longest ago, or, if
        another row behind is `wanted` for its prefix, changes places with that."""
        behind = range(row, len(self.prompts))
        if wanted is not None:
            self.swap(row, wanted)
        elif self.prompts[row] is not None:
            self.swap(row, min(behind, key=lambda each: (self.prompts[each] is not None, self.ended[each])))

    def reuse(self, row: int, prompt: Prompt, source: PromptCache, source_row: int, tokens: int) -> None:
        """Give a row to a prompt whose first `tokens` tokens are those of a row of this or another cache, maybe the same row."""
        other = source.prompt(source_row)
        prompt.kept = other.kept
        self.put(row, prompt)
        if source is not self or source_row != row:
            self._copy(row, source, source_row, (tokens, other.slots(tokens)))

    def take(self, row: int, source: PromptCache, source_row: int) -> None:
        """Copy a whole row."""
        used = source.used(source_row)
        self.prompts[row], self.written[row] = source.prompts[source_row], source.written[source_row]
        self.ended[row] = source.ended[source_row]
        self._copy(row, source, source_row, used)

    def swap(self, row: int, other: int) -> None:
        if row == other:
            return
        filled = tuple(max(pair) for pair in zip(self.used(row), self.used(other), strict=True))
        for buffer, slots in zip(self.memory.buffers, filled, strict=True):
            one, two = (buffer[:, :, each, :, :slots] for each in (row, other))
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)
        _swap(self.prompts, row, other)
        _swap(self.written, row, other)
        _swap(self.ended, row, other)

    def _copy(self, row: int, source: PromptCache, source_row: int, slots: tuple[int, int]) -> None:
        for mine, theirs, count in zip(self.memory.buffers, source.memory.buffers, slots, strict=True):
            mine[:, :, row, :, :count] = theirs[:, :, source_row, :, :count]

    def nbytes(self) -> int:
        """Bytes of the prompts; the memory is counted by its pool."""
        return sum(prompt.nbytes() for prompt in self.prompts if prompt is not None)


def _swap(each: list[T], one: int, other: int) -> None:
    each[one], each[other] = each[other], each[one]


class PromptStore:
    """The memory of answers, and the prompts whose prefixes the next question can reuse.

    Attributes:
        last: the cache filled last.
    """

    def __init__(self, parts: Adapter, pool: MemoryPool[AnswerMemory], split: int):
        """split: the pruning layer."""
        self.pool = pool
        self.split = split
        self.last: PromptCache | None = None
        self.rope = RopeTable(parts.llm_rope, parts.device)
        self._parts = parts

    def acquire(self, shape: AnswerShape, fixed: bool) -> Lease[AnswerMemory]:
        """Memory of a shape; if fixed, memory of an earlier call where it fits."""
        if not fixed:
            return self.pool.acquire(lambda memory: False, lambda: self._make(shape, fixed))
        lease = self.pool.acquire(
            lambda memory: memory.fixed and memory.shape.holds(shape), lambda: self._make(shape.rounded(), fixed)
        )
        lease.memory.clear()
        return lease

    def _make(self, shape: AnswerShape, fixed: bool) -> AnswerMemory:
        return AnswerMemory(shape, self._parts, self.rope.upto(shape.capacities[0], shape.dtype), fixed)

    def read_last(self) -> None:
        """The current stream will read the last cache."""
        if self.last is not None:
            self.pool.join(self.last.lease)

    def keep(self, cache: PromptCache) -> None:
        """Make this the cache whose prefixes are reused. The old one's memory is released now, or when its answers end."""
        old, self.last = self.last, cache
        if old is not None and old is not cache and not old.in_use:
            self.pool.release(old.lease)

    def end(self, cache: PromptCache) -> None:
        """A cache's answers have ended, or it has moved to other memory."""
        cache.in_use = False
        self.pool.mark(cache.lease)
        if self.last is not cache:
            self.pool.release(cache.lease)

    def forget(self) -> None:
        """Drop what the next question could reuse."""
        if self.last is not None and not self.last.in_use:
            self.pool.release(self.last.lease)
        self.last = None
        self.rope.forget()

    def nbytes(self) -> Counter[str]:
        """Bytes held, by purpose."""
        prompts = self.last.nbytes() if self.last is not None else 0
        own = {"answers' keys and values": prompts, "answers' rotary table": self.rope.nbytes()}
        return self.pool.nbytes() + Counter(own)


def common_prefix(source: Prompt, prompt: Prompt, limit: int) -> int:
    """How many leading tokens, at most `limit`, of a prefilled prompt another prompt can reuse.

    They end at a closed position, one that no earlier token looks past in either prompt, so an image is reused whole or not
    at all.
    """
    if source.adapter != prompt.adapter:
        return 0
    if source.embeds.dtype != prompt.embeds.dtype or source.embeds.device != prompt.embeds.device:
        return 0
    if source.finite is not None and not bool(source.finite):
        return 0
    limit = min(limit, source.length, prompt.length - 1)
    same = (source.embeds[0, :limit] == prompt.embeds[0, :limit]).all(dim=-1)
    same &= source.positions[:limit] == prompt.positions[:limit]
    same &= (source.allowed[:limit, :limit] == prompt.allowed[:limit, :limit]).all(dim=-1)
    limit = int(same.long().cumprod(0).sum())
    if limit == 0:
        return 0
    farthest = torch.maximum(reach(source.allowed[:limit]), reach(prompt.allowed[:limit])).cummax(0).values
    closed = torch.nonzero(farthest < torch.arange(1, limit + 1, device=farthest.device)).flatten()
    end = int(closed[-1]) + 1 if closed.numel() else 0
    # Of a causal image, which has closed positions inside, pruning may have dropped tokens.
    inside = [start for start, count in (*source.spans, *prompt.spans) if start < end < start + count]
    return min(inside, default=end)


def reach(allowed: Tensor) -> Tensor:
    """The last position that each row of `allowed` (bool [n, m]) may attend to; -1 for none."""
    position = torch.arange(1, allowed.shape[1] + 1, device=allowed.device)
    return (allowed * position).amax(dim=1) - 1
