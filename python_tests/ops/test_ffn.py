"""The gathered FFN: exact integers, accuracy relative to torch's own error, selections of every kind, rows, bad values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEPTHS, ROW_CHUNK, ROWS, WIDTHS, integers, randn
from support.op_case import DTYPES
from support.tolerance import assert_accurate
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def weights(dtype: torch.dtype, hidden: int, neurons: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(2, neurons, hidden, dtype=dtype, scale=hidden**-0.5),
        randn(3, neurons, hidden, dtype=dtype, scale=hidden**-0.5),
        randn(4, width, neurons, dtype=dtype, scale=neurons**-0.5),
    )


SELECTIONS: list[dict] = [
    {},
    {"runs": [0, 40]},
    {"runs": [(3, 20)]},
    {"runs": [0, 1, 8, 9, 30, 41]},
    {"runs": [0, 16, 16, 16]},
    {"runs": []},
    {"index": torch.tensor([70, 3, *range(40, 60), 0, 39, *range(10, 20)], dtype=torch.int32)},
    {"index": torch.arange(71).flip(0)},
    {"index": torch.tensor([], dtype=torch.int64)},
]


def selected(selection: dict, limit: int) -> Tensor:
    if "index" in selection:
        return selection["index"].long()
    if "runs" not in selection:
        return torch.arange(limit)
    flat = [n for entry in selection["runs"] for n in (entry if isinstance(entry, tuple) else (entry,))]
    parts = [torch.arange(start, start + length) for start, length in zip(flat[::2], flat[1::2], strict=True)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@every_dtype
@pytest.mark.parametrize("rows", [0, 8, *ROWS])
def test_down_is_exact_on_integers(rows: int, dtype: torch.dtype):
    """Small integers make every partial sum exact, so every tile and every order of summing gives the same bits."""
    w = integers(2, 45, 71, dtype=dtype)
    for selection in SELECTIONS:
        at = selected(selection, 71)
        h, residual = integers(1, rows, at.numel(), dtype=dtype), integers(3, rows, 45, dtype=dtype)
        exact = h.double() @ w.double()[:, at].T + residual.double()
        assert torch.equal(ops.gathered_down(h, w, **selection, residual=residual).double(), exact.to(dtype).double())


@every_dtype
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 13, 33, 130])
def test_whole_ffn_is_as_accurate_as_torch(rows: int, dtype: torch.dtype):
    gate, up, down = weights(dtype, 96, 71, 45)
    x, residual = randn(1, rows, 96, dtype=dtype), randn(5, rows, 45, dtype=dtype)
    for selection in SELECTIONS:
        at = selected(selection, 71)
        wide = [t.double() for t in (x, gate[at], up[at], down[:, at])]
        truth = F.silu(wide[0] @ wide[1].T) * (wide[0] @ wide[2].T) @ wide[3].T + residual.double()
        torchs = F.linear(F.silu(F.linear(x, gate[at])) * F.linear(x, up[at]), down[:, at]) + residual
        assert_accurate(ops.gathered_ffn(x, gate, up, down, **selection, residual=residual), truth, torchs)
        h = ops.gathered_swiglu(x, gate, up, **selection)
        truth = F.silu(wide[0] @ wide[1].T) * (wide[0] @ wide[2].T)
        assert h.shape == (rows, at.numel())
        assert_accurate(h, truth, F.silu(F.linear(x, gate[at])) * F.linear(x, up[at]))


@every_dtype
@pytest.mark.parametrize("rows", [1, 13])
def test_down_is_exact_at_every_edge_of_depth_and_width(rows: int, dtype: torch.dtype):
    for depth, width in [(depth, 9) for depth in DEPTHS] + [(11, width) for width in WIDTHS]:
        w, h = integers(2, width, depth, dtype=dtype, limit=1), integers(1, rows, depth, dtype=dtype)
        exact = h.double() @ w.double().T
        assert torch.equal(ops.gathered_down(h, w).double(), exact.to(dtype).double()), f"{depth} to {width}"
        at = torch.randperm(depth, generator=torch.Generator().manual_seed(depth))[: depth - depth // 3]
        exact = h[:, : len(at)].double() @ w.double()[:, at].T
        listed = ops.gathered_down(h[:, : len(at)], w, index=at)
        assert torch.equal(listed.double(), exact.to(dtype).double()), f"{len(at)} of {depth} to {width}"


@every_dtype
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_many_rows_are_calls_of_few(residual: bool, dtype: torch.dtype):
    """Rows in three chunks give the same bits as calls with one chunk."""
    rows = 2 * ROW_CHUNK + 60
    gate, up, down = weights(dtype, 48, 50, 20)
    x, added = randn(1, rows, 48, dtype=dtype), randn(5, rows, 20, dtype=dtype)
    for selection in ({}, {"runs": [10, 25]}, {"index": torch.randperm(50)[:33]}):
        h = ops.gathered_swiglu(x, gate, up, **selection)
        whole = ops.gathered_ffn(x, gate, up, down, **selection, residual=added if residual else None)
        half = ops.gathered_down(h, down, **selection, residual=added if residual else None)
        for part in torch.arange(rows).split(100):
            some = added[part] if residual else None
            assert torch.equal(ops.gathered_swiglu(x[part], gate, up, **selection), h[part])
            assert torch.equal(ops.gathered_ffn(x[part], gate, up, down, **selection, residual=some), whole[part])
            assert torch.equal(ops.gathered_down(h[part], down, **selection, residual=some), half[part])


@every_dtype
def test_norms_of_many_rows_are_those_of_all_calls(dtype: torch.dtype):
    gate, up, down = weights(dtype, 48, 50, 20)
    x = randn(1, 2 * ROW_CHUNK + 60, 48, dtype=dtype)
    whole, parts = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    ops.gathered_ffn(x, gate, up, down, norms=whole)
    for part in x.split(100):
        ops.gathered_ffn(part, gate, up, down, norms=parts)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)


@every_dtype
def test_an_index_may_skip_elements(dtype: torch.dtype):
    gate, up, down = weights(dtype, 64, 90, 40)
    x = randn(1, 6, 64, dtype=dtype)
    for of in (torch.int32, torch.int64):
        index = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(of)[::2]
        assert index.stride() == (2,)
        dense = index.contiguous()
        assert torch.equal(
            ops.gathered_ffn(x, gate, up, down, index=index), ops.gathered_ffn(x, gate, up, down, index=dense)
        )
        assert torch.equal(ops.gathered_swiglu(x, gate, up, index=index), ops.gathered_swiglu(x, gate, up, index=dense))


@every_dtype
def test_rows_are_independent(dtype: torch.dtype):
    """A row gives the same bits alone, in any batch, and with any number of threads."""
    gate, up, down = weights(dtype, 300, 200, 129)
    x = randn(1, 29, 300, dtype=dtype)
    threads = torch.get_num_threads()
    for selection in ({}, {"runs": [7, 150]}, {"runs": [1, 40, 90, 33]}, {"index": torch.randperm(200)[:77]}):
        whole = ops.gathered_ffn(x, gate, up, down, **selection)
        try:
            torch.set_num_threads(1)
            assert torch.equal(ops.gathered_ffn(x, gate, up, down, **selection), whole)
        finally:
            torch.set_num_threads(threads)
        for r in (0, 5, 28):
            assert torch.equal(ops.gathered_ffn(x[r : r + 1], gate, up, down, **selection)[0], whole[r])
        assert torch.equal(ops.gathered_ffn(x[3:11], gate, up, down, **selection), whole[3:11])


@every_dtype
def test_an_index_list_equals_the_runs_it_spells(dtype: torch.dtype):
    gate, up, down = weights(dtype, 64, 90, 40)
    x = randn(1, 6, 64, dtype=dtype)
    runs = [2, 30, 50, 20]
    index = selected({"runs": runs}, 90)
    assert torch.equal(ops.gathered_ffn(x, gate, up, down, runs=runs), ops.gathered_ffn(x, gate, up, down, index=index))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_runs_of_every_shape(data: st.DataObject):
    neurons, rows = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    cuts = sorted(data.draw(st.sets(st.integers(0, neurons), max_size=8)))
    runs = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    dtype = data.draw(st.sampled_from(DTYPES))
    at = selected({"runs": runs}, neurons)
    w, h = integers(1, 11, neurons, dtype=dtype), integers(2, rows, at.numel(), dtype=dtype)
    exact = h.double() @ w.double()[:, at].T
    assert torch.equal(ops.gathered_down(h, w, runs).double(), exact)


@every_dtype
def test_bad_values_stay_in_their_row(dtype: torch.dtype):
    gate, up, down = weights(dtype, 48, 50, 20)
    x = randn(1, 9, 48, dtype=dtype)
    expected = ops.gathered_ffn(x, gate, up, down)
    x[2, 5], x[7, 0] = float("nan"), float("inf")
    got = ops.gathered_ffn(x, gate, up, down)
    keep = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(got[keep], expected[keep])
    assert got[2].isnan().all() and not got[7].isfinite().all()


@every_dtype
def test_neurons_left_out_may_hold_anything(dtype: torch.dtype):
    gate, up, down = weights(dtype, 48, 50, 20)
    x = randn(1, 4, 48, dtype=dtype)
    for selection in ({"runs": [10, 25]}, {"runs": [0, 7, 20, 11]}, {"index": torch.tensor([1, 40, 22])}):
        expected = ops.gathered_ffn(x, gate, up, down, **selection)
        out = torch.ones(50, dtype=torch.bool)
        out[selected(selection, 50)] = False
        poisoned = [t.clone() for t in (gate, up, down)]
        poisoned[0][out], poisoned[1][out], poisoned[2][:, out] = float("nan"), float("inf"), float("nan")
        assert torch.equal(ops.gathered_ffn(x, *poisoned, **selection), expected)


def test_cancelling_sums_and_extreme_gates():
    down = torch.tensor([[1.0, -1.0] * 500])
    assert ops.gathered_down(torch.full((3, 1000), 1e4), down).abs().max() == 0
    gate = torch.tensor([[100.0], [-100.0], [0.0], [-1e30], [1e30]])
    h = ops.gathered_swiglu(torch.ones(1, 1), gate, torch.ones(5, 1))
    assert h[0, 0] == 100 and abs(h[0, 1]) < 1e-40 and h[0, 2] == 0 and h[0, 3] == 0 and h[0, 4] == 1e30


@every_dtype
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64])
def test_norms_inside_the_pass(dtype: torch.dtype, acc_dtype: torch.dtype):
    gate, up, down = weights(dtype, 48, 50, 20)
    x = randn(1, 33, 48, dtype=dtype)
    norms = torch.full((25,), 2.0, dtype=acc_dtype)
    y = ops.gathered_ffn(x, gate, up, down, runs=[10, 25], norms=norms)
    assert torch.equal(y, ops.gathered_ffn(x, gate, up, down, runs=[10, 25]))
    h = F.silu(x.double() @ gate[10:35].double().T) * (x.double() @ up[10:35].double().T)
    torch.testing.assert_close(norms.double(), 2 + h.square().sum(0), rtol=1e-5, atol=1e-5)
    acc = torch.zeros(20, dtype=acc_dtype)
    assert ops.neuron_norms_(acc, y) is acc
    torch.testing.assert_close(acc, reference.neuron_norms_(torch.zeros_like(acc), y))


def test_norms_and_out_exclude_each_other():
    gate, up, down = weights(torch.float32, 48, 50, 20)
    out, norms = torch.full((2, 20), 7.0), torch.zeros(50)
    with pytest.raises(ValueError, match="out: expected None together with norms"):
        ops.gathered_ffn(torch.randn(2, 48), gate, up, down, norms=norms, out=out)
    assert (out == 7).all() and (norms == 0).all()


@pytest.mark.parametrize(
    ("selection", "error", "text"),
    [
        ({"runs": [0, 5, 3, 2]}, IndexError, "runs"),
        ({"runs": [5, 2, 0, 2]}, IndexError, "runs"),
        ({"runs": [0, 51]}, IndexError, "runs"),
        ({"runs": [-1, 2]}, IndexError, "runs"),
        ({"runs": [2**62, 2**62]}, IndexError, "runs"),
        ({"runs": [0]}, ValueError, "pairs"),
        ({"runs": [(0, 1, 2)]}, ValueError, "runs"),
        ({"runs": [(0, 1, 2), (1, 5, 2)]}, ValueError, "runs: expected tuples of 2 numbers, got one of 3"),
        ({"runs": [1.5, 2]}, TypeError, "runs"),
        ({"index": torch.tensor([0, 50])}, IndexError, "index"),
        ({"index": torch.tensor([-1, 3])}, IndexError, "index"),
        ({"index": torch.tensor([3, 3])}, IndexError, "index"),
        ({"index": torch.tensor([[1]])}, ValueError, "index"),
        ({"index": torch.tensor([1.0])}, TypeError, "index"),
        ({"index": torch.tensor([1]), "runs": [0, 1]}, ValueError, "at most one"),
    ],
    ids=str,
)
def test_bad_selections(selection: dict, error: type[Exception], text: str):
    gate, up, down = weights(torch.float32, 48, 50, 20)
    x, out = torch.randn(2, 48), torch.full((2, 20), 7.0)
    with pytest.raises((error, ValueError) if error is IndexError else error, match=text):
        ops.gathered_ffn(x, gate, up, down, **selection, out=out)
    with pytest.raises((error, ValueError) if error is IndexError else error, match=text):
        ops.gathered_swiglu(x, gate, up, **selection)
    assert (out == 7).all()
    assert ops.gathered_ffn(x, gate, up, down, out=out) is out
