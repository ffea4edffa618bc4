"""Routing: scores, order-preserving selection with ties, and row moves with padding and repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import GRAIN, LANES, around, randn
from support.op_case import DTYPES
from support.tolerance import assert_accurate

from flashu_ext import ops
from flashu_ext.ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_dtype
@pytest.mark.parametrize("reduce", ["none", "mean", "last"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 33), (1, 57, 1536), (3, 2, 4, 100), (1, 3, GRAIN)], ids=str)
def test_cosine_importance(shape: tuple[int, ...], reduce: str, dtype: torch.dtype):
    a = randn(1, *shape, dtype=dtype)
    b = (a.float() + 0.1 * randn(2, *shape)).to(dtype)
    truth = reference.cosine_importance(a.double(), b.double(), reduce)
    assert_accurate(ops.cosine_importance(a, b, reduce), truth, reference.cosine_importance(a, b, reduce))


def test_cosine_importance_keeps_torchs_definition():
    a, b = randn(1, 4, 9), randn(2, 4, 9)
    torch.testing.assert_close(ops.cosine_importance(a, b), 1 - torch.cosine_similarity(a, b, dim=-1))
    assert (ops.cosine_importance(torch.zeros(2, 9), b[:2]) == 1).all()


@every_dtype
@pytest.mark.parametrize("width", around(LANES, 2 * LANES))
def test_rows_of_zeros_have_importance_one(width: int, dtype: torch.dtype):
    """Norms are clamped to 1e-8, so a zero row never gives 0 / 0."""
    zero, other = torch.zeros(2, width, dtype=dtype), randn(1, 2, width, dtype=dtype)
    for a, b in ((zero, other), (other, zero), (zero, zero)):
        assert (ops.cosine_importance(a, b) == 1).all()
        assert ops.cosine_importance(a, b, "mean") == 1 and ops.cosine_importance(a, b, "last") == 1


def test_cosine_importance_empty_and_nan():
    assert ops.cosine_importance(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert ops.cosine_importance(torch.zeros(0, 4), torch.zeros(0, 4), "mean").isnan()
    with pytest.raises(ValueError, match="at least one token"):
        ops.cosine_importance(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), "last")
    with pytest.raises(ValueError, match="reduce"):
        ops.cosine_importance(torch.zeros(2, 4), torch.zeros(2, 4), "sum")
    x = randn(1, 3, 4)
    y = x.clone()
    y[1, 2] = float("nan")
    assert ops.cosine_importance(x, y).isnan().tolist() == [False, True, False]


@every_dtype
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "empty"])
def test_value_norms(layout: str, dtype: torch.dtype):
    v = randn(1, 2, 3, 11, 64, dtype=dtype)
    if layout == "tokens first":  # a projection's output [batch, tokens, heads, head_dim], transposed
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "empty":
        v = v[:, :, :0]
    assert_accurate(ops.value_norms(v), reference.value_norms(v.double()), reference.value_norms(v))


scores = st.lists(st.sampled_from([-2.0, -0.5, 0.0, -0.0, 0.25, 1.0, 3.0, float("inf"), -float("inf")]), max_size=40)


@settings(deadline=None, max_examples=150)
@given(st.lists(scores, min_size=1, max_size=3), st.data())
def test_topk_is_the_stable_choice(rows: list[list[float]], data: st.DataObject):
    width = min(len(row) for row in rows)
    table = torch.tensor([row[:width] for row in rows])
    k = data.draw(st.integers(0, width))
    dtype = data.draw(st.sampled_from(DTYPES))
    index, count = ops.select_topk(table.to(dtype), k)
    expected, counts = reference.select_topk(table.to(dtype), k)
    assert torch.equal(index, expected) and torch.equal(count, counts)


@settings(deadline=None, max_examples=150)
@given(scores, st.sampled_from([-1.0, 0.0, 0.25, 2.0, float("inf"), -float("inf")]), st.integers(0, 45))
def test_threshold_keeps_order_and_counts_all(values: list[float], threshold: float, capacity: int):
    index, count = ops.select_threshold(torch.tensor(values), threshold, capacity)
    passed = [i for i, value in enumerate(values) if value >= threshold]
    assert int(count) == len(passed)
    assert index.tolist() == (passed + [-1] * capacity)[:capacity]


@pytest.mark.parametrize("select", [ops.select_threshold, reference.select_threshold], ids=["kernel", "torch"])
def test_the_threshold_is_rounded_to_fp32_before_it_is_compared(select: Callable[..., Any]):
    score = torch.tensor([0.1, 0.3])
    for threshold in (float(score[0]) + 1e-12, float(score[0]) - 1e-12):
        assert select(score, threshold, 2)[0].tolist() == [0, 1]
    assert select(torch.zeros(2), 1e-46, 2)[0].tolist() == [0, 1]  # below the smallest fp32 number: rounds to 0


def test_selection_near_the_boundary_is_a_choice_among_equals():
    """Scores that differ only by rounding may be ordered either way; others may not."""
    exact = randn(3, 200).double()
    k = 50
    least = exact.sort(descending=True).values[k - 1]
    band = 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    chosen, _ = ops.select_topk(exact.to(torch.bfloat16), k)
    picked = torch.zeros(200, dtype=torch.bool)
    picked[chosen] = True
    assert picked[exact > least + band].all() and not picked[exact < least - band].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_scores_are_refused_with_their_place(dtype: torch.dtype):
    table = torch.zeros(2, 5, dtype=dtype)
    table[1, 3] = float("nan")
    index, count = torch.full((2, 2), 7), torch.full((2,), 7, dtype=torch.int32)
    for call in (
        lambda: ops.select_topk(table, 2, index=index, count=count),
        lambda: ops.select_threshold(table, 0.0, 2, index=index, count=count),
    ):
        with pytest.raises(ValueError, match="NaN at row 1, token 3"):
            call()
    assert (index == 7).all() and (count == 7).all()


@pytest.mark.parametrize("k", [-1, 6, 2**40])
def test_bad_k(k: int):
    with pytest.raises(ValueError, match="k: expected"):
        ops.select_topk(torch.zeros(2, 5), k)


def test_bad_threshold_and_capacity():
    with pytest.raises(ValueError, match="threshold"):
        ops.select_threshold(torch.zeros(5), float("nan"), 2)
    with pytest.raises(ValueError, match="capacity"):
        ops.select_threshold(torch.zeros(5), 0.0, -1)
    index, count = torch.full((3,), 7), torch.tensor(7, dtype=torch.int32)
    for capacity in (2, 4):
        with pytest.raises(ValueError, match=f"index: expected size {capacity} in the last dimension, .* got 3"):
            ops.select_threshold(torch.zeros(5), 0.0, capacity, index=index, count=count)
    assert (index == 7).all() and count == 7


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_moves(data: st.DataObject):
    batch = data.draw(st.sampled_from([None, 0, 1, 3]))
    tokens, width, count = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 70)), data.draw(st.integers(0, 12))
    dtype = data.draw(st.sampled_from(DTYPES))
    lead = () if batch is None else (batch,)
    rows, moved = randn(1, *lead, tokens, width, dtype=dtype), randn(2, *lead, count, width, dtype=dtype)
    flat = data.draw(
        st.lists(
            st.integers(-1, tokens - 1),
            min_size=(batch if batch is not None else 1) * count,
            max_size=(batch if batch is not None else 1) * count,
        )
    )
    index = torch.tensor(flat, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))).reshape(*lead, count)
    assert torch.equal(ops.gather_rows(rows, index), reference.gather_rows(rows, index))
    for name in ("scatter_rows_", "scatter_add_rows_"):
        ours, theirs = rows.clone(), rows.clone()
        assert getattr(ops, name)(ours, index, moved) is ours
        assert torch.equal(ours, getattr(reference, name)(theirs, index, moved)), name


@pytest.mark.parametrize("of", [torch.int32, torch.int64], ids=str)
def test_an_index_may_skip_elements(of: torch.dtype):
    rows, moved = randn(1, 3, 20, 7), randn(2, 3, 6, 7)
    index = torch.randint(-1, 20, (3, 12), generator=torch.Generator().manual_seed(3)).to(of)[:, ::2]
    dense = index.contiguous()
    assert torch.equal(ops.gather_rows(rows, index), ops.gather_rows(rows, dense))
    for op in (ops.scatter_rows_, ops.scatter_add_rows_):
        assert torch.equal(op(rows.clone(), index, moved), op(rows.clone(), dense, moved))


@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1])
def test_indices_out_of_range_write_nothing(bad: int):
    rows, moved = randn(1, 5, 4), randn(2, 2, 4)
    before = rows.clone()
    index = torch.tensor([1, bad])
    for call in (
        lambda: ops.gather_rows(rows, index, out=moved.clone()),
        lambda: ops.scatter_rows_(rows, index, moved),
        lambda: ops.scatter_add_rows_(rows, index, moved),
    ):
        with pytest.raises(IndexError, match="at position 1"):
            call()
    assert torch.equal(rows, before)
