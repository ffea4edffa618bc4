"""RMSNorm: plain, with the residual added, and modulated by adaLN on spans of tokens; the gated residual; and rotary
position embedding on the way into a key-value cache.

Storage is fp32, bf16 or fp16, one dtype for all tensors of a call. Statistics are summed in fp64, products are taken one
step wider than the storage (fp64 for fp32, else fp32) and rounded once. Last dimensions are contiguous, other strides
are free. Every row is computed by itself in one fixed order.

`spans` is a list of (row, offset, length) triples, or the same numbers flat, over [rows, tokens, width]; spans are
disjoint, and span s uses row s of shift, scale and gate. Tokens outside every span are not modulated.

Errors: ValueError for shapes, strides, aliasing, devices and eps, TypeError for dtypes, IndexError for spans.
Source: Qwen2's RMSNorm and rotary embedding; the adaLN modulation of Show-o2's diffusion head (`modulate`, `gate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .common import (
    call,
    call_into,
    capability,
    fake,
    fake_out,
    flatten,
    refuse_backward,
    refuse_backward_from,
)

_ops = torch.ops.flashu


@capability()
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) per row.

    Args:
        x: [..., width]. weight: [width]. out: as x, shares no memory with the inputs.

    Returns:
        [..., width] in x's dtype.
    """
    return call_into(_ops.rms_norm, x, weight, eps, out=out)


@capability()
def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, then x = rms_norm(residual): both in place.

    Args:
        x: [..., width], overwritten by the norm. residual: as x, overwritten by the sum. weight: [width].

    Returns:
        x.
    """
    call(_ops.add_rms_norm_.default, x, residual, weight, eps)
    return x


@capability()
def span_modulate(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    spans: Sequence[Any],
    eps: float = 1e-6,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """rms_norm(x) * (1 + scale[s]) + shift[s] inside span s, rms_norm(x) elsewhere.

    Args:
        x: [rows, tokens, width]. weight: [width]. shift, scale: [spans, width].
        out: as x, shares no memory with the inputs.

    Returns:
        [rows, tokens, width] in x's dtype.
    """
    return call_into(_ops.span_modulate, x, weight, shift, scale, flatten("spans", spans, 3), eps, out=out)


@capability()
def span_gate_add_(residual: Tensor, y: Tensor, gate: Tensor, spans: Sequence[Any]) -> Tensor:
    """residual += gate[s] * y inside span s, residual += y elsewhere, in place.

    Args:
        residual: [rows, tokens, width]. y: as residual. gate: [spans, width].

    Returns:
        residual.
    """
    call(_ops.span_gate_add_.default, residual, y, gate, flatten("spans", spans, 3))
    return residual


@capability()
def rotary_cache_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor | None = None,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """Turns queries and keys by their positions and puts keys and values into a cache, all in one launch.

    With norms every head is rms_norm(head, norm, eps), rounded, before it is turned; x is then
    x * cos + (-x[d/2:], x[:d/2]) * sin, rounded once.

    Args:
        query: [rows, n, heads, d], d even. key, value: [rows, n, kv_heads, d].
        cos, sin: [rows or 1, n, d].
        keys, values: [rows, capacity, kv_heads, d], written; a transposed view will do. Neither may overlap, by extent,
            the other or an input.
        start: int64 [rows], [1] or []: token i of row r goes to slot start[r] + i, and nowhere where that is outside
            [0, capacity). None: 0, and n <= capacity.
        query_norm, key_norm: [d], both or neither.
        out: [rows, heads, n, d], shares no memory with the others.

    Returns:
        The queries, [rows, heads, n, d], contiguous.
    """
    inputs = (query, key, value, cos, sin, keys, values, start, query_norm, key_norm, eps)
    return refuse_backward_from("rotary_cache_", call_into(_ops.rotary_cache_, *inputs, out=out))


@fake("rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@fake("add_rms_norm_")
def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    return None


@fake("span_modulate")
def _span_modulate_fake(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> Tensor:
    return x.new_empty(x.shape)


@fake("span_gate_add_")
def _span_gate_add_fake(residual: Tensor, y: Tensor, gate: Tensor, spans: Sequence[int]) -> None:
    return None


@fake("rotary_cache_")
def _rotary_cache_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape)


fake_out("rms_norm", _rms_norm_fake)
fake_out("rotary_cache_", _rotary_cache_fake)
fake_out("span_modulate", _span_modulate_fake)
for _name in ("rms_norm", "span_modulate"):
    refuse_backward(_name)
