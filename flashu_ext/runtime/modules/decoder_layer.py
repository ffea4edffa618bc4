"""One layer of the language model on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from ...models.parts import AttentionShape
from ...ops.kernel_sets import KernelSet
from .attention import AttentionPass, Rope, SpanPass
from .layer import Layer

__all__ = ["decoder_layer", "project_qkv", "pruning_layer", "routed_decoder_layer"]

Pass = TypeVar("Pass", bound=AttentionPass)
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Pass]]
"""(normed [1, n, hidden], value [1, n, kv_heads, d]) -> indices of the tokens to keep, int64 [m] ascending, and their
attention pass."""


def project_qkv(attention: Any, x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, n, hidden] -> query [rows, n, heads, d], key and value [rows, n, kv_heads, d], not yet rotated."""
    query, key = _project_qk(attention, x, shape)
    return query, key, _project_value(attention, x, shape)


def _project_qk(attention: Any, x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    query = attention.q_proj(x).view(*x.shape[:2], shape.heads, shape.head_dim)
    return query, attention.k_proj(x).view(*x.shape[:2], shape.kv_heads, shape.head_dim)


def _project_value(attention: Any, x: Tensor, shape: AttentionShape) -> Tensor:
    value: Tensor = attention.v_proj(x).view(*x.shape[:2], shape.kv_heads, shape.head_dim)
    return value


def _project_kv(attention: Any, x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    key = attention.k_proj(x).view(*x.shape[:2], shape.kv_heads, shape.head_dim)
    return key, _project_value(attention, x, shape)


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
    query, key, value = project_qkv(layer.attention, normed, shape)
    return _after_attention(layer, x, attention(index, query, key, value, rope), task)


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
    value = layer.attention.v_proj(normed)
    keep, attention = choose(normed, value.view(*value.shape[:2], shape.kv_heads, shape.head_dim))
    x, normed, value = (kernels.gather_rows(rows[0], keep)[None] for rows in (x, normed, value))
    rope = (rope[0][:, keep], rope[1][:, keep])
    query, key = _project_qk(layer.attention, normed, shape)
    value = value.view(*value.shape[:2], shape.kv_heads, shape.head_dim)
    attended = attention(index, query, key, value, rope)
    return _after_attention(layer, x, attended, task), rope, attention


def _after_attention(layer: Layer, x: Tensor, attended: Tensor, task: str | None) -> Tensor:
    """Output projection, residual, norm and FFN; `x` is overwritten."""
    attended = layer.attention.o_proj(attended)
    return layer.ffn(layer.before_ffn.after_adding(attended, x), task, x)


def routed_decoder_layer(
    layer: Layer,
    index: int,
    x: Tensor,
    active: Tensor,
    rope: Rope,
    attention: SpanPass,
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
    rows, k = active.shape
    normed = layer.before_attention(x)
    key, value = _project_kv(layer.attention, normed, shape)
    residual = kernels.gather_rows(x, active)
    query = layer.attention.q_proj(kernels.gather_rows(normed, active)).view(rows, k, shape.heads, shape.head_dim)
    own = tuple(kernels.gather_rows(table, active) for table in rope)
    attended = layer.attention.o_proj(attention.routed(index, query, key, value, rope, (own[0], own[1])))
    normed = layer.before_ffn.after_adding(attended, residual)
    return kernels.scatter_rows_(x, active, layer.ffn(normed, task, residual))
