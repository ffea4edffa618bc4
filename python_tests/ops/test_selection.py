"""Selections: refusals, contents, and a resolved selection gives the same bits as its runs or index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inputs import randn
from torch.library import opcheck

from flashu_ext import ops
from flashu_ext.ops import Selection

LIMIT = 40


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((LIMIT, 24), (LIMIT, 24), (20, LIMIT))
    return tuple(randn(seed, *shape, dtype=dtype, scale=0.2) for seed, shape in enumerate(shapes, 2))


def runs_of(neurons: set[int]) -> list[tuple[int, int]]:
    starts = sorted(n for n in neurons if n - 1 not in neurons)
    return [(start, next(k for k in range(1, LIMIT + 1) if start + k not in neurons)) for start in starts]


@given(st.sets(st.integers(0, LIMIT - 1)), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3))
def test_a_selection_gives_the_bits_of_its_runs_and_its_index(neurons: set[int], dtype: torch.dtype, rows: int):
    x, w = randn(1, rows, 24, dtype=dtype), weights(dtype)
    runs = runs_of(neurons)
    selection = Selection.from_runs(runs, LIMIT)
    assert selection.count == len(neurons) and selection.limit == LIMIT
    expected = ops.gathered_ffn(x, *w, runs=runs)
    assert torch.equal(ops.gathered_ffn(x, *w, selection=selection), expected)
    index = torch.tensor(sorted(neurons), dtype=torch.int64)
    assert torch.equal(ops.gathered_ffn(x, *w, selection=Selection.from_index(index, LIMIT)), expected)


@given(st.permutations(range(LIMIT)), st.integers(0, LIMIT))
def test_a_selection_keeps_the_order_of_an_index(order: list[int], count: int):
    index = torch.tensor(order[:count], dtype=torch.int32)
    x, (gate, up, _) = randn(1, 3, 24), weights()
    got = ops.gathered_swiglu(x, gate, up, selection=Selection.from_index(index, LIMIT))
    assert torch.equal(got, ops.gathered_swiglu(x, gate, up, index=index))


@pytest.mark.parametrize(
    ("index", "block"),
    [
        ([*range(80, 144), *range(8, 72)], 64),
        ([*range(80, 144), *range(8, 16)], 8),
        ([*range(16, 24), *range(0, 8)], 8),
        ([*range(16, 24), *range(3, 11)], 1),
        ([*range(16, 24), 0, 1, 2, 3, 4, 5, 6, 8], 1),
        ([*range(16, 24), *range(0, 7)], 1),
        ([*range(0, 16, 2)], 1),
    ],
)
def test_blocks_are_detected(index: list[int], block: int):
    assert Selection.from_index(index, 200).block == block


@pytest.mark.parametrize(
    "runs",
    [
        [2, 7, 20, 5],
        [(2, 7), (20, 5)],
        torch.tensor([[2, 7], [20, 5]]),
        np.array([2, 7, 20, 5]),
        np.array([[2, 7], [20, 5]], dtype=np.int32),
        [(np.int64(2), np.int64(7)), torch.tensor([20, 5])],
        ((2, 7), [20, 5]),
    ],
    ids=["flat", "tuples", "tensor", "array", "pairs", "numbers", "mixed"],
)
def test_runs_may_be_written_in_several_ways(runs: object):
    expected = [*range(2, 9), *range(20, 25)]
    assert Selection.from_runs(runs, LIMIT).list.tolist() == expected
    x, w = randn(1, 2, 24), weights()
    assert torch.equal(ops.gathered_ffn(x, *w, runs=runs), ops.gathered_ffn(x, *w, index=torch.tensor(expected)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Selection.from_runs([(0, 41)], LIMIT), IndexError, r"inside \[0, 40\), got start 0 and length 41"),
        (lambda: Selection.from_runs([(-1, 4)], LIMIT), IndexError, r"inside \[0, 40\), got start -1"),
        (lambda: Selection.from_runs([(4, 4), (7, 1)], LIMIT), IndexError, "got start 7 after end 8 in run 1"),
        (lambda: Selection.from_runs([(4, 0)], LIMIT), IndexError, "lengths >= 1, got 0 in run 0"),
        (lambda: Selection.from_runs([(4, 2**62)], LIMIT), IndexError, "inside"),
        (lambda: Selection.from_runs([1, 2, 3], LIMIT), ValueError, "pairs, got 3 numbers"),
        (lambda: Selection.from_runs([0.5, 2], LIMIT), TypeError, "runs: expected integers"),
        (lambda: Selection.from_runs([(0.5, 2)], LIMIT), TypeError, "runs: expected integers or tuples.*got float"),
        (
            lambda: Selection.from_runs(torch.tensor([[0.0, 2.0]]), LIMIT),
            TypeError,
            "runs: expected integers.*got float",
        ),
        (lambda: Selection.from_runs(np.array([[True, True]]), LIMIT), TypeError, "runs: expected integers.*got bool"),
        (lambda: Selection.from_runs(torch.tensor(3), LIMIT), TypeError, "runs: expected integers.*got int"),
        (lambda: Selection.from_runs("ab", LIMIT), TypeError, "runs: expected integers.*got str"),
        (
            lambda: Selection.from_runs([(0, 4, 1)], LIMIT),
            ValueError,
            "runs: expected tuples of 2 numbers, got one of 3",
        ),
        (lambda: Selection.from_runs([(0, 4)], limit="256"), TypeError, "limit: expected an integer, got str"),
        (lambda: Selection.from_runs([(0, 4)], 2**70), ValueError, "limit: expected an integer of 64 bits"),
        (lambda: Selection.from_runs([(2**63, 4)], LIMIT), IndexError, "runs: expected integers of 64 bits"),
        (lambda: Selection.from_runs([(0, 4)], -1), ValueError, "intermediate: expected at least 0, got -1"),
        (lambda: Selection.from_index([3, 3], LIMIT), IndexError, "got 3 again at position 1"),
        (lambda: Selection.from_index([40], LIMIT), IndexError, r"values in \[0, 40\), got 40 at position 0"),
        (lambda: Selection.from_index(torch.ones(40, dtype=torch.bool), LIMIT), TypeError, "got a bool mask"),
        (lambda: Selection.from_index([0.5], LIMIT), TypeError, "expected int32 or int64, got float32"),
        (lambda: Selection.from_index(torch.zeros(1, 1, dtype=torch.int64), LIMIT), ValueError, "1 dimensions"),
    ],
)
def test_wrong_neurons_are_named(make, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_wrong_uses_are_named_and_the_next_call_works():
    x, w = randn(1, 2, 24), weights()
    selection = Selection.from_runs([2, 7, 20, 5], LIMIT)
    with pytest.raises(ValueError, match="selection: expected neither runs nor index with it"):
        ops.gathered_ffn(x, *w, runs=[0, 4], selection=selection)
    with pytest.raises(ValueError, match="selection: expected one of 40 neurons as the weights have, got one of 41"):
        ops.gathered_ffn(x, *w, selection=Selection.from_runs([2, 7, 20, 5], 41))
    with pytest.raises(TypeError, match="got a bool mask"):
        ops.gathered_ffn(x, *w, index=torch.ones(LIMIT, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="gathered_ffn: index: expected numbers, got a bool tensor"):
        torch.ops.flashu.gathered_ffn(x, *w, index=torch.ones(LIMIT, dtype=torch.bool))
    assert ops.gathered_ffn(x, *w, selection=selection).isfinite().all()


@pytest.mark.parametrize("outside", [-1, LIMIT, 2**31 - 1])
def test_an_unchecked_list_reads_nothing_outside_the_weights(outside: int):
    """Callers of the raw operator can claim that a list was checked."""
    listed = torch.tensor([3, outside], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"values in \[0, 40\)"):
        torch.ops.flashu.gathered_ffn(randn(1, 2, 24), *weights(), index=listed, listed=True)


def test_a_selection_is_a_copy():
    index = torch.tensor([5, 3, 9, 20])
    selection = Selection.from_index(index, LIMIT)
    index.fill_(0)
    assert selection.list is not None and selection.list.tolist() == [5, 3, 9, 20]
    with pytest.raises(AttributeError):
        selection.count = 3  # type: ignore[misc]
    assert selection.to("cpu") is selection


def test_listing_neurons_is_an_operator():
    assert ops.gathered_ffn is not None  # the lookup loads the library
    arguments = (torch.empty(12, dtype=torch.int32), LIMIT, [2, 7, 20, 5], None)
    opcheck(torch.ops.flashu.list_neurons.default, arguments, test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_selection_on_a_gpu():
    selection = Selection.from_runs([2, 7, 20, 5], LIMIT)
    x, w = randn(1, 2, 24).cuda(), tuple(weight.cuda() for weight in weights())
    expected = ops.gathered_ffn(x, *w, runs=[2, 7, 20, 5])
    assert torch.equal(ops.gathered_ffn(x, *w, selection=selection.to("cuda")), expected)
    with pytest.raises(ValueError, match="expected device cuda:0 as x has, got cpu"):
        ops.gathered_ffn(x, *w, selection=selection)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.IntTensor, lambda numbers: np.array(numbers, np.int32)])
def test_numbers_may_be_a_list_or_an_array(make):
    x, gate, up = torch.randn(3, 8), torch.randn(40, 8), torch.randn(40, 8)
    numbers = [7, 3, 39]
    expected = ops.gathered_swiglu(x, gate, up, index=torch.tensor(numbers))
    assert torch.equal(ops.gathered_swiglu(x, gate, up, index=make(numbers)), expected)
    assert ops.gathered_swiglu(x, gate, up, index=make([])).shape == (3, 0)
    pairs = [[3, 2], [30, 4]]
    expected = ops.gathered_swiglu(x, gate, up, runs=[(3, 2), (30, 4)])
    assert torch.equal(ops.gathered_swiglu(x, gate, up, runs=make(pairs)), expected)


@pytest.mark.parametrize("index", ["3", 3.5, object(), [1.5], [True] * 40])
def test_what_no_neuron_number_is_is_named(index):
    with pytest.raises((TypeError, ValueError), match="index: expected"):
        ops.gathered_swiglu(torch.randn(3, 8), torch.randn(40, 8), torch.randn(40, 8), index=index)
