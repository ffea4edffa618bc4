"""Norms: accuracy relative to torch's own error, exact integers, inf and NaN stay in their row, modulation and gates."""

from __future__ import annotations

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
def batches(draw: st.DrawFn) -> tuple[int, int, int]:
    """Sizes of [batches, tokens, width], empty ones too."""
    return draw(st.integers(0, 4)), draw(st.integers(0, 12)), draw(st.integers(1, 33))


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(DTYPES), st.integers(0, 2))
def test_modulation_of_every_shape(shape: tuple[int, int, int], dtype: torch.dtype, first: int):
    """`x` is a slice of a longer sequence, so its batches are not contiguous."""
    count, tokens, width = shape
    x = randn(1, count, tokens + first, width, dtype=dtype)[:, first:]
    w, (shift, scale) = randn(2, width, dtype=dtype), randn(3, count, 2 * width, dtype=dtype).chunk(2, dim=1)
    inputs = (w, 1e-6, shift, scale)
    truth = reference.rms_norm(x.double(), w.double(), 1e-6, shift.double(), scale.double())
    assert_accurate(ops.rms_norm(x, *inputs), truth, reference.rms_norm(x, *inputs))


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(DTYPES), st.booleans())
def test_gates_of_every_shape(shape: tuple[int, int, int], dtype: torch.dtype, gated: bool):
    count, tokens, width = shape
    x, y = randn(1, *shape, dtype=dtype), randn(2, count, tokens + 1, width, dtype=dtype)[:, 1:]
    gate = randn(3, count, 6 * width, dtype=dtype)[:, width : 2 * width] if gated else None
    truth = x.double() + y.double() * (gate.double()[:, None] if gate is not None else 1)
    ours = x.clone()
    assert ops.gate_add_(ours, y, gate) is ours
    assert_accurate(ours, truth, reference.gate_add_(x.clone(), y, gate))


@every_dtype
def test_the_modulation_of_an_unmodulated_row_changes_no_bit(dtype: torch.dtype):
    x, w, y = randn(1, 2, 5, 40, dtype=dtype), randn(2, 40, dtype=dtype), randn(3, 2, 5, 40, dtype=dtype)
    none = torch.zeros(2, 40, dtype=dtype)
    assert torch.equal(ops.rms_norm(x, w, 1e-6, none, none.clone()), ops.rms_norm(x, w, 1e-6))
    assert torch.equal(ops.gate_add_(x.clone(), y, none + 1), ops.gate_add_(x.clone(), y))


@pytest.mark.parametrize(
    ("shift", "scale", "text"),
    [
        ((2, 5), None, "scale: expected a tensor, because shift is given"),
        (None, (2, 5), "shift: expected a tensor, because scale is given"),
        ((3, 5), (2, 5), "shift: expected size 2 in dimension 0, got 3"),
        ((2, 5), (1, 5), "scale: expected size 2 in dimension 0, got 1"),
        ((2, 4), (2, 5), "shift: expected size 5 in dimension 1, got 4"),
        ((2, 7, 5), (2, 5), "shift: expected 2 dimensions, got 3"),
    ],
    ids=str,
)
def test_bad_modulation(shift: tuple[int, ...] | None, scale: tuple[int, ...] | None, text: str):
    x, w = torch.randn(2, 7, 5), torch.ones(5)
    given = [None if shape is None else torch.zeros(shape) for shape in (shift, scale)]
    with pytest.raises(ValueError, match=text):
        ops.rms_norm(x, w, 1e-6, *given)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (2, 7, 5), (5,)], ids=str)
def test_a_bad_gate_is_named_and_nothing_is_written(shape: tuple[int, ...]):
    x = torch.randn(2, 7, 5)
    before = x.clone()
    with pytest.raises(ValueError, match="gate: expected"):
        ops.gate_add_(x, x.clone(), torch.zeros(shape))
    assert torch.equal(x, before)


def test_modulation_needs_the_number_of_batches():
    with pytest.raises(ValueError, match="x: expected 3 dimensions, got 2"):
        ops.rms_norm(torch.randn(14, 5), torch.ones(5), 1e-6, torch.zeros(2, 5), torch.zeros(2, 5))


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
