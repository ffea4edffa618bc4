"""Every op in plain torch: the oracle of the tests, and the fallback where a kernel is missing.

Same names, arguments and results as `flashu_ext.ops`. Arithmetic is fp32, or fp64 for fp64 inputs, which the ops do not
support: fp64 gives the exact result, a kernel's dtype that of plain torch. No checks beyond torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .selection import Selection

__all__ = [
    "add_rms_norm_",
    "attention",
    "cosine_importance",
    "feature_delta",
    "gate_add_",
    "gather_rows",
    "gathered_down",
    "gathered_ffn",
    "gathered_swiglu",
    "guided_euler_step_",
    "int8_ffn",
    "int8_linear",
    "linear",
    "linears",
    "neuron_norms_",
    "rms_norm",
    "rotary_cache_",
    "scatter_add_rows_",
    "scatter_rows_",
    "select_threshold",
    "select_topk",
    "taylor_predict",
    "taylor_update_",
    "value_norms",
]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def _groups(numbers: Sequence[Any], size: int) -> list[tuple[int, ...]]:
    flat = [n for entry in numbers for n in (entry if isinstance(entry, (tuple, list)) else (entry,))]
    return [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]


# ---- ffn


def _neurons(
    runs: Sequence[Any] | None, index: Tensor | None, selection: Selection | None, device: torch.device
) -> Tensor | slice:
    if selection is not None:
        runs, index = selection.runs, selection.list
    if index is not None:
        return index.long()
    if runs is None:
        return slice(None)
    if len(runs) == 2 and isinstance(runs[0], int):
        return slice(runs[0], runs[0] + runs[1])
    parts = [torch.arange(start, start + length, device=device) for start, length in _groups(runs, 2)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def gathered_swiglu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    *,
    out: Tensor | None = None,
    selection: Selection | None = None,
    gate_add: Tensor | None = None,
    up_add: Tensor | None = None,
) -> Tensor:
    """See `flashu_ext.ops.gathered_swiglu`. GEMMs run in the storage dtype, as in torch."""
    s = _neurons(runs, index, selection, x.device)
    gate, up = F.linear(x, w_gate[s]), F.linear(x, w_up[s])
    gate = gate if gate_add is None else gate + gate_add
    return _into(out, F.silu(gate) * (up if up_add is None else up + up_add))


def gathered_down(
    h: Tensor,
    w_down: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """See `flashu_ext.ops.gathered_down`. The GEMM runs in the storage dtype, as in torch."""
    y = F.linear(h, w_down[:, _neurons(runs, index, selection, h.device)])
    return _into(out, y if residual is None else y + residual)


def gathered_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    norms: Tensor | None = None,
    *,
    out: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """See `flashu_ext.ops.gathered_ffn`."""
    h = gathered_swiglu(x, w_gate, w_up, runs, index, selection=selection)
    if norms is not None:
        neuron_norms_(norms, h)
    return gathered_down(h, w_down, runs, index, residual, out=out, selection=selection)


def neuron_norms_(acc: Tensor, h: Tensor) -> Tensor:
    """See `flashu_ext.ops.neuron_norms_`."""
    return acc.add_(h.reshape(-1, h.shape[-1]).double().square().sum(0))


# ---- linear

_EPILOGUES = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `flashu_ext.ops.linear`. The GEMM runs in the storage dtype, as in torch."""
    return _into(out, finish_linear(F.linear(x, weight, bias), residual, epilogue))


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `flashu_ext.ops.int8_linear`. The GEMM runs in the storage dtype, as torchao's does."""
    y = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return _into(out, finish_linear(y if bias is None else y + bias, residual, epilogue))


def int8_ffn(
    x: Tensor,
    w_gate: Tensor,
    gate_scale: Tensor,
    w_up: Tensor,
    up_scale: Tensor,
    w_down: Tensor,
    down_scale: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """See `flashu_ext.ops.int8_ffn`. GEMMs run in the storage dtype, as torchao's do."""
    s = _neurons(runs, index, selection, x.device)
    gate, up = int8_linear(x, w_gate[s], gate_scale[s]), int8_linear(x, w_up[s], up_scale[s])
    return _into(out, int8_linear(F.silu(gate) * up, w_down[:, s], down_scale, None, residual))


def finish_linear(y: Tensor, residual: Tensor | None, epilogue: str) -> Tensor:
    """What follows a linear layer that is not on the kernel: activation and residual."""
    y = _EPILOGUES[epilogue](y)
    return y if residual is None else y + residual


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `flashu_ext.ops.linears`."""
    given = biases or [None] * len(weights)
    y = torch.cat([linear(x, w, b, None, epilogue) for w, b in zip(weights, given, strict=True)], dim=-1)
    return _into(out, y if residual is None else y + residual)


# ---- attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `flashu_ext.ops.attention`: by torch's function, which is what runs where there is no kernel.

    The query heads that share a key head are folded into its token axis, so keys and values are never repeated in memory.
    Adjacent rows of one length are one call, without a mask.
    """
    if lengths is not None and len(lengths):
        counts = lengths.tolist()
        firsts = [row for row in range(len(counts)) if row == 0 or counts[row] != counts[row - 1]]
        parts = [
            attention(query[a:b], key[a:b, :, : counts[a]], value[a:b, :, : counts[a]], mask=_of_rows(mask, a, b))
            for a, b in zip(firsts, [*firsts[1:], len(counts)], strict=True)
        ]
        return _into(out, torch.cat(parts))
    rows, heads, n, d = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(rows, kv_heads, heads // kv_heads * n, d)
    if mask is not None:
        mask = _wide_mask(mask[..., : key.shape[2]])
        mask = mask.repeat(1, 1, heads // kv_heads, 1) if mask.shape[2] > 1 else mask
    # Looked up at each call: other libraries replace it in torch, for dense models too.
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return _into(out, attended.view(rows, heads, n, d).transpose(1, 2))


def _wide_mask(mask: Tensor) -> Tensor:
    """fp16's lowest number is too small to swallow the scores: as fp32's, it makes keys alike as in every other dtype."""
    if mask.dtype != torch.float16:
        return mask
    return mask.float().masked_fill(mask == torch.finfo(torch.float16).min, torch.finfo(torch.float32).min)


def _of_rows(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[first:last]


def attention_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`attention` one row at a time: the other rows do not change the shape of a call, by which torch chooses kernels."""
    if query.shape[0] == 0:
        return _into(out, attention(query, key, value))
    counts = [key.shape[2]] * query.shape[0] if lengths is None else lengths.tolist()
    rows = [
        attention(query[r : r + 1], key[r : r + 1, :, :n], value[r : r + 1, :, :n], mask=_of_rows(mask, r, r + 1))
        for r, n in enumerate(counts)
    ]
    return _into(out, torch.cat(rows))


# ---- routing


def cosine_importance(x_in: Tensor, x_out: Tensor, reduce: str = "none", *, out: Tensor | None = None) -> Tensor:
    """See `flashu_ext.ops.cosine_importance`."""
    a, b = _wide(x_in), _wide(x_out)
    if reduce == "last":
        a, b = a[..., -1, :], b[..., -1, :]
    norms = a.norm(dim=-1).clamp_min(1e-8) * b.norm(dim=-1).clamp_min(1e-8)
    scores = 1 - (a * b).sum(-1) / norms
    return _into(out, scores.mean() if reduce == "mean" else scores)


def value_norms(v: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `flashu_ext.ops.value_norms`."""
    return _into(out, _wide(v).square().sum((1, 3)).sqrt())


def select_topk(
    scores: Tensor, k: int, *, index: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `flashu_ext.ops.select_topk`."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = order[..., :k].sort(dim=-1).values
    counts = torch.full(scores.shape[:-1], k, dtype=torch.int32, device=scores.device)
    return _into(index, chosen), _into(count, counts)


def select_threshold(
    scores: Tensor, threshold: float, capacity: int, *, index: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `flashu_ext.ops.select_threshold`."""
    passed = scores.float() >= torch.tensor(threshold, dtype=torch.float32, device=scores.device)
    tokens = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    first = torch.where(passed, tokens, scores.shape[-1]).sort(dim=-1).values
    chosen = F.pad(first, (0, max(0, capacity - scores.shape[-1])), value=scores.shape[-1])[..., :capacity]
    return _into(index, chosen.masked_fill(chosen == scores.shape[-1], -1)), _into(
        count, passed.sum(-1, dtype=torch.int32)
    )


def gather_rows(rows: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `flashu_ext.ops.gather_rows`."""
    at = index.long().clamp_min(0)[..., None].expand(*index.shape, rows.shape[-1])
    return _into(out, rows.gather(-2, at).masked_fill((index < 0)[..., None], 0))


def scatter_rows_(rows: Tensor, index: Tensor, moved: Tensor) -> Tensor:
    """See `flashu_ext.ops.scatter_rows_`."""
    for target, at, source in _sequences(rows, index, moved):
        # Entries of -1 go to an extra row, which is dropped: this needs no read-back to the host.
        padded = torch.cat([target, target[:1] if target.shape[0] else target.new_zeros(1, target.shape[1])])
        padded.index_copy_(0, torch.where(at < 0, target.shape[0], at.long()), source)
        target.copy_(padded[:-1])
    return rows


def scatter_add_rows_(rows: Tensor, index: Tensor, moved: Tensor) -> Tensor:
    """See `flashu_ext.ops.scatter_add_rows_`."""
    for target, at, source in _sequences(rows, index, moved):
        for entry, row in enumerate(at.tolist()):
            if row >= 0:
                target[row] = (_wide(target[row]) + _wide(source[entry])).to(rows.dtype)
    return rows


def _sequences(rows: Tensor, index: Tensor, moved: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(rows, index, moved)] if rows.dim() == 2 else list(zip(rows, index, moved, strict=True))


# ---- norm


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `flashu_ext.ops.rms_norm`."""
    normed = _normed(x, weight, eps)
    if shift is not None and scale is not None:
        normed = normed * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]
    return _into(out, normed.to(x.dtype))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `flashu_ext.ops.add_rms_norm_`."""
    residual.copy_(_wide(residual) + _wide(x))
    return x.copy_(_normed(residual, weight, eps))


def gate_add_(residual: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """See `flashu_ext.ops.gate_add_`."""
    gated = _wide(y) if gate is None else _wide(y) * _wide(gate)[:, None]
    return residual.copy_(_wide(residual) + gated)


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
    """See `flashu_ext.ops.rotary_cache_`. With `start` the whole cache is written, which needs no read-back."""
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps), rms_norm(key, key_norm, eps)
    _into_slots(keys, _rotated(key, cos, sin), start)
    _into_slots(values, value, start)
    turned = _rotated(query, cos, sin).transpose(1, 2)
    return turned.contiguous() if out is None else out.copy_(turned)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, n, heads, d] rotated by cos and sin [rows or 1, n, d], halves convention."""
    wide, half = _wide(x), x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * _wide(cos)[:, :, None] + turned * _wide(sin)[:, :, None]).to(x.dtype)


def _into_slots(cache: Tensor, x: Tensor, start: Tensor | None) -> None:
    """Token i of row r of x [rows, n, heads, d] is written to slot start[r] + i of the cache, if it exists."""
    (rows, n), capacity = x.shape[:2], cache.shape[1]
    if start is None:
        cache[:, :n] = x
    elif n:
        first = start.reshape(-1, 1).clamp(
            -n, capacity
        )  # out of range stays out of range, and the difference cannot overflow
        token = (torch.arange(capacity, device=x.device) - first).expand(rows, capacity)
        at = token.clamp(0, n - 1)[..., None, None].expand(rows, capacity, *x.shape[2:])
        cache.copy_(torch.where(((token >= 0) & (token < n))[..., None, None], x.gather(1, at), cache))


# ---- step


def guided_euler_step_(
    latents: Tensor, v: Tensor, s: Tensor, dt: Tensor, step: Tensor | int, *, velocity: Tensor | None = None
) -> Tensor:
    """See `flashu_ext.ops.guided_euler_step_`."""
    at = torch.as_tensor(step, device=latents.device).reshape(1)
    rows = _wide(v).reshape(v.shape[0], -1, latents.shape[1]).transpose(1, 2)
    if v.shape[0] != latents.shape[0]:
        conditional, unconditional = rows.chunk(2)
        rows = unconditional + s.index_select(0, at) * (conditional - unconditional)
    rows = rows.reshape(latents.shape)
    if velocity is not None:
        velocity.copy_(rows)
    return latents.copy_(_wide(latents) + dt.index_select(0, at) * rows)


def feature_delta(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `flashu_ext.ops.feature_delta`."""
    a, b = a.double(), b.double()
    sums = [
        ((a - b).abs().sum(), b.abs().sum()),
        ((a - b).norm(), b.norm()),
        ((a * b).sum(), a.norm() * b.norm()),
    ]
    ratios = [torch.where((x == 0) & (y == 0), torch.zeros_like(x), x / y) for x, y in sums]
    return _into(out, torch.stack(ratios).float())


def taylor_update_(state: Tensor, feature: Tensor, interval: float, count: int) -> Tensor:
    """See `flashu_ext.ops.taylor_update_`."""
    fresh = _wide(feature)
    for i in range(state.shape[0]):
        old = _wide(state[i]).clone()
        state[i] = fresh if i <= min(state.shape[0] - 1, count) else torch.zeros_like(fresh)
        fresh = (fresh - old) / interval
    return state


def taylor_predict(state: Tensor, ahead: float, count: int, *, out: Tensor | None = None) -> Tensor:
    """See `flashu_ext.ops.taylor_predict`."""
    wide = _wide(state)
    total = wide[0].clone()
    for i in range(1, min(state.shape[0] - 1, count - 1) + 1):
        total += ahead**i / math.factorial(i) * wide[i]
    return _into(out, total.to(state.dtype))
