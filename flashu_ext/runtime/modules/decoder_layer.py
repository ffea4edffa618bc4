"""One layer of the language model on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...models.adapter import AttentionShape
from ...ops.kernel_sets import KernelSet
from .attention import AttentionPass, Rope, RoutedPass
from .layer import Layer

__all__ = ["decoder_layer", "expert_layer", "in_heads", "pruning_layer", "routed_decoder_layer"]

Pass = TypeVar("Pass", bound=AttentionPass)
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Pass]]
"""(normed [1, n, hidden], value [1, n, kv_heads, d]) -> indices of the tokens to keep, int64 [m] ascending, and their
attention pass."""


def in_heads(projected: Sequence[Tensor], shape: AttentionShape) -> Iterator[Tensor]:
    """Projections [rows, n, heads * d] -> [rows, n, heads, d] each."""
    return (each.unflatten(-1, (-1, shape.head_dim)) for each in projected)


def decoder_layer(
    layer: Layer,
    index: int,
    x: Tensor,
    rope: Rope,
    attention: AttentionPass,
    shape: AttentionShape,
    task: str | None,
) -> Tensor:
    """Qwen2 decoder layer: x [rows, n, hidden] -> [rows, n, hidden]. `x` is consumed: it may be overwritten.

    Args:
        index: its number, for the attention pass's cache.
        task: whose neuron set the FFN uses; None: all neurons.
    """
    normed = layer.before_attention(x)
    query, key, value = in_heads(layer.attention.query_key_value(normed), shape)
    return _after_attention(layer, x, attention(index, query, key, value, rope, layer.head_norms), task)


def expert_layer(
    layers: Sequence[Layer],
    index: int,
    tokens: Sequence[Tensor],
    rope: Rope,
    attention: AttentionPass,
    shape: AttentionShape,
    tasks: Sequence[str | None],
) -> list[Tensor]:
    """A decoder layer with several experts and one attention: each expert's tokens [rows, n, hidden] -> the same, overwritten.

    Args:
        rope, attention: of all tokens, the experts' one after another.
        tasks: of each expert, as in `decoder_layer`.
    """
    counts = [own.shape[1] for own in tokens]
    projected: list[list[Tensor]] = []
    for layer, own in zip(layers, tokens, strict=True):
        query, key, value = in_heads(layer.attention.query_key_value(layer.before_attention(own)), shape)
        # Each expert has norms of its own, so they cannot be part of the rotation of all tokens.
        projected.append([*layer.normed_heads(query, key), value])
    query, key, value = (torch.cat(parts, dim=1) for parts in zip(*projected, strict=True))
    attended = attention(index, query, key, value, rope).split(counts, dim=1)
    parts = zip(layers, tokens, attended, tasks, strict=True)
    return [_after_attention(layer, own, seen.contiguous(), task) for layer, own, seen, task in parts]


def pruning_layer(
    layer: Layer,
    index: int,
    x: Tensor,
    rope: Rope,
    choose: Choose[Pass],
    shape: AttentionShape,
    kernels: KernelSet,
    task: str | None,
) -> tuple[Tensor, Rope, Pass]:
    """A decoder layer that drops tokens: x [1, n, hidden] -> ([1, m, hidden], rotary table and pass of the m kept tokens).

    The choice needs all tokens normed and projected to values. The rest is computed for kept tokens only, so a dropped token
    costs one of the layer's seven matrix products.
    """
    normed = layer.before_attention(x)
    value = layer.attention.value(normed)
    keep, attention = choose(normed, *in_heads((value,), shape))
    x, normed, value = (kernels.gather_rows(rows[0], keep)[None] for rows in (x, normed, value))
    rope = (rope[0][:, keep], rope[1][:, keep])
    query, key, value = in_heads((*layer.attention.query_key(normed), value), shape)
    attended = attention(index, query, key, value, rope, layer.head_norms)
    return _after_attention(layer, x, attended, task), rope, attention


def _after_attention(layer: Layer, x: Tensor, attended: Tensor, task: str | None) -> Tensor:
    """Output projection, residual, norm and FFN; `x` is overwritten."""
    attended = layer.attention.out(attended)
    return layer.ffn(layer.before_ffn.after_adding(attended, x), task, x)


def routed_decoder_layer(
    layer: Layer,
    index: int,
    x: Tensor,
    active: Tensor,
    rope: Rope,
    attention: RoutedPass,
    shape: AttentionShape,
    kernels: KernelSet,
    task: str | None,
) -> Tensor:
    """`decoder_layer` for the active tokens; the others pass unchanged: x [rows, n, hidden], overwritten and returned.

    The active tokens attend to all n tokens, so their output is that of the whole layer. Keys and values of skipped tokens
    are therefore computed from their unchanged state. They are cheap (a seventh of the attention's weights in the 1.5B model,
    an eighth in the 7B one); queries, output projection and FFN are saved.

    Args:
        active: int64 [rows, k], the tokens to compute, distinct.
        rope: for all n tokens. The others: as for `decoder_layer`.
    """
    normed = layer.before_attention(x)
    key, value = in_heads(layer.attention.key_value(normed), shape)
    residual = kernels.gather_rows(x, active)
    (query,) = in_heads((layer.attention.query(kernels.gather_rows(normed, active)),), shape)
    own = tuple(kernels.gather_rows(table, active) for table in rope)
    attended = attention.routed(index, query, key, value, rope, (own[0], own[1]), active, layer.head_norms)
    attended = layer.attention.out(attended)
    normed = layer.before_ffn.after_adding(attended, residual)
    return kernels.scatter_rows_(x, active, layer.ffn(normed, task, residual))
