"""Gathered SwiGLU feed-forward: only the selected neurons of an FFN are computed.

The neurons S are given as `runs`, as `index` or as a `selection`. n is their number, and the columns of h have their order.
Storage is fp32, bf16 or fp16. Sums are fp32 in a fixed order, so a row's result does not depend on other rows or on the
number of threads. On CUDA whole FFNs of at most 16 rows in 16 bits have a kernel that sums in another order than those of more
rows; `FLASHU_FFN_DECODE=0` in the environment turns it off.

Errors: ValueError for shapes, strides, aliasing and devices, TypeError for dtypes, IndexError for runs and indices.
Source: FFN neuron pruning and the hybrid FFN of FlashU (arXiv 2603.15271); here weights are neither copied nor pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .common import call, call_into, capability, fake, fake_out, flatten, torch_ops
from .selection import Selection, index_tensor


@capability()
def gathered_swiglu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    runs: Any = None,
    index: Any = None,
    out: Tensor | None = None,
    selection: Selection | None = None,
    gate_add: Tensor | None = None,
    up_add: Tensor | None = None,
) -> Tensor:
    """silu(x W_gate[S]^T + gate_add) * (x W_up[S]^T + up_add) in one pass.

    Args:
        x: [..., hidden].
        w_gate, w_up: [intermediate, hidden], torch's Linear layout, rows may be strided.
        runs: neurons as ascending, disjoint (start, length) pairs: a list, a flat list, a tensor or an array.
        index: or as numbers [n], int32 or int64, in any order, each at most once: a tensor, a list or an array.
        selection: or as a `Selection`, which is checked once for many calls. None for all three: all neurons.
        out: [..., n] to write into, else a new contiguous tensor.
        gate_add, up_add: [..., n] in x's dtype, added in fp32, such as what adapters give. On the CPU only.

    Returns:
        [..., n] in x's dtype.
    """
    chosen = selected_neurons(w_gate, 0, runs, index, selection)
    return call_into(torch_ops.gathered_swiglu, x, w_gate, w_up, **chosen, gate_add=gate_add, up_add=up_add, out=out)


@capability()
def gathered_down(
    h: Tensor,
    w_down: Tensor,
    runs: Any = None,
    index: Any = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """h W_down[:, S]^T (+ residual).

    Args:
        h: [..., n], columns in the order of the selection.
        w_down: [hidden, intermediate], torch's Linear layout.
        runs: neurons as ascending, disjoint (start, length) pairs: a list, a flat list, a tensor or an array.
        index: or as numbers [n], int32 or int64, in any order, each at most once: a tensor, a list or an array.
        selection: or as a `Selection`, which is checked once for many calls. None for all three: all neurons.
        residual: [..., hidden], added in fp32 before the single rounding.
        out: [..., hidden] to write into; shares no memory with the inputs.

    Returns:
        [..., hidden] in h's dtype.
    """
    chosen = selected_neurons(w_down, 1, runs, index, selection)
    return call_into(torch_ops.gathered_down, h, w_down, **chosen, residual=residual, out=out)


@capability()
def gathered_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    runs: Any = None,
    index: Any = None,
    residual: Tensor | None = None,
    norms: Tensor | None = None,
    out: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """The whole FFN over the selected neurons, without a tensor for the intermediate activations.

    They stay in fp32, or are rounded once to bf16 for bf16 weights on CPUs with bf16 dot products.
    fp32, bf16 or fp16, the same for all but index and norms, on one device; rows may be strided, values within a row may not.

    Args:
        x: [..., hidden].
        w_gate, w_up: [intermediate, hidden].
        w_down: [hidden_out, intermediate].
        runs: neurons as ascending, disjoint (start, length) pairs: a list, a flat list, a tensor or an array.
        index: or as numbers [n], int32 or int64, in any order, each at most once: a tensor, a list or an array.
        selection: or as a `Selection`, which is checked once for many calls. None for all three: all neurons.
        residual: [..., hidden_out], added in fp32 before the single rounding.
        norms: [n] fp32 or fp64, += the squares of each neuron's activation summed over all rows (calibration).
        out: [..., hidden_out] to write into; not together with norms.

    Returns:
        [..., hidden_out] in x's dtype.
    """
    weights, chosen = (w_gate, w_up, w_down), selected_neurons(w_gate, 0, runs, index, selection)
    if norms is None:
        return call_into(torch_ops.gathered_ffn, x, *weights, **chosen, residual=residual, out=out)
    if out is not None:
        raise ValueError("gathered_ffn: out: expected None together with norms, got a tensor")
    return call(torch_ops.gathered_ffn_norms.default, x, *weights, norms, **chosen, residual=residual)


@capability()
def neuron_norms_(acc: Tensor, h: Tensor) -> Tensor:
    """acc[j] += sum over all rows of h[..., j]^2; the running statistic of Wanda-style scores.

    Sums are fp64 on the CPU; on CUDA devices fp32 over 16 rows at a time, and fp64 over these.

    Args:
        acc: [n] fp32 or fp64, updated in place.
        h: [..., n] fp32, bf16 or fp16.

    Returns:
        acc.
    """
    call(torch_ops.neuron_norms_.default, acc, h)
    return acc


def selected_neurons(weight: Tensor, dim: int, runs: Any, index: Any, selection: Selection | None) -> dict[str, Any]:
    """The neurons as arguments of the operators; `dim` is the weight's neuron dimension."""
    if selection is None:
        numbers = None if index is None else index_tensor(index, weight)
        return {"runs": None if runs is None else flatten("runs", runs, 2), "index": numbers}
    if runs is not None or index is not None:
        raise ValueError("selection: expected neither runs nor index with it")
    if not isinstance(selection, Selection):
        kind = type(selection)
        raise TypeError(
            f"selection: expected a {Selection.__module__}.Selection, got {kind.__module__}.{kind.__qualname__} "
            "(Selection.from_runs makes one)"
        )
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[dim] != selection.limit:
        raise ValueError(
            f"selection: expected one of {weight.shape[dim]} neurons as the weights have, got one of {selection.limit}"
        )
    listed = selection.list is not None
    return {"runs": selection.runs, "index": selection.list, "listed": listed, "block": selection.block}


def _count(weight: Tensor, dim: int, runs: Sequence[int] | None, index: Tensor | None) -> int:
    if runs is not None:
        return sum(runs[1::2])
    return weight.shape[dim] if index is None else index.shape[0]


@fake("gathered_swiglu")
def _gathered_swiglu_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    runs: Sequence[int] | None = None,
    index: Tensor | None = None,
    listed: bool = False,
    block: int = 1,
    gate_add: Tensor | None = None,
    up_add: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _count(w_gate, 0, runs, index)))


@fake("gathered_down")
def _gathered_down_fake(
    h: Tensor,
    w_down: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    listed: bool = False,
    block: int = 1,
) -> Tensor:
    return h.new_empty((*h.shape[:-1], w_down.shape[0]))


@fake("gathered_ffn")
def _gathered_ffn_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    listed: bool = False,
    block: int = 1,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


@fake("gathered_ffn_norms")
def _gathered_ffn_norms_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    norms: Tensor,
    runs: Sequence[Any] | None = None,
    index: Tensor | None = None,
    residual: Tensor | None = None,
    listed: bool = False,
    block: int = 1,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


@fake("list_neurons")
def _list_neurons_fake(
    numbers: Tensor, limit: int, runs: Sequence[int] | None = None, index: Tensor | None = None
) -> bool:
    raise NotImplementedError("list_neurons: make the selection before tracing, not in a traced function")


@fake("neuron_norms_")
def _neuron_norms_fake(acc: Tensor, h: Tensor) -> None:
    return None


def flops(rows: int, hidden: int, neurons: int, width: int | None = None) -> int:
    """FLOPs of one gathered FFN: 2 x rows x neurons x (2 x hidden + width)."""
    return 2 * rows * neurons * (2 * hidden + (hidden if width is None else width))


def weight_bytes(hidden: int, neurons: int, dtype: torch.dtype) -> int:
    """Bytes of the weights that one gathered FFN reads."""
    return math.prod((3, hidden, neurons, dtype.itemsize))


fake_out("gathered_swiglu", _gathered_swiglu_fake)
fake_out("gathered_down", _gathered_down_fake)
fake_out("gathered_ffn", _gathered_ffn_fake)
