"""A linear layer with bias, activation and residual in one pass.

Storage is fp32, bf16 or fp16. Sums are fp32 in an order that K alone decides, so a row's result does not depend on other
rows, on its place among them or on the number of threads.

Errors: ValueError for shapes, strides, aliasing, devices and the epilogue, TypeError for dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import call_into, capability, fake, fake_out

_ops = torch.ops.flashu

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
        x: [..., K].
        weight: [N, K], torch's Linear layout, rows may be strided.
        bias: [N].
        residual: [..., N], added in fp32 before the single rounding.
        epilogue: one of EPILOGUES.
        out: [..., N] to write into; shares no memory with the inputs.

    Returns:
        [..., N] in x's dtype, which all tensors have. K = 0 gives epilogue(bias) + residual.

    Raises:
        ValueError: a shape, stride, overlap, device or the epilogue is wrong.
        TypeError: a dtype is wrong.
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"linear: epilogue: expected one of {', '.join(EPILOGUES)}, got {epilogue!r}")
    return call_into(_ops.linear, x, weight, bias, residual, EPILOGUES.index(epilogue), out=out)


@fake("linear")
def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, epilogue: int = 0
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


fake_out("linear", _linear_fake)
