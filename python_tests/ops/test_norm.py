"""Norm family: accuracy by torch's own error, exact integers, containment of inf and NaN, spans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import GRAIN, LANES, around, randn
from support.ops_cases import DTYPES
from support.tolerance import assert_accurate

from flashu_ext import ops
from flashu_ext.ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 3, 1536), (17, 2049), (0, 8), (4, 0)] + [
    (3, width) for width in around(LANES, 2 * LANES, GRAIN)
]


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype):
    x, w = randn(1, *shape, dtype=dtype), randn(2, shape[-1], dtype=dtype)
    truth = reference.rms_norm(x.double(), w.double(), 1e-6)
    # torch's own fused form rounds once, as ours does.
    torchs = torch.nn.functional.rms_norm(x, (shape[-1],), w, 1e-6) if shape[-1] else x
    assert_accurate(ops.rms_norm(x, w, 1e-6), truth, torchs)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype):
    x, r, w = randn(1, *shape, dtype=dtype), randn(2, *shape, dtype=dtype), randn(3, shape[-1], dtype=dtype)
    stored = (r.float() + x.float()).to(dtype)
    ours, residual = x.clone(), r.clone()
    assert ops.add_rms_norm_(ours, residual, w, 1e-5) is ours
    assert torch.equal(residual, stored)
    torchs = torch.nn.functional.rms_norm(stored, (shape[-1],), w, 1e-5) if shape[-1] else stored
    assert_accurate(ours, reference.rms_norm(stored.double(), w.double(), 1e-5), torchs)


@every_dtype
def test_bad_rows_stay_in_their_row(dtype: torch.dtype):
    x, w = randn(1, 6, 40, dtype=dtype), randn(2, 40, dtype=dtype)
    expected = ops.rms_norm(x, w, 1e-6)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    got = ops.rms_norm(x, w, 1e-6)
    keep = [0, 2, 3, 5]
    assert torch.equal(got[keep], expected[keep])
    assert got[1].isnan().all() and not got[4].isfinite().all()


@every_dtype
def test_zero_rows_and_denormals(dtype: torch.dtype):
    tiny = torch.full((2, 16), torch.finfo(dtype).smallest_normal / 4).to(dtype)
    tiny[0] = 0
    w = torch.ones(16, dtype=dtype)
    got = ops.rms_norm(tiny, w, 1e-6)
    assert got.isfinite().all() and (got[0] == 0).all()
    torch.testing.assert_close(got, reference.rms_norm(tiny, w, 1e-6))


@st.composite
def span_lists(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, int]]]:
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    spans = []
    for row in range(rows):
        cuts = sorted(draw(st.sets(st.integers(0, tokens), max_size=4)))
        spans += [(row, a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    return rows, tokens, draw(st.permutations(spans))


@settings(deadline=None, max_examples=60)
@given(span_lists(), st.integers(1, 33), st.sampled_from(DTYPES))
def test_spans_of_every_shape(case: tuple[int, int, list[tuple[int, int, int]]], width: int, dtype: torch.dtype):
    rows, tokens, spans = case
    x, w = randn(1, rows, tokens, width, dtype=dtype), randn(2, width, dtype=dtype)
    shift, scale, gate = (randn(seed, len(spans), width, dtype=dtype) for seed in (3, 4, 5))
    wide = [t.double() for t in (x, w, shift, scale)]
    truth = reference.span_modulate(*wide, spans, 1e-6)
    assert_accurate(
        ops.span_modulate(x, w, shift, scale, spans, 1e-6),
        truth,
        reference.span_modulate(x, w, shift, scale, spans, 1e-6),
    )
    y = randn(6, rows, tokens, width, dtype=dtype)
    truth = reference.span_gate_add_(x.double(), y.double(), gate.double(), spans)
    ours = ops.span_gate_add_(x.clone(), y, gate, [number for span in spans for number in span])
    assert_accurate(ours, truth, reference.span_gate_add_(x.clone(), y, gate, spans))


@pytest.mark.parametrize(
    ("spans", "error", "text"),
    [
        ([0, 1], ValueError, "triples"),
        ([(0, 1)], ValueError, "spans"),
        (["a"], TypeError, "spans"),
        ([0, 0, 8], IndexError, r"\[0, 7\)"),
        ([2, 0, 1], IndexError, "rows in"),
        ([0, -1, 2], IndexError, "tokens in"),
        ([0, 6, 2**62], IndexError, "tokens in"),
        ([0, 0, 3, 0, 2, 1], IndexError, "disjoint"),
    ],
    ids=str,
)
def test_bad_spans(spans: list, error: type[Exception], text: str):
    count = max(1, len(spans) // 3)
    x, w = torch.randn(2, 7, 5), torch.ones(5)
    modulation = torch.zeros(count, 5)
    before = x.clone()
    with pytest.raises(error, match=text):
        ops.span_modulate(x, w, modulation, modulation.clone(), spans)
    with pytest.raises(error, match=text):
        ops.span_gate_add_(x, x.clone(), modulation, spans)
    assert torch.equal(x, before)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_bad_eps(eps: float):
    with pytest.raises(ValueError, match="eps"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(3), eps)


def test_aliases_are_refused():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="overlaps"):
        ops.add_rms_norm_(x, x, torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="share memory"):
        ops.add_rms_norm_(torch.zeros(1, 8).expand(4, 8), x, torch.ones(8), 1e-6)
