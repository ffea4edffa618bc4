"""Routing: scores of tokens and layers, order-preserving selection, gather and scatter of rows.

Scores are fp32, summed in fp64 on the CPU; on CUDA devices in fp32, with the mean over tokens in fp64. Selections return
int64 indices and int32 counts. In gather and scatter an index of -1 is padding: it reads zeros and writes nothing.

Errors: ValueError for shapes, strides, aliasing, devices, NaN scores and k, TypeError for dtypes, IndexError for
indices out of range. Values on CUDA devices are not checked, which would need a read-back: NaN is smaller than every number
and passes no threshold, an index out of range is padding.
Source: dynamic layer skipping and value-norm token pruning of FlashU (arXiv 2603.15271).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import call, call_into, capability, fake, fake_out, torch_ops
from .selection import index_tensor

REDUCTIONS = ("none", "mean", "last")
"""How cosine_importance reduces tokens: not at all, to the mean over all, or to the last one of each sequence."""


@capability()
def cosine_importance(x_in: Tensor, x_out: Tensor, reduce: str = "none", *, out: Tensor | None = None) -> Tensor:
    """1 - cosine(x_in, x_out) per token, norms at least 1e-8: how much a layer rotated its input.

    Args:
        x_in, x_out: [..., tokens, width] before and after the layer.
        reduce: 'none' gives [..., tokens], 'mean' one number over all tokens (NaN if there are none), 'last' [...].
        out: fp32, contiguous.

    Returns:
        fp32 tensor of the shape above.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"cosine_importance: reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return call_into(torch_ops.cosine_importance, x_in, x_out, REDUCTIONS.index(reduce), out=out)


@capability()
def value_norms(v: Tensor, *, out: Tensor | None = None) -> Tensor:
    """L2 norm of every token's value vector over all kv heads.

    Args:
        v: [batch, kv_heads, tokens, head_dim], any strides but the last, which is 1.
        out: fp32 [batch, tokens], contiguous.

    Returns:
        fp32 [batch, tokens].
    """
    return call_into(torch_ops.value_norms, v, out=out)


@capability()
def select_topk(
    scores: Tensor, k: int, *, index: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best scores of each row; of equal scores the lower index wins.

    Args:
        scores: [..., tokens] without NaN.
        k: 0 to tokens.
        index, count: outputs to write into, both or neither.

    Returns:
        index int64 [..., k] in ascending order, count int32 [...], always k.
    """
    if index is None and count is None:
        return call(torch_ops.select_topk.default, scores, k)
    return call(torch_ops.select_topk.out, scores, k, **_outputs("select_topk", index, count))


@capability()
def select_threshold(
    scores: Tensor, threshold: float, capacity: int, *, index: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first `capacity` scores >= threshold of each row, in order.

    Args:
        scores: [..., tokens] without NaN.
        threshold: compared in fp32.
        capacity: length of the result.
        index, count: outputs to write into, both or neither.

    Returns:
        index int64 [..., capacity], padded with -1; count int32 [...]: scores that passed, may exceed capacity.
    """
    if index is None and count is None:
        return call(torch_ops.select_threshold.default, scores, threshold, capacity)
    return call(
        torch_ops.select_threshold.out, scores, threshold, capacity, **_outputs("select_threshold", index, count)
    )


@capability()
def gather_rows(rows: Tensor, index: Any, *, out: Tensor | None = None) -> Tensor:
    """rows[index], zeros for an index of -1.

    Args:
        rows: [tokens, width] or [batch, tokens, width].
        index: int32 or int64 [n] or [batch, n], each in [-1, tokens): a tensor, a list or an array.
        out: [n, width] or [batch, n, width], shares no memory with rows.

    Returns:
        [n, width] or [batch, n, width] in rows' dtype.
    """
    return call_into(torch_ops.gather_rows, rows, index_tensor(index, rows), out=out)


@capability()
def scatter_rows_(rows: Tensor, index: Any, moved: Tensor) -> Tensor:
    """rows[index] = moved in place; the last of repeated entries wins, entries of -1 are skipped.

    Args:
        rows: [tokens, width] or [batch, tokens, width].
        index: int32 or int64 [n] or [batch, n]: a tensor, a list or an array.
        moved: [n, width] or [batch, n, width].

    Returns:
        rows.
    """
    call(torch_ops.scatter_rows_.default, rows, index_tensor(index, rows), moved)
    return rows


@capability()
def scatter_add_rows_(rows: Tensor, index: Any, moved: Tensor) -> Tensor:
    """rows[index] += moved in place, in order of the entries, each sum rounded; entries of -1 are skipped.

    Args and returns: as `scatter_rows_`.
    """
    call(torch_ops.scatter_add_rows_.default, rows, index_tensor(index, rows), moved)
    return rows


def _outputs(op: str, index: Tensor | None, count: Tensor | None) -> dict[str, Tensor]:
    if index is None or count is None:
        missing = "index" if index is None else "count"
        raise ValueError(f"{op}: {missing}: expected a tensor, as the other output is given, got None")
    return {"index": index, "count": count}


@fake("cosine_importance")
def _cosine_importance_fake(x_in: Tensor, x_out: Tensor, reduce: int = 0) -> Tensor:
    shape = x_in.shape[: max(0, x_in.dim() - (1, x_in.dim(), 2)[reduce])]
    return x_in.new_empty(shape, dtype=torch.float32)


@fake("value_norms")
def _value_norms_fake(v: Tensor) -> Tensor:
    return v.new_empty((v.shape[0], v.shape[2]), dtype=torch.float32)


@fake("select_topk")
def _select_topk_fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    lead = scores.shape[:-1]
    return scores.new_empty((*lead, k), dtype=torch.int64), scores.new_empty(lead, dtype=torch.int32)


@fake("select_topk.out")
def _select_topk_out_fake(scores: Tensor, k: int, *, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return index, count


@fake("select_threshold")
def _select_threshold_fake(scores: Tensor, threshold: float, capacity: int) -> tuple[Tensor, Tensor]:
    return _select_topk_fake(scores, capacity)


@fake("select_threshold.out")
def _select_threshold_out_fake(
    scores: Tensor, threshold: float, capacity: int, *, index: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    return index, count


@fake("gather_rows")
def _gather_rows_fake(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:-2], index.shape[-1], rows.shape[-1]))


@fake("scatter_rows_")
def _scatter_rows_fake(rows: Tensor, index: Tensor, moved: Tensor) -> None:
    return None


@fake("scatter_add_rows_")
def _scatter_add_rows_fake(rows: Tensor, index: Tensor, moved: Tensor) -> None:
    return None


fake_out("cosine_importance", _cosine_importance_fake)
fake_out("value_norms", _value_norms_fake)
fake_out("gather_rows", _gather_rows_fake)
