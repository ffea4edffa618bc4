"""Int8 weights: the bits of the same integers as floats, torchao's accuracy, rows that know no company, errors by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inputs import DEPTHS, PANELS, WIDTHS, randn
from support.ops_cases import DTYPES, int8, scales
from support.tolerance import assert_accurate
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import reference

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


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_the_bits_are_those_of_the_integers_as_floats(rows: int, dtype: torch.dtype) -> None:
    """Integers of eight bits are exact in every dtype, and sums have one order: with scales of 1 the results are equal."""
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
