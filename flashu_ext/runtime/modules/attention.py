"""Attention passes: attention over cached and new keys and values, one pass for each kind of forward.

A pass is called once per layer with that layer's projections and rotary table, and returns the attended values. The pass
owns the cache: one launch rotates queries and keys and stores keys and values. Layers need not know about prefixes, spans or
masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...models.adapter import norm_eps
from ...models.masks import additive, causal
from ...ops.kernel_sets import KernelSet

__all__ = [
    "AttentionPass",
    "HeadNorms",
    "MaskedPass",
    "Rope",
    "RoutedPass",
    "RopeTable",
    "RowGeometry",
    "SegmentPass",
    "SpanPass",
    "head_norms",
    "rope_table",
    "rotate_into",
    "rotated",
    "span_pass",
]

Rope = tuple[Tensor, Tensor]
"""cos and sin, [rows or 1, n, head_dim] each."""


@dataclass(frozen=True)
class HeadNorms:
    """Weights [head_dim] of the norms that some models apply to every query and key head before rotation."""

    query: Tensor
    key: Tensor
    eps: float


def head_norms(attention: Any) -> HeadNorms | None:
    """An attention module's norms of queries and keys, or None where it has none."""
    query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if query is None or key is None:
        return None
    return HeadNorms(query.weight, key.weight, norm_eps(query))


class AttentionPass(Protocol):
    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        """query [rows, n, heads, d], key and value [rows, n, kv_heads, d], not yet rotated -> [rows, n, heads * d]."""
        ...


def rope_table(module: Callable[..., tuple[Tensor, Tensor]], position_ids: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin [rows or 1, n, d] of a model's rotary module for position_ids [rows or 1, n]. In blocks: torch shares a long
    sine out over threads, and computes the ends of their shares by another function."""
    like = torch.empty(0, dtype=dtype, device=position_ids.device)
    blocks = [module(like, each) for each in position_ids.split(ROPE_BLOCK, dim=1)]
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat([cos for cos, _ in blocks], dim=1), torch.cat([sin for _, sin in blocks], dim=1)


ROPE_BLOCK = 64
"""Positions whose rotary table is computed at once."""


class RopeTable:
    """cos and sin of all positions needed so far, computed once."""

    def __init__(self, module: Callable[..., tuple[Tensor, Tensor]], device: torch.device):
        self._module = module
        self._device = device
        self._table: Rope | None = None

    def upto(self, count: int, dtype: torch.dtype) -> Rope:
        """cos and sin [at least count, head_dim] each."""
        table = self._table
        if table is None or table[0].dtype != dtype or table[0].shape[0] < count:
            whole = (
                -(-max(count, 1) // ROPE_BLOCK) * ROPE_BLOCK
            )  # a position has the same place in its block for any count
            cos, sin = rope_table(self._module, torch.arange(whole, device=self._device)[None], dtype)
            self._table = table = (cos[0], sin[0])
        return table

    def at(self, positions: Tensor, count: int, dtype: torch.dtype) -> Rope:
        """The table of positions int64 [n], all below `count`: [1, n, head_dim] each."""
        cos, sin = (table.index_select(0, positions)[None] for table in self.upto(count, dtype))
        return cos, sin

    def forget(self) -> None:
        self._table = None

    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._table or ())


def rotated(kernels: KernelSet, x: Tensor, rope: Rope, norms: HeadNorms | None) -> Tensor:
    """Rotary embedding of queries x [rows, n, heads, d] by cos and sin [rows or 1, n, d] -> [rows, heads, n, d]."""
    none = x[:, :, :0]
    return rotate_into(kernels, x, none, none, rope, norms, none, none)


def rotate_into(
    kernels: KernelSet,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Rope,
    norms: HeadNorms | None,
    keys: Tensor,
    values: Tensor,
    start: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, and store keys and values.

    Args:
        query: [rows, n, heads, d].
        key, value: [rows, n, kv_heads, d].
        keys, values: [rows, slots, kv_heads, d], written from slot 0 on, or from start[row].

    Returns:
        [rows, heads, n, d].
    """
    cos, sin = rope
    return kernels.rotary_cache_(
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        start,
        query_norm=norms.query if norms else None,
        key_norm=norms.key if norms else None,
        eps=norms.eps if norms else 1e-6,
    )


@dataclass(frozen=True)
class RowGeometry:
    """Position and length of every row's image span."""

    prefix: tuple[int, ...]
    """Tokens before the span that it sees, per row."""
    span: int
    """Tokens of the span, the same in all rows."""

    @property
    def longest(self) -> int:
        return max(self.prefix)

    def first(self, rows: int) -> RowGeometry:
        return RowGeometry(self.prefix[:rows], self.span)

    def seen(self) -> Tensor:
        """int64 [rows] on the CPU: keys that each row attends to."""
        return torch.tensor([self.span + length for length in self.prefix], dtype=torch.int64, device="cpu")

    def groups(self) -> int:
        """Runs of adjacent rows that attend to the same number of keys."""
        return 1 + sum(one != other for one, other in zip(self.prefix, self.prefix[1:], strict=False))


class SpanPass:
    """Image tokens attend to their span, whole or up to themselves, and to the cached prefix.

    The cache stores a row's span first, then its prefix. Attention does not depend on the order of keys, and so a row's keys
    are contiguous from slot 0, whatever the length of its prefix.
    """

    def __init__(self, cache: Tensor, geometry: RowGeometry | None, kernels: KernelSet, mask: Tensor | None = None):
        """Args:
        cache: [layers, 2, rows, slots, kv_heads, d].
        geometry: of these rows; None: the mask hides the slots that a row does not use.
        mask: additive [rows or 1, 1, 1 or span, slots]; None: a token sees its span whole.
        """
        self.cache = cache
        self.kernels = kernels
        self._mask = mask
        self._seen = None if geometry is None else geometry.seen()

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        keys, values = self.cache[layer]
        rotated = rotate_into(self.kernels, query, key, value, rope, norms, keys, values)
        return self._attend(layer, rotated, self._mask)

    def routed(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rope: Rope,
        query_rope: Rope,
        active: Tensor,
        norms: HeadNorms | None,
    ) -> Tensor:
        """Queries of the active span tokens, [rows, k, heads, d], with their rotary table; keys and values of all span tokens.
        active: int64 [rows, k]."""
        # Keys and values first, then the queries: one call takes the same number of tokens of each.
        keys, values = self.cache[layer]
        kernels, none = self.kernels, slice(0)
        rotate_into(kernels, key[:, :, none], key, value, rope, norms, keys, values)
        mask = self._mask
        if mask is not None and mask.shape[2] > 1:
            places = active[:, None, :, None].expand(-1, -1, -1, mask.shape[3])
            mask = mask.expand(len(active), -1, -1, -1).gather(2, places)
        return self._attend(layer, rotated(kernels, query, query_rope, norms), mask)

    def _attend(self, layer: int, query: Tensor, mask: Tensor | None) -> Tensor:
        """Over each row's span and prefix."""
        keys, values = (each.transpose(1, 2) for each in self.cache[layer])
        return self.kernels.attention(query, keys, values, self._seen, mask).flatten(2)


class JoinedPass:
    """Image spans of several memories in one evaluation: rows are projected together, and attend within their memory."""

    def __init__(self, passes: Sequence[SpanPass]):
        self.passes = passes
        self._rows = [each.cache.shape[2] for each in passes]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        return self._each(lambda own, *rows: own(layer, *rows[:3], rows[3:], norms), query, key, value, *rope)

    def routed(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rope: Rope,
        query_rope: Rope,
        active: Tensor,
        norms: HeadNorms | None,
    ) -> Tensor:
        return self._each(
            lambda own, *rows: own.routed(layer, *rows[:3], rows[3:5], rows[5:7], rows[7], norms),
            query,
            key,
            value,
            *rope,
            *query_rope,
            active,
        )

    def _each(self, attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        rows = zip(*(tensor.split(self._rows) for tensor in tensors), strict=True)
        return torch.cat([attend(own, *each) for own, each in zip(self.passes, rows, strict=True)])


RoutedPass = SpanPass | JoinedPass
"""Passes whose queries may be of some tokens only."""


def span_pass(passes: Sequence[SpanPass]) -> RoutedPass:
    """The pass for the rows of several memories, one after another."""
    return passes[0] if len(passes) == 1 else JoinedPass(passes)


class MaskedPass:
    """A whole sequence under an explicit mask; every layer's keys and values go into the cache."""

    def __init__(self, mask: Tensor, cache: Tensor, kernels: KernelSet, store: Tensor | None = None):
        """Args:
        mask: additive [rows or 1, 1, tokens, tokens].
        cache: [layers, 2, rows, tokens, kv_heads, d]; all layers may share the same memory (`expand`).
        store: [layers, 2, rows, prefix, kv_heads, d], receives the first tokens' keys and values where layers share the cache.
        """
        self.mask = mask
        self.cache = cache
        self.kernels = kernels
        self.store = store

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        pair = self.cache[layer]
        rotated = rotate_into(self.kernels, query, key, value, rope, norms, pair[0], pair[1])
        if self.store is not None:
            self.store[layer].copy_(pair[:, :, : self.store.shape[3]])
        keys, values = (each.transpose(1, 2) for each in pair)
        return self.kernels.attention(rotated, keys, values, mask=self.mask).flatten(2)


class SegmentPass:
    """Tokens that come to be seen together, after those that are in the cache already; they are stored there too."""

    def __init__(
        self,
        cache: Tensor,
        kernels: KernelSet,
        tokens: int,
        filled: int = 0,
        ordered: bool = True,
        mask: Tensor | None = None,
    ):
        """Args:
        cache: [layers, 2, rows, slots, kv_heads, d], of which the first `filled` slots are seen whole.
        ordered: whether one of the `tokens` sees earlier ones only; else all.
        mask: additive [rows or 1, 1, tokens, filled + tokens], what is seen instead.
        """
        self.cache = cache[:, :, :, : filled + tokens]
        self.kernels = kernels
        self._filled = filled
        self._mask = mask
        if mask is None and ordered and tokens > 1:
            seen = torch.ones(tokens, filled, dtype=torch.bool, device=cache.device)
            self._mask = additive(torch.cat([seen, causal(tokens, cache.device)], dim=1)[None, None], cache.dtype)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        keys, values = self.cache[layer]
        new = slice(self._filled, None)
        rotated = rotate_into(self.kernels, query, key, value, rope, norms, keys[:, new], values[:, new])
        return self.kernels.attention(rotated, keys.transpose(1, 2), values.transpose(1, 2), mask=self._mask).flatten(2)
