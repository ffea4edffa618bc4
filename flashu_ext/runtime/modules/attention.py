"""Attention passes: attention over cached and new keys and values, one pass for each kind of forward.

A pass is called once per layer with that layer's projections and rotary table, and returns the attended values. The pass
owns the cache: one launch rotates queries and keys and stores keys and values. Layers need not know about prefixes, spans or
masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.masks import additive, causal, slot_mask
from ...models.parts import AttentionShape, norm_eps
from ...ops.kernel_sets import KernelSet

__all__ = [
    "AttentionPass",
    "CausalPass",
    "HeadNorms",
    "MaskedPass",
    "Rope",
    "RowGeometry",
    "SpanPass",
    "attend_folded",
    "fold_mask",
    "head_norms",
    "rope_table",
    "rotate",
    "rotate_into",
]

Rope = tuple[Tensor, Tensor]
"""cos and sin, [rows or 1, n, head_dim] each."""

# Rows are grouped by prefix length and attended without a mask, up to this many groups: beyond that, one masked call costs
# less than many small ones.
MAX_GROUPS = 4


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
    """cos and sin [rows or 1, n, d] of a model's rotary module for position_ids [rows or 1, n]."""
    return module(torch.empty(0, dtype=dtype, device=position_ids.device), position_ids)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of x [rows, n, heads, d] by cos and sin [rows or 1, n, d]; dimension i is paired with i + d / 2."""
    cos, sin = (table[:, :, None] for table in rope)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, rotated, sin)


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
    """Rotate queries and keys, store keys and values, and fold the query heads that share a key head into its token axis.

    Args:
        query: [rows, n, heads, d].
        key, value: [rows, n, kv_heads, d].
        keys, values: [rows, slots, kv_heads, d], written from slot 0 on, or from start[row].

    Returns:
        [rows, kv_heads, heads / kv_heads * n, d].
    """
    cos, sin = rope
    rows, n, heads, d = query.shape
    rotated = kernels.rotary_cache_(
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
    kv_heads = key.shape[2] or heads
    return rotated.view(rows, kv_heads, heads // kv_heads * n, d)


def fold_mask(mask: Tensor, shape: AttentionShape) -> Tensor:
    """A mask [rows, 1, n, tokens] as `attend_folded` takes it, [rows, 1, group * n, tokens]."""
    return mask.repeat(1, 1, shape.heads // shape.kv_heads, 1)


def attend_folded(query: Tensor, key: Tensor, value: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention without a causal rule.

    The query heads that share a key head are folded into its token axis, so keys and values are never repeated in memory.

    Args:
        query: [rows, kv_heads, group * n, d]. key, value: [rows, kv_heads, tokens, d].
        mask: None, or additive, broadcastable to [rows, 1, group * n, tokens].

    Returns:
        [rows, n, heads * d].
    """
    rows, kv_heads, folded, d = query.shape
    group = folded // n if n else 1
    # Looked up at each call: other libraries replace it in torch, for dense models too.
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.view(rows, kv_heads, group, n, d).permute(0, 3, 1, 2, 4).reshape(rows, n, kv_heads * group * d)


@dataclass(frozen=True)
class RowGeometry:
    """Position and length of every row's image span."""

    prefix: tuple[int, ...]
    """Text tokens before the span, per row."""
    span: int
    """Tokens of the span, the same in all rows."""

    @property
    def longest(self) -> int:
        return max(self.prefix)

    def first(self, rows: int) -> RowGeometry:
        return RowGeometry(self.prefix[:rows], self.span)

    def groups(self) -> list[tuple[int, int, int]]:
        """(first row, end row, keys): runs of adjacent rows that attend to the same number of keys."""
        result: list[tuple[int, int, int]] = []
        for row, length in enumerate(self.prefix):
            seen = self.span + length
            if result and result[-1][2] == seen:
                result[-1] = (result[-1][0], row + 1, seen)
            else:
                result.append((row, row + 1, seen))
        return result


class SpanPass:
    """Image tokens attend to their whole span and to the cached prefix.

    The cache stores a row's span first, then its prefix. Attention does not depend on the order of keys, and so a row's keys
    are contiguous from slot 0, whatever the length of its prefix.
    """

    def __init__(self, cache: Tensor, geometry: RowGeometry, kernels: KernelSet, mask: Tensor | None = None):
        """Args:
        cache: [layers, 2, rows, slots, kv_heads, d].
        geometry: of these rows.
        mask: additive [rows, 1, 1, slots], where prefix lengths must be read on the device; None: from the geometry.
        """
        self.cache = cache
        self.kernels = kernels
        groups = geometry.groups()
        if mask is None and len(groups) > MAX_GROUPS:
            mask = slot_mask(
                torch.tensor(geometry.prefix, device=cache.device) + geometry.span, cache.shape[3], cache.dtype
            )
        self._mask = mask
        self._groups = groups if mask is None else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        keys, values = self.cache[layer]
        folded = rotate_into(self.kernels, query, key, value, rope, norms, keys, values)
        return self._attend(layer, folded, query.shape[1])

    def routed(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, query_rope: Rope) -> Tensor:
        """Queries of some span tokens, [rows, k, heads, d], with their rotary table; keys and values of all span tokens."""
        # Keys and values first, then the queries: one call takes the same number of tokens of each.
        keys, values = self.cache[layer]
        kernels, none = self.kernels, slice(0)
        rotate_into(kernels, key[:, :, none], key, value, rope, None, keys, values)
        rest = (key[:, : query.shape[1], none], value[:, : query.shape[1], none], query_rope, None)
        folded = rotate_into(kernels, query, *rest, keys[:, :, none], values[:, :, none])
        group = query.shape[2] // key.shape[2]
        return self._attend(
            layer, folded.view(query.shape[0], key.shape[2], group * query.shape[1], -1), query.shape[1]
        )

    def _attend(self, layer: int, folded: Tensor, n: int) -> Tensor:
        """`attend_folded`, n queries per row, over each row's span and prefix."""
        keys, values = (each.transpose(1, 2) for each in self.cache[layer])
        if self._groups is None:
            return attend_folded(folded, keys, values, n, self._mask)
        parts = [
            attend_folded(folded[first:last], keys[first:last, :, :seen], values[first:last, :, :seen], n)
            for first, last, seen in self._groups
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class MaskedPass:
    """A whole sequence under an explicit mask; every layer's keys and values go into the cache."""

    def __init__(self, mask: Tensor, cache: Tensor, kernels: KernelSet, store: Tensor | None = None):
        """Args:
        mask: additive [rows or 1, 1, group * tokens, tokens] (`fold_mask`).
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
        folded = rotate_into(self.kernels, query, key, value, rope, norms, pair[0], pair[1])
        if self.store is not None:
            self.store[layer].copy_(pair[:, :, : self.store.shape[3]])
        return attend_folded(folded, pair[0].transpose(1, 2), pair[1].transpose(1, 2), query.shape[1], self.mask)


class CausalPass(MaskedPass):
    """A text sequence from its start; every layer's keys and values go into the cache."""

    def __init__(self, tokens: int, shape: AttentionShape, cache: Tensor, kernels: KernelSet):
        mask = additive(causal(tokens, cache.device)[None, None], cache.dtype)
        super().__init__(fold_mask(mask, shape), cache, kernels)
