"""Linear layers: exact integers, accuracy relative to torch's own error, bits that depend on nothing else, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEPTHS, ROWS, WIDTHS, integers, randn
from support.op_case import DTYPES
from support.tolerance import assert_accurate
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import reference
from flashu_ext.ops.linear import EPILOGUES

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    return reference.linear(*wide)


@every_dtype
@pytest.mark.parametrize("rows", [0, *ROWS])
def test_is_exact_on_integers(rows: int, dtype: torch.dtype):
    x, weight = integers(1, rows, 71, dtype=dtype), integers(2, 45, 71, dtype=dtype)
    bias, residual = integers(3, 45, dtype=dtype), integers(4, rows, 45, dtype=dtype)
    truth = exact(x, weight, bias, residual).to(dtype)
    assert torch.equal(ops.linear(x, weight, bias, residual), truth)


@every_dtype
@pytest.mark.parametrize("rows", [1, 3, 13])
def test_is_exact_at_every_edge_of_depth_and_width(rows: int, dtype: torch.dtype):
    for depth, width in [*((depth, 9) for depth in (0, *DEPTHS)), *((20, width) for width in (0, *WIDTHS))]:
        x, weight = integers(1, rows, depth, dtype=dtype, limit=2), integers(2, width, depth, dtype=dtype, limit=2)
        bias = integers(3, width, dtype=dtype)
        assert torch.equal(ops.linear(x, weight, bias), exact(x, weight, bias, None).to(dtype)), (depth, width)


@every_dtype
@every_epilogue
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 130])
def test_is_as_accurate_as_torch(rows: int, epilogue: str, dtype: torch.dtype):
    x, weight = randn(1, rows, 300, dtype=dtype), randn(2, 77, 300, dtype=dtype, scale=300**-0.5)
    bias, residual = randn(3, 77, dtype=dtype), randn(4, rows, 77, dtype=dtype)
    for added in ((None, None), (bias, None), (None, residual), (bias, residual)):
        wide = [None if t is None else t.double() for t in (x, weight, *added)]
        truth = reference.linear(*wide, epilogue)
        assert_accurate(ops.linear(x, weight, *added, epilogue), truth, reference.linear(x, weight, *added, epilogue))


@every_dtype
@every_epilogue
def test_activations_are_those_of_fp64(epilogue: str, dtype: torch.dtype):
    """One input with a weight of one, over the whole range of each dtype."""
    x = torch.cat([torch.linspace(-20, 20, 20001), torch.logspace(-30, 4, 500), -torch.logspace(-30, 4, 500)]).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    truth = reference.linear(x.double()[:, None], one.double(), epilogue=epilogue)
    ours = ops.linear(x[:, None], one, epilogue=epilogue)
    if dtype == torch.float32:
        assert ((ours.double() - truth).abs() <= 1.6e-7 * x.double()[:, None].abs().clamp(min=1)).all()
    else:
        assert_accurate(ours, truth, reference.linear(x[:, None], one, epilogue=epilogue))


@every_dtype
@every_epilogue
def test_a_row_has_the_same_bits_in_any_company(epilogue: str, dtype: torch.dtype):
    x, weight = randn(1, 40, 301, dtype=dtype), randn(2, 67, 301, dtype=dtype, scale=301**-0.5)
    bias, residual = randn(3, 67, dtype=dtype), randn(4, 40, 67, dtype=dtype)
    with threads(1):
        whole = ops.linear(x, weight, bias, residual, epilogue)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    for count in (1, 2, 4):
        with threads(count):
            for rows in (1, 2, 3, 4, 5, 12, 13, 40):
                assert torch.equal(ops.linear(x[-rows:], weight, bias, residual[-rows:], epilogue), whole[-rows:])
            assert torch.equal(ops.linear(x[order], weight, bias, residual[order], epilogue), whole[order])
            many = ops.linear(x.repeat(30, 1), weight, bias, residual.repeat(30, 1), epilogue)
            assert torch.equal(many, whole.repeat(30, 1))


@pytest.mark.parametrize("flush", [False, True])
def test_threads_flush_denormals_as_their_caller(flush: bool):
    """torch's flag is of one thread; workers that did not have it gave other bits."""
    x, weight = randn(1, 400, 300), randn(2, 600, 300) * 1e-39
    if not torch.set_flush_denormal(flush):
        pytest.skip("this machine cannot flush denormals")
    try:
        with threads(1):
            alone = ops.linear(x, weight)
        for count in (2, 4):
            with threads(count):
                assert torch.equal(ops.linear(x, weight), alone)
    finally:
        torch.set_flush_denormal(False)
    assert bool((alone == 0).all()) == flush


@every_epilogue
def test_a_column_has_the_same_bits_in_any_place(epilogue: str):
    """Vectors and what is left of them apply the same activation."""
    weight, bias = randn(1, 1, 90).expand(67, 90), randn(2, 1).expand(67).contiguous()
    y = ops.linear(randn(3, 5, 90), weight, bias, epilogue=epilogue)
    assert torch.equal(y, y[:, :1].expand(5, 67))


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_every_shape_and_stride(data: st.DataObject):
    dtype, epilogue = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(EPILOGUES))
    pages, rows = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 14))
    depth, width = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    gaps = [data.draw(st.integers(0, 5)) for _ in range(4)]

    def strided(seed: int, gap: int, *shape: int) -> Tensor:
        return randn(seed, *shape[:-1], shape[-1] + gap, dtype=dtype)[..., : shape[-1]]

    x, weight = strided(1, gaps[0], pages, rows, depth), strided(2, gaps[1], width, depth)
    residual = strided(3, gaps[2], pages, rows, width) if data.draw(st.booleans()) else None
    bias = randn(4, width, dtype=dtype) if data.draw(st.booleans()) else None
    out = strided(5, gaps[3], pages, rows, width)
    y = ops.linear(x, weight, bias, residual, epilogue)
    assert ops.linear(x, weight, bias, residual, epilogue, out=out) is out and torch.equal(out, y)
    dense = [None if t is None else t.contiguous() for t in (x, weight, bias, residual)]
    assert torch.equal(ops.linear(*dense, epilogue), y)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    torch.testing.assert_close(
        y.double(), reference.linear(*wide, epilogue), rtol=2 * torch.finfo(dtype).eps, atol=4e-5
    )


@every_dtype
@every_epilogue
def test_bad_values_stay_in_their_row(epilogue: str, dtype: torch.dtype):
    x, weight = randn(1, 9, 48, dtype=dtype), randn(2, 20, 48, dtype=dtype)
    expected = ops.linear(x, weight, epilogue=epilogue)
    x[2, 5], x[7, 0] = float("nan"), float("inf")
    got = ops.linear(x, weight, epilogue=epilogue)
    keep = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(got[keep], expected[keep])
    assert got[2].isnan().all() and not got[7].isfinite().all()


@every_dtype
@pytest.mark.parametrize("one", [True, False], ids=["one matrix", "apart"])
def test_several_weights_give_the_columns_of_separate_calls(one: bool, dtype: torch.dtype):
    """In any company and on any number of threads, with biases and without, from rows that are strided."""
    x = randn(1, 150, 301 + 5, dtype=dtype)[:, :301]
    for columns in ((67,), (64, 16), (96, 33, 20), (5, 40, 0, 8)):
        weights = list(randn(2, sum(columns), 301, dtype=dtype, scale=301**-0.5).split(columns))
        biases = list(randn(3, sum(columns), dtype=dtype).split(columns))
        if not one:
            weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
        mixed = [bias if i % 2 == 0 else None for i, bias in enumerate(biases)]
        for some in (None, biases, mixed):
            own = some or [None] * len(weights)
            expected = torch.cat([ops.linear(x, w, b) for w, b in zip(weights, own, strict=True)], dim=-1)
            for count in (1, 2, 3, 4):
                with threads(count):
                    for rows in (1, 2, 3, 12, 13, 150):
                        assert torch.equal(ops.linears(x[-rows:], weights, some), expected[-rows:])
                    out = torch.empty(150, sum(columns) + 3, dtype=dtype)[:, : sum(columns)]
                    assert ops.linears(x, tuple(weights), some, out=out) is out and torch.equal(out, expected)


def test_several_weights_share_epilogue_and_residual():
    x, residual = randn(1, 2, 7, 40), randn(4, 2, 7, 50)
    weights, biases = [randn(2, n, 40) for n in (33, 17)], [randn(3, 33), None]
    for epilogue in EPILOGUES:
        each = zip(weights, biases, residual.split((33, 17), -1), strict=True)
        expected = torch.cat([ops.linear(x, w, b, r, epilogue) for w, b, r in each], dim=-1)
        assert torch.equal(ops.linears(x, weights, biases, residual, epilogue), expected)


W = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("weights", "biases", "error", "message"),
    [
        ([], None, ValueError, "weights: expected 1 to 4 tensors, got 0"),
        ([W] * 5, None, ValueError, "weights: expected 1 to 4 tensors, got 5"),
        ([W, W], [None], ValueError, "biases: expected 2 entries, one for each weight, got 1"),
        (W, None, TypeError, "weights: expected a list of tensors, got Tensor"),
        ([W, None], None, TypeError, r"weights\[1\]: expected a tensor, got NoneType"),
        ([W, W], [None, 3], TypeError, r"biases\[1\]: expected a tensor, got int"),
        ([W, W.to_sparse()], None, TypeError, r"weights\[1\]: expected a dense tensor, got layout torch.sparse_coo"),
        ([W, W.to(torch.int16)], None, TypeError, r"weights\[1\]: expected float32, bfloat16 or float16, got int16"),
        ([W, W.half()], None, TypeError, r"weights\[1\]: expected float32 as x has, got float16"),
        ([W, W[0]], None, ValueError, r"weights\[1\]: expected 2 dimensions, got 1"),
        ([W, W[:, :2]], None, ValueError, r"weights\[1\]: expected size 3 in dimension 1, got 2"),
        ([W, W.t().contiguous().t()], None, ValueError, r"weights\[1\]: expected stride 1"),
        ([W, W.to("meta")], None, ValueError, r"weights\[1\]: expected device cpu as x has, got meta"),
        ([W, W], [None, W[:3, 0]], ValueError, r"biases\[1\]: expected stride 1|biases\[1\]: expected size 4"),
    ],
)
def test_errors_of_several_weights_name_their_places(weights: Any, biases: Any, error: type[Exception], message: str):
    with pytest.raises(error, match="linears: " + message) as raised:
        ops.linears(torch.zeros(2, 3), weights, biases)
    assert len(str(raised.value)) < 120


def test_a_gradient_through_a_list_is_not_lost():
    weight = torch.zeros(4, 3, requires_grad=True)
    y = ops.linears(torch.zeros(2, 3), [W, weight])
    with pytest.raises(NotImplementedError, match="linears has no backward"):
        y.sum().backward()
    with pytest.raises(NotImplementedError, match=r"weights\[1\]: expected a tensor that does not require grad"):
        ops.linears(torch.zeros(2, 3), [W, weight], out=torch.zeros(2, 8))


def test_a_wrong_epilogue_is_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="linear: epilogue: expected one of none, gelu, gelu_tanh, silu, got 'relu'"):
        ops.linear(x, torch.zeros(4, 3), epilogue="relu")
    with pytest.raises(
        RuntimeError, match=r"linear: epilogue: expected none, gelu, gelu_tanh or silu \(0 to 3\), got 9"
    ):
        torch.ops.flashu.linear(x, torch.zeros(4, 3), None, None, 9)
