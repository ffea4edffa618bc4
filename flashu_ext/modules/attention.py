"""Room: modules. Attention passes: how the queries of a forward pass meet keys and values, cached or new.

A pass is called once per layer with that layer's rotated queries and keys, and returns the attended values. The pass
owns the cache policy; layers know nothing of prefixes, spans or masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

__all__ = ["CausalPass", "KeyValue", "MaskedPass", "Rope", "RowGeometry", "SpanPass", "attend", "rope_table", "rotate"]

Rope = tuple[Tensor, Tensor]
"""cos and sin, [rows or 1, n, 1, head_dim] each."""

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, [rows, kv_heads, tokens, head_dim] each, keys rotated."""

# Rows of unequal prefix are attended in groups of equal length without a mask, up to this many groups: above it, one call
# with a mask costs less than many small ones.
MAX_GROUPS = 4


class AttentionPass(Protocol):
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [rows, n, heads, d], key and value [rows, n, kv_heads, d] -> [rows, n, heads * d]."""
        ...


def rope_table(module: Callable[..., tuple[Tensor, Tensor]], position_ids: Tensor, dtype: torch.dtype) -> Rope:
    """What a model's rotary module gives for position_ids [rows or 1, n], as `rotate` takes it."""
    cos, sin = module(torch.empty(0, dtype=dtype, device=position_ids.device), position_ids)
    return cos[:, :, None], sin[:, :, None]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of x [rows, n, heads, d] by cos and sin [rows or 1, n, 1, d], halves convention."""
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, turned, sin)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention without a causal rule.

    The query heads that share a key head are folded into its token axis, so keys and values are never repeated in memory.

    Args:
        query: [rows, n, heads, d]. key, value: [rows, kv_heads, tokens, d].
        mask: None, or additive, broadcastable to [rows, 1, n, tokens]; a token axis of 1 stays 1.

    Returns:
        [rows, n, heads * d].
    """
    rows, n, heads, d = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.view(rows, n, kv_heads, group, d).permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * n, d)
    if mask is not None and mask.shape[2] != 1:
        mask = mask.repeat(1, 1, group, 1)
    out = sdpa(folded, key, value, attn_mask=mask)
    return out.view(rows, kv_heads, group, n, d).permute(0, 3, 1, 2, 4).reshape(rows, n, heads * d)


@dataclass(frozen=True)
class RowGeometry:
    """Where every row's image span lies. Text prefixes end at the span, so they are kept right-aligned.

    Attributes:
        prefix: per row the number of text tokens before the span. span: tokens of the span, the same in all rows.
    """

    prefix: tuple[int, ...]
    span: int

    @property
    def longest(self) -> int:
        return max(self.prefix)

    def groups(self) -> list[tuple[int, int, int]]:
        """(first row, end row, first key slot) of neighbouring rows with prefixes of one length."""
        result: list[tuple[int, int, int]] = []
        for row, length in enumerate(self.prefix):
            slot = self.longest - length
            if result and result[-1][2] == slot:
                result[-1] = (result[-1][0], row + 1, slot)
            else:
                result.append((row, row + 1, slot))
        return result

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive [rows, 1, 1, longest + span]: -inf on the unused slots left of shorter prefixes."""
        slots = torch.arange(self.longest + self.span, device=device)
        first = torch.tensor([self.longest - length for length in self.prefix], device=device)
        mask = torch.zeros(len(self.prefix), 1, 1, self.longest + self.span, dtype=dtype, device=device)
        return mask.masked_fill_((slots[None, :] < first[:, None])[:, None, None], float("-inf"))

    def right_align(self, cache: Tensor) -> Tensor:
        """[rows, kv_heads, >= longest, d] with prefixes at the left -> [rows, kv_heads, longest, d], at the right; zeros fill."""
        out = torch.zeros(*cache.shape[:2], self.longest, cache.shape[3], dtype=cache.dtype, device=cache.device)
        for row, length in enumerate(self.prefix):
            out[row, :, self.longest - length :] = cache[row, :, :length]
        return out

    def right_align_all(self, caches: Sequence[KeyValue | None]) -> list[KeyValue | None]:
        """`right_align` of every layer's keys and values; None stays None."""
        return [None if pair is None else (self.right_align(pair[0]), self.right_align(pair[1])) for pair in caches]

    def spans(self, x: Tensor) -> Tensor:
        """Every row's span of x [rows, length, ...] -> [rows, span, ...]."""
        return torch.stack([x[row, offset : offset + self.span] for row, offset in enumerate(self.prefix)])


class SpanPass:
    """Image tokens attend to their whole span and to the cached prefix. Buffers live as long as the image."""

    def __init__(
        self, geometry: RowGeometry, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        rows, slots = len(geometry.prefix), geometry.longest + geometry.span
        shape = (rows, kv_heads, slots, head_dim)
        self.geometry = geometry
        self.buffers: list[KeyValue] = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(layers)
        ]
        self._attend_in_groups(dtype, device)
        # Whose prefix every row holds; shared with the passes of `first`, which write into the same buffers.
        self._owners: list[object] = [None] * rows

    def first(self, rows: int) -> SpanPass:
        """A pass over the first `rows` rows that shares this one's buffers."""
        part = copy.copy(self)
        part.geometry = RowGeometry(self.geometry.prefix[:rows], self.geometry.span)
        slot = self.geometry.longest - part.geometry.longest
        part.buffers = [(keys[:rows, :, slot:], values[:rows, :, slot:]) for keys, values in self.buffers]
        part._attend_in_groups(self.buffers[0][0].dtype, self.buffers[0][0].device)
        return part

    def _attend_in_groups(self, dtype: torch.dtype, device: torch.device) -> None:
        groups = self.geometry.groups()
        self._groups = groups if len(groups) <= MAX_GROUPS else None
        self._mask = None if self._groups else self.geometry.mask(dtype, device)

    def load_prefix(self, prefix: Sequence[KeyValue | None], owner: object) -> None:
        """Put a prefix's keys and values (right-aligned; None for skipped layers) in front of the span, once per owner.

        The prefix may have more rows, and with them more slots at the left; the first rows are taken.
        """
        rows, end = len(self.geometry.prefix), self.geometry.longest
        if all(held is owner for held in self._owners[:rows]):
            return
        for buffer, cached in zip(self.buffers, prefix, strict=True):
            if cached is not None:
                slot = cached[0].shape[2] - end
                buffer[0][:, :, :end] = cached[0][:rows, :, slot:]
                buffer[1][:, :, :end] = cached[1][:rows, :, slot:]
        self._owners[:rows] = [owner] * rows

    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.buffers)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.buffers[layer]
        end = self.geometry.longest
        keys[:, :, end:] = key.transpose(1, 2)
        values[:, :, end:] = value.transpose(1, 2)
        if self._groups is None:
            return attend(query, keys, values, self._mask)
        if len(self._groups) == 1:
            return attend(query, keys, values)
        parts = [
            attend(query[first:last], keys[first:last, :, slot:], values[first:last, :, slot:])
            for first, last, slot in self._groups
        ]
        return torch.cat(parts)


class MaskedPass:
    """A whole sequence under an explicit mask; keeps every layer's keys and values."""

    def __init__(self, mask: Tensor, layers: int):
        """mask: additive [rows, 1, tokens, tokens]."""
        self.mask = mask
        self.cache: list[KeyValue | None] = [None] * layers

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        self.cache[layer] = (keys, values)
        return attend(query, keys, values, self.mask)


class CausalPass(MaskedPass):
    """A text sequence from its start; keeps every layer's keys and values."""

    def __init__(self, tokens: int, layers: int, dtype: torch.dtype, device: torch.device):
        mask = torch.full((1, 1, tokens, tokens), float("-inf"), dtype=dtype, device=device).triu_(1)
        super().__init__(mask, layers)
