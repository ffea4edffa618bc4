"""FFNs and linear layers with int8 weights as torchao's `Int8WeightOnlyConfig` stores them: row r is values[r] * scale[r].

x is fp32, bf16 or fp16. A row's bits depend neither on the other rows nor on threads. On the CPU only.

With bf16 and fp16 x, on a CPU with AVX512-BF16 and AVX512-VNNI, weights are multiplied as bytes: each row of x, and of what lies
between the halves of an FFN, is rounded to whole multiples of a power of two, which is at most 2^-11 (fp16: 2^-14) of the row's
root mean square. Sums of products are whole numbers and exact. What this rounding adds to a result, in rms over weights of no
special kind, is at most 2^-12.8 of it (fp16: 2^-15.8), where its rounding to the dtype adds about 2^-9 (2^-12). Outliers do not
count in the root mean square where it falls to a quarter or less without them, since weights may be zero where they lie. Numbers
of 2^22 multiples and more, infinities and NaNs are multiplied in float and added.
Dimensions of 2^17 and more, fp32 x and other CPUs: weights are widened in registers, sums are fp32 of x times the integers, in an
order that the width alone decides.

Errors: ValueError for shapes, strides, aliasing and devices, TypeError for dtypes, IndexError for runs and indices,
NotImplementedError on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .common import call_into, capability, fake, fake_out, torch_ops
from .ffn import selected_neurons
from .linear import epilogue_code
from .selection import Selection


@capability(devices=("cpu",))
def int8_ffn(
    x: Tensor,
    w_gate: Tensor,
    gate_scale: Tensor,
    w_up: Tensor,
    up_scale: Tensor,
    w_down: Tensor,
    down_scale: Tensor,
    runs: Any = None,
    index: Any = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """`gathered_ffn` with int8 weights: only the selected neurons are read.

    Args:
        x: [..., hidden], fp32, bf16 or fp16.
        w_gate, w_up: int8 [intermediate, hidden], rows may be strided.
        gate_scale, up_scale: fp32 [intermediate].
        w_down: int8 [hidden_out, intermediate].
        down_scale: fp32 [hidden_out].
        runs, index, selection: neurons, as in `gathered_ffn`; None for all three: all.
        residual: [..., hidden_out] in x's dtype, added in fp32 before the single rounding.
        out: [..., hidden_out] to write into.

    Returns:
        [..., hidden_out] in x's dtype.

    Raises:
        ValueError, TypeError, IndexError: an argument is wrong. NotImplementedError: on CUDA.
    """
    weights = (w_gate, gate_scale, w_up, up_scale, w_down, down_scale)
    chosen = selected_neurons(w_gate, 0, runs, index, selection)
    return call_into(torch_ops.int8_ffn, x, *weights, **chosen, residual=residual, out=out)


@capability(devices=("cpu",))
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """`linear` with an int8 weight: epilogue(scale * (x weight^T) + bias) + residual, rounded once at the end.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: int8 [N, K], rows may be strided.
        scale: fp32 [N].
        bias: [N] in x's dtype.
        residual: [..., N] in x's dtype.
        epilogue: 'none', 'gelu' (exact), 'gelu_tanh' or 'silu'.
        out: [..., N] to write into; shares no memory with the inputs.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong. NotImplementedError: on CUDA.
    """
    code = epilogue_code("int8_linear", epilogue)
    return call_into(torch_ops.int8_linear, x, weight, scale, bias, residual, code, out=out)


@fake("int8_ffn")
def _int8_ffn_fake(
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
    listed: bool = False,
    block: int = 1,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


fake_out("int8_ffn", _int8_ffn_fake)


@fake("int8_linear")
def _int8_linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: int = 0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


fake_out("int8_linear", _int8_linear_fake)
