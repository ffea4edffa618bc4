"""Int8 weights: beside the same integers as floats, torchao's accuracy, outliers, rows that know no company, errors by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ffn_cases import int8, scales
from support.inputs import DEPTHS, PANELS, WIDTHS, randn
from support.op_case import DTYPES
from support.tolerance import assert_accurate
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import explain, reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
ROWS = (1, 2, 6, 13, 25)
SELECTIONS: list[dict[str, Any]] = [
    {},
    {"runs": [(3, 20)]},
    {"runs": [0, 1, 8, 9, 30, 41]},
    {"runs": []},
    {"index": torch.tensor([70, 3, *range(40, 60), 0, 39, *range(10, 20)], dtype=torch.int32)},
]


def quantised(seed: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    return int8(seed, rows, width), scales(seed + 10, rows, width)


def ffn_weights(hidden: int, neurons: int, width: int) -> list[Tensor]:
    sizes = ((neurons, hidden), (neurons, hidden), (width, neurons))
    return [part for seed, size in enumerate(sizes) for part in quantised(seed, *size)]


def as_bytes(dtype: torch.dtype) -> bool:
    """Whether weights are multiplied as bytes, with x in fixed point, instead of widened to floats."""
    return dtype != torch.float32 and explain.build_facts()["cpu isa"] == "avx512_bf16"


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_the_bits_are_those_of_the_integers_as_floats(rows: int, dtype: torch.dtype) -> None:
    """Integers of eight bits are exact in every dtype, and sums have one order: with scales of 1 the results are equal."""
    if as_bytes(dtype):
        pytest.skip("sums are of whole numbers, so they are others")
    one = torch.ones(1000)
    for depth, width in [(depth, 9) for depth in DEPTHS] + [(70, width) for width in WIDTHS]:
        x, w, bias = randn(1, rows, depth, dtype=dtype, scale=0.01), int8(2, width, depth), randn(3, width, dtype=dtype)
        got = ops.int8_linear(x, w, one[:width], bias, epilogue="gelu")
        assert torch.equal(got, ops.linear(x, w.to(dtype), bias, epilogue="gelu")), (depth, width)
    for hidden, neurons in [(96, 71), (130, 71), (64, 200)]:
        g, u, d = int8(4, neurons, hidden), int8(5, neurons, hidden), int8(6, 45, neurons)
        x, residual = randn(1, rows, hidden, dtype=dtype, scale=0.001), randn(7, rows, 45, dtype=dtype)
        for chosen in SELECTIONS:
            given = [part for w in (g, u, d) for part in (w, one[: len(w)])]
            got = ops.int8_ffn(x, *given, **chosen, residual=residual)
            expected = ops.gathered_ffn(x, *(w.to(dtype) for w in (g, u, d)), **chosen, residual=residual)
            assert torch.equal(got, expected), (hidden, neurons, chosen)


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_as_accurate_as_torchao_s_way(rows: int, dtype: torch.dtype) -> None:
    """The reference multiplies as torchao does: x by the integers in x's dtype, then by the scales."""
    x, residual = randn(1, rows, 96, dtype=dtype), randn(2, rows, 45, dtype=dtype)
    weights = ffn_weights(96, 71, 45)
    for chosen in SELECTIONS:
        wide = [part if part.dtype == torch.int8 else part.double() for part in weights]
        truth = reference.int8_ffn(x.double(), *wide, **chosen, residual=residual.double())
        theirs = reference.int8_ffn(x, *weights, **chosen, residual=residual)
        assert_accurate(ops.int8_ffn(x, *weights, **chosen, residual=residual), truth, theirs)


def outliers(x: Tensor, size: float) -> Tensor:
    """Rows with one element, each in another column, that is `size` times as large."""
    x = x.clone()
    x[torch.arange(len(x)), torch.arange(len(x)) * 7 % x.shape[1]] *= size
    return x


@every_dtype
@pytest.mark.parametrize("size", [1, 30, 1000, 1e6])
def test_outliers_cost_no_accuracy(size: float, dtype: torch.dtype) -> None:
    """Of rows with an outlier the other elements count too, where weights are small or zero beside it."""
    if size == 1e6 and dtype == torch.float16:
        pytest.skip("torch's sums are beyond fp16")
    weights, x = ffn_weights(300, 200, 130), outliers(randn(1, 24, 300, scale=0.02), size).to(dtype)
    weights[0][:, ::3] = 0
    w, scale = quantised(9, 130, 300)
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = 0
    for chosen in SELECTIONS:
        wide = [part if part.dtype == torch.int8 else part.double() for part in weights]
        truth = reference.int8_ffn(x.double(), *wide, **chosen)
        assert_accurate(ops.int8_ffn(x, *weights, **chosen), truth, reference.int8_ffn(x, *weights, **chosen))
    truth = reference.int8_linear(x.double(), w, scale.double())
    got = ops.int8_linear(x, w, scale)
    assert_accurate(got, truth, reference.int8_linear(x, w, scale))
    # One rounding, and nearly nothing else.
    if dtype != torch.float32:
        error, rounding = ((part.double() - truth).square().mean().sqrt() for part in (got, truth.to(dtype)))
        assert error <= 1.02 * rounding


@every_dtype
@pytest.mark.parametrize("sizes", [(1e3,), (1e6,), (1e6, 1e3), (1e30, 1e20, 1e10), (torch.inf,)], ids=str)
def test_the_others_count_where_weights_are_zero(sizes: tuple[float, ...], dtype: torch.dtype) -> None:
    """Outliers that no output reads change nothing in rms, however large they are; infinite ones are NaN."""
    if max(sizes) == 1e30 and dtype == torch.float16:
        pytest.skip("not a number of fp16")
    x, (w, scale) = randn(1, 13, 300, scale=0.02), quantised(9, 40, 300)
    for place, size in enumerate(sizes):
        x[:, 7 + 100 * place], w[:, 7 + 100 * place] = size * 0.02, 0
    x = x.to(dtype)
    truth = reference.int8_linear(x.double(), w, scale.double())
    got = ops.int8_linear(x, w, scale)
    if max(sizes) == torch.inf:
        assert got.isnan().all()
    else:
        assert_accurate(got, truth, reference.int8_linear(x, w, scale))


@every_dtype
def test_rows_of_zeros_tiny_huge_and_no_numbers(dtype: torch.dtype) -> None:
    """Each beside torch's float, and its neighbours as they are without it."""
    limits = torch.finfo(dtype)
    w, scale = quantised(9, 40, 130)
    x = randn(1, 9, 130, dtype=dtype)
    x[1], x[2, 5], x[3, 129], x[4, :2] = 0, torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf])
    x[5] = (x[5].float() * limits.smallest_normal).to(dtype)
    x[6, 4] = limits.max * 1e-3
    x[7] = torch.full((130,), float(limits.smallest_normal)).to(dtype) / 4
    x[8] = (x[8].float() * limits.max * 1e-4).to(dtype)
    expected = (x.double() @ w.double().T * scale.double()).to(dtype)
    got = ops.int8_linear(x, w, scale)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert torch.equal(got[1], torch.zeros(40, dtype=dtype)) and got[2:5].isfinite().logical_not().all()
    assert torch.equal(got[5] != 0, expected[5] != 0)
    for row in range(9):
        assert torch.equal(got[row].nan_to_num(7), ops.int8_linear(x[row], w, scale).nan_to_num(7))


@every_dtype
@pytest.mark.parametrize("chosen", SELECTIONS, ids=["all", "run", "runs", "none", "list"])
def test_threads_change_nothing(chosen: dict[str, Any], dtype: torch.dtype) -> None:
    weights, x = ffn_weights(700, 71, 800), outliers(randn(1, 40, 700), 100).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.int8_ffn(x, *weights, **chosen))
            assert torch.equal(ops.int8_ffn(x[7], *weights, **chosen), results[0][7])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_dtype
@pytest.mark.parametrize("chosen", SELECTIONS[:1] + SELECTIONS[-1:], ids=["all", "list"])
def test_a_row_knows_no_company(chosen: dict[str, Any], dtype: torch.dtype) -> None:
    weights, x = ffn_weights(130, 71, 45), randn(1, 2 * PANELS[-1] + 3, 130, dtype=dtype)
    w, scale = quantised(9, 33, 130)
    whole, linear = ops.int8_ffn(x, *weights, **chosen), ops.int8_linear(x, w, scale)
    for size in (1, 5, 12):
        assert torch.equal(torch.cat([ops.int8_ffn(part, *weights, **chosen) for part in x.split(size)]), whole)
        assert torch.equal(torch.cat([ops.int8_linear(part, w, scale) for part in x.split(size)]), linear)


def test_the_formula() -> None:
    w, scale = quantised(2, 5, 7)
    x, bias, residual = randn(1, 3, 7), randn(3, 5), randn(4, 3, 5)
    expected = F.silu(x @ (w.float() * scale[:, None]).T + bias) + residual
    torch.testing.assert_close(ops.int8_linear(x, w, scale, bias, residual, "silu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_whole(dtype: torch.dtype) -> None:
    weights, x = ffn_weights(32, 40, 32), randn(1, 4, 32, dtype=dtype)
    w, scale = quantised(9, 32, 32)

    def both(x: Tensor) -> Tensor:
        return ops.int8_linear(ops.int8_ffn(x, *weights, runs=[0, 16], residual=x), w, scale, epilogue="gelu") * 2

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


WRONG = {
    "w_up: expected int8, got float32": {3: lambda t: t.float()},
    "gate_scale: expected float32, got bfloat16": {2: lambda t: t.bfloat16()},
    "down_scale: expected size 45 in dimension 0, got 44": {6: lambda t: t[:44]},
    "w_down: last stride": {5: lambda t: t.repeat_interleave(2, 1)[:, ::2]},
    "up_scale: expected rank 1": {4: lambda t: t[:, None]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    arguments = [randn(1, 4, 96), *ffn_weights(96, 71, 45)]
    for place, change in WRONG[message].items():
        arguments[place] = change(arguments[place])
    with pytest.raises((ValueError, TypeError)) as caught:
        ops.int8_ffn(*arguments)
    name = re.match(r"\w+", message)
    assert name is not None and name[0] in str(caught.value)
    plain = randn(1, 4, 96), *(randn(seed, *size) for seed, size in enumerate(((71, 96), (71, 96), (45, 71))))
    with pytest.raises(TypeError, match="w_gate: expected float32 as x has, got int8"):
        ops.gathered_ffn(plain[0], int8(2, 71, 96), *plain[2:])


def test_on_the_cpu_only() -> None:
    assert ops.int8_ffn.is_supported("cpu", torch.bfloat16) and not ops.int8_linear.is_supported("cuda", torch.float32)
