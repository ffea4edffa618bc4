"""Linear layers with bias, activation and residual in one pass: one, or several of one input.

Storage is fp32, bf16 or fp16. Sums are fp32 in an order that K alone decides, so a row's result does not depend on other
rows, on its place among them or on the number of threads. On CUDA calls of at most 16 rows have a kernel that sums in another
order than those of more rows: the promise holds among calls of few rows and among calls of many, and for any number of rows
with `FLASHU_FFN_DECODE=0` in the environment, or where the runtime runs with `batch_invariant=True`.

Errors: ValueError for shapes, strides, aliasing, devices and the epilogue, TypeError for dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .common import call_into, capability, fake, fake_out, torch_ops

EPILOGUES = ("none", "gelu", "gelu_tanh", "silu")
"""What is applied to x W^T + bias: nothing, GELU (exact, by erf), GELU by tanh, or SiLU."""


@capability()
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """epilogue(x W^T + bias) + residual, rounded once at the end.

    Args:
        x: [..., K], neighbours of a row side by side (last stride 1).
        weight: [N, K], torch's Linear layout, rows may be strided.
        bias: [N].
        residual: [..., N], not broadcast, last stride 1; added in fp32 before the single rounding.
        epilogue: 'none', 'gelu' (exact), 'gelu_tanh' or 'silu'.
        out: [..., N] to write into; shares no memory with the inputs.

    Returns:
        [..., N] in x's dtype, which all tensors have. K = 0 gives epilogue(bias) + residual.

    Raises:
        ValueError: a shape, stride, overlap, device or the epilogue is wrong.
        TypeError: a dtype is wrong.
    """
    return call_into(torch_ops.linear, x, weight, bias, residual, epilogue_code("linear", epilogue), out=out)


@capability()
def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """Several linear layers of one input side by side, such as queries, keys and values: x is prepared once.

    Each weight's columns have the bits that `linear` gives them. On CUDA weights that are slices of one matrix, one behind the
    other, with biases that are so too or none, are one launch; others follow each other.

    Args:
        x: [..., K].
        weights: 1 to 4 of [N_i, K].
        biases: for each weight [N_i] or None.
        residual: [..., sum of N_i].
        epilogue: as in `linear`, of all columns.
        out: [..., sum of N_i] to write into; shares no memory with the inputs.

    Returns:
        [..., sum of N_i] in x's dtype, the columns in the order of the weights.

    Raises:
        ValueError: a number of weights or biases, a shape, stride, overlap, device or the epilogue is wrong.
        TypeError: a dtype is wrong, or something is not a sequence of tensors.
    """
    none = [] if biases is None else biases
    return call_into(torch_ops.linears, x, weights, none, residual, epilogue_code("linears", epilogue), out=out)


def epilogue_code(op: str, epilogue: str) -> int:
    if epilogue not in EPILOGUES:
        raise ValueError(f"{op}: epilogue: expected one of {', '.join(EPILOGUES)}, got {epilogue!r}")
    return EPILOGUES.index(epilogue)


@fake("linear")
def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, epilogue: int = 0
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


fake_out("linear", _linear_fake)


@fake("linears")
def _linears_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    epilogue: int = 0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


fake_out("linears", _linears_fake)
