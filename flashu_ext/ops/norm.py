"""RMSNorm (plain, adaLN-modulated, fused residual add), gated residual, and rotary embedding with key-value cache writes.

Storage is fp32, bf16 or fp16, one dtype per call; results are rounded once. On the CPU statistics are summed in fp64 and
products computed one step wider than the storage (fp64 for fp32, else fp32); on CUDA devices both are fp32. Last dimensions
are contiguous, other strides are free. Each row is computed independently in a fixed order.

Errors: ValueError for shapes, strides, aliasing, devices and eps, TypeError for dtypes.
Source: Qwen2's RMSNorm and rotary embedding; the adaLN modulation of Show-o2's diffusion head (`modulate`, `gate`).
"""

from __future__ import annotations

from torch import Tensor

from .common import call, call_into, capability, fake, fake_out, torch_ops


@capability()
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) per row; with shift and scale that * (1 + scale[b]) + shift[b] in batch b.

    Args:
        x: [..., width]; with shift and scale [batches, tokens, width].
        weight: [width].
        shift, scale: [batches, width], both or neither.
        out: as x, shares no memory with the inputs.

    Returns:
        [..., width] in x's dtype.
    """
    return call_into(torch_ops.rms_norm, x, weight, eps, shift, scale, out=out)


@capability()
def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, then x = rms_norm(residual): both in place.

    Args:
        x: [..., width], overwritten by the norm.
        residual: as x, overwritten by the sum.
        weight: [width].

    Returns:
        x.
    """
    call(torch_ops.add_rms_norm_.default, x, residual, weight, eps)
    return x


@capability()
def gate_add_(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """residual += gate[b] * y in batch b, or residual += y without a gate: in place.

    Args:
        residual: [batches, tokens, width].
        y: as residual.
        gate: [batches, width].

    Returns:
        residual.
    """
    call(torch_ops.gate_add_.default, residual, y, gate)
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
    """Apply rotary embedding to queries and keys and write keys and values to a cache, in one launch.

    The embedding is x * cos + (-x[d/2:], x[:d/2]) * sin, rounded once. With norms every head x is first replaced by
    rms_norm(x, norm, eps), rounded.

    Args:
        query: [rows, n, heads, d], d even.
        key, value: [rows, n, kv_heads, d].
        cos, sin: [rows or 1, n, d].
        keys, values: [rows, capacity, kv_heads, d], written; may be transposed views. Their extents must not overlap each
            other or an input.
        start: int64 [rows], [1] or []: token i of row r is written to slot start[r] + i; slots outside [0, capacity)
            are skipped. None: 0, with n <= capacity.
        query_norm, key_norm: [d], both or neither.
        out: [rows, heads, n, d], shares no memory with the others.

    Returns:
        The queries, [rows, heads, n, d], contiguous.
    """
    inputs = (query, key, value, cos, sin, keys, values, start, query_norm, key_norm, eps)
    return call_into(torch_ops.rotary_cache_, *inputs, out=out)


@fake("rms_norm")
def _rms_norm_fake(
    x: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape)


@fake("add_rms_norm_")
def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    return None


@fake("gate_add_")
def _gate_add_fake(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> None:
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
