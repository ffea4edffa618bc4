"""Attention: accuracy relative to torch's own error, bits that depend on what a query sees alone, masks, lengths, errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import KEY_BLOCK, PANELS, around, randn
from support.op_case import DTYPES
from support.tolerance import assert_accurate
from torch import Tensor
from torch.nn import functional as F

from flashu_ext import ops
from flashu_ext.ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cached(seed: int, rows: int, kv_heads: int, tokens: int, d: int, dtype: torch.dtype, spare: int = 7) -> Tensor:
    """A transposed view of a cache [rows, slots, kv_heads, d], with NaN in the slots that are left."""
    cache = torch.full((rows, tokens + spare, kv_heads, d), float("nan"), dtype=dtype)
    cache[:, :tokens] = randn(seed, rows, tokens, kv_heads, d, dtype=dtype)
    return cache[:, :tokens].transpose(1, 2)


def inputs(
    rows: int, heads: int, kv_heads: int, n: int, tokens: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    query = randn(1, rows, n, heads, d, dtype=dtype, scale=1.5).transpose(1, 2)
    return query, cached(2, rows, kv_heads, tokens, d, dtype), cached(3, rows, kv_heads, tokens, d, dtype)


def drawn_mask(seed: int, *shape: int, dtype: torch.dtype, hidden: float = 0.4) -> Tensor:
    """Numbers to add, among them many of the lowest."""
    chance = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return randn(seed, *shape, dtype=dtype).masked_fill(chance < hidden, torch.finfo(dtype).min)


def exact(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """In fp64, where the lowest number of the dtype is fp64's."""
    if mask is not None:
        lowest = mask == torch.finfo(mask.dtype).min
        mask = mask.double().masked_fill(lowest, torch.finfo(torch.float64).min)
    return reference.attention(query.double(), key.double(), value.double(), lengths, mask)


def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return y.transpose(1, 2)


@every_dtype
@pytest.mark.parametrize("d", [3, 16, 72, 128, 300])
def test_is_as_accurate_as_torch(d: int, dtype: torch.dtype):
    for n, tokens in ((1, 1), (1, 70), (5, 129), (40, 300)):
        rows = (200 if d > 16 else 1000) // (n + 1)  # enough queries: the errors of one's columns are not independent
        query, key, value = inputs(rows, 4, 2, n, tokens, d, dtype)
        mask = drawn_mask(4, rows, 1, n, tokens, dtype=dtype)
        mask[..., 0] = 0
        for added in (None, mask):
            y = ops.attention(query, key, value, mask=added)
            assert y.is_contiguous()
            assert_accurate(y, exact(query, key, value, mask=added), torchs(query, key, value, added))


@every_dtype
@pytest.mark.parametrize("tokens", around(KEY_BLOCK, 2 * KEY_BLOCK))
def test_every_edge_of_keys_and_queries(tokens: int, dtype: torch.dtype):
    for n in (1, *(panel + beside for panel in PANELS for beside in (-1, 0, 1)), 4 * PANELS[2] + 1):
        query, key, value = inputs(1, 2, 2, n, tokens, 8, dtype)
        truth = exact(query, key, value)
        assert_accurate(ops.attention(query, key, value), truth, torchs(query, key, value))


@every_dtype
def test_equal_keys_give_the_average_and_one_key_its_value(dtype: torch.dtype):
    key, value = (
        torch.ones(2, 2, 64, 5, dtype=dtype),
        torch.arange(64.0)[:, None].expand(2, 2, 64, 5).to(dtype).contiguous(),
    )
    y = ops.attention(randn(1, 2, 4, 3, 5, dtype=dtype), key, value)
    torch.testing.assert_close(y, torch.full_like(y, 31.5))
    mask = torch.full((1, 1, 1, 64), float("-inf"), dtype=dtype)
    mask[..., 37] = 5.0
    assert torch.equal(ops.attention(randn(1, 2, 4, 3, 5, dtype=dtype), key, value, mask=mask), torch.full_like(y, 37))


def pieces(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, lengths: list[int], whole: Tensor) -> None:
    """Parts of the call that gave `whole` have the same bits."""
    _, heads, n, _ = query.shape
    group = heads // key.shape[1]

    def same(y: Tensor, part: Tensor) -> None:
        assert torch.equal(y, part)

    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = query[one], key[one, :, :length], value[one, :, :length], None, mask[one, ..., :length]
        same(ops.attention(*alone), whole[one])
        for first, last in ((0, 1), (n // 2, n), (n - 1, n), (1, n - 1)):
            part = ops.attention(query[one, :, first:last], *alone[1:4], alone[4][:, :, first:last])
            same(part, whole[one, first:last])
        for kv_head in range(key.shape[1]):
            of_head = slice(kv_head * group, (kv_head + 1) * group)
            kv = slice(kv_head, kv_head + 1)
            same(
                ops.attention(query[one, of_head], alone[1][:, kv], alone[2][:, kv], None, alone[4]),
                whole[one, :, of_head],
            )
            last = (kv_head + 1) * group - 1
            heads_own = query[one, last : last + 1], alone[1][:, kv], alone[2][:, kv], None, alone[4]
            same(ops.attention(*heads_own), whole[one, :, last : last + 1])
        for i in (0, n // 2, n - 1):
            seen = (mask[row, 0, i, :length] > torch.finfo(mask.dtype).min).nonzero()
            end = int(seen[-1]) + 1 if len(seen) else length
            few = query[one, :, i : i + 1], key[one, :, :end], value[one, :, :end], None, mask[one, :, i : i + 1, :end]
            same(ops.attention(*few), whole[one, i : i + 1])


@every_dtype
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "n", "tokens", "d"),
    [(3, 6, 2, 75, 300, 40), (2, 4, 4, 37, 129, 72), (2, 3, 1, 9, 500, 128), (1, 12, 2, 30, 260, 17)],
)
def test_a_query_has_the_same_bits_in_any_company(
    rows: int, heads: int, kv_heads: int, n: int, tokens: int, d: int, dtype: torch.dtype
):
    query, key, value = inputs(rows, heads, kv_heads, n, tokens, d, dtype)
    mask = drawn_mask(4, rows, 1, n, tokens, dtype=dtype)
    for i in range(n):  # what a query sees ends and begins anywhere, in other blocks than its neighbours' sight
        mask[:, :, i, tokens - i * 5 % tokens :] = torch.finfo(dtype).min
        mask[:, :, i, : i * 7 % (tokens // 2)] = torch.finfo(dtype).min
    mask[0, 0, n // 2] = torch.finfo(dtype).min
    lengths = [tokens - 53 * row % tokens for row in range(rows)]
    with threads(1):
        whole = ops.attention(query, key, value, torch.tensor(lengths), mask)
    assert whole.isfinite().all()
    truth = exact(query, key, value, torch.tensor(lengths), mask)
    torch.testing.assert_close(whole.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
    for count in (1, 2, 3, 4):
        with threads(count):
            assert torch.equal(ops.attention(query, key, value, torch.tensor(lengths), mask), whole)
            pieces(query, key, value, mask, lengths, whole)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    shuffled = ops.attention(query[:, :, order], key, value, torch.tensor(lengths), mask[:, :, order])
    assert torch.equal(shuffled, whole[:, order])
    backwards = [t.flip(0) for t in (query, key, value, torch.tensor(lengths), mask)]
    assert torch.equal(ops.attention(*backwards), whole.flip(0))


@every_dtype
def test_what_is_behind_a_length_is_not_read(dtype: torch.dtype):
    query, key, value = inputs(3, 4, 2, 20, 200, 24, dtype)
    lengths = [200, 77, 0]
    expected = [
        ops.attention(query[r : r + 1], key[r : r + 1, :, :k], value[r : r + 1, :, :k]) for r, k in enumerate(lengths)
    ]
    for row, length in enumerate(lengths):
        key[row, :, length:] = float("nan")
        value[row, :, length:] = float("nan")
    assert torch.equal(ops.attention(query, key, value, torch.tensor(lengths)), torch.cat(expected))
    assert torch.equal(expected[2], torch.zeros_like(expected[2]))


@every_dtype
def test_hidden_keys_count_for_nothing_wherever_they_are(dtype: torch.dtype):
    """Left-padded, in the middle, a whole block, behind the last; by -inf and by the lowest number."""
    tokens = 3 * KEY_BLOCK + 9
    query, key, value = inputs(1, 2, 1, 6, tokens, 16, dtype)
    for hide in (torch.finfo(dtype).min, float("-inf")):
        for begin, end in ((0, 5), (0, KEY_BLOCK), (0, 2 * KEY_BLOCK + 3), (KEY_BLOCK, 2 * KEY_BLOCK), (300, tokens)):
            mask = torch.zeros(1, 1, 1, tokens, dtype=dtype)
            mask[..., begin:end] = hide
            keep = mask[0, 0, 0] == 0
            y = ops.attention(query, key, value, mask=mask)
            bare = query, key[:, :, keep], value[:, :, keep]
            assert_accurate(y, exact(*bare), torchs(*bare))
            others = [t.clone() for t in (key, value)]
            for t in others:
                t[:, :, ~keep] = 1000.0
            assert torch.equal(ops.attention(query, *others, mask=mask), y)


@every_dtype
def test_a_query_that_sees_nothing(dtype: torch.dtype):
    query, key, value = inputs(2, 4, 2, 5, 140, 24, dtype)
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(2, 1, 5, 140, dtype=dtype)
    plain = ops.attention(query, key, value)
    mask[0, 0, 1] = float("-inf")
    mask[1, 0, 2] = lowest
    mask[1, 0, 3, :100], mask[1, 0, 3, 100:] = lowest, float("-inf")
    y = ops.attention(query, key, value, mask=mask)
    assert torch.equal(y[0, 1], torch.zeros_like(y[0, 1]))

    def average(values: Tensor) -> Tensor:
        return values.double().mean(1).repeat_interleave(2, 0)

    for got, values in ((y[1, 2], value[1]), (y[1, 3], value[1, :, :100])):
        torch.testing.assert_close(got.double(), average(values), rtol=torch.finfo(dtype).eps, atol=1e-6)
    rest = torch.ones(2, 5, dtype=torch.bool)
    rest[0, 1] = rest[1, 2] = rest[1, 3] = False
    assert torch.equal(y[rest], plain[rest])
    none = ops.attention(query, key, value, torch.tensor([0, 140]), mask)
    assert torch.equal(none[0], torch.zeros_like(none[0])) and torch.equal(none[1], y[1])


@every_dtype
def test_bad_values_stay_with_their_query_and_their_head(dtype: torch.dtype):
    query, key, value = inputs(2, 4, 2, 9, 150, 24, dtype)
    plain = ops.attention(query, key, value)
    query[0, 1, 3, 5] = float("nan")
    y = ops.attention(query, key, value)
    assert y[0, 3, 1].isnan().all()
    keep = torch.ones(2, 9, 4, dtype=torch.bool)
    keep[0, 3, 1] = False
    assert torch.equal(y[keep], plain[keep])
    value[1, 0, 20, 7] = float("inf")
    y = ops.attention(query, key, value)
    assert torch.equal(y[1, :, :2, 7], torch.full_like(y[1, :, :2, 7], float("inf")))
    keep[1, :, :2] = False
    assert torch.equal(y[keep], plain[keep])


@every_dtype
def test_large_and_far_apart_scores(dtype: torch.dtype):
    query, key, value = inputs(1, 2, 2, 7, 400, 64, dtype)
    for factor in (8.0, 60.0, 1e-4):
        given = query * factor, key, value
        assert_accurate(ops.attention(*given), exact(*given), torchs(*given))
    rising = key * torch.linspace(0.01, 4, 400, dtype=dtype)[:, None]
    given = query * 8, rising, value
    assert_accurate(ops.attention(*given), exact(*given), torchs(*given))


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_every_shape_stride_mask_and_length(data: st.DataObject):
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, kv_heads, group = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    n, tokens, d = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 300)), data.draw(st.integers(0, 40))
    query = randn(1, rows, n, kv_heads * group, d + 3, dtype=dtype)[..., :d].transpose(1, 2)
    key, value = (cached(s, rows, kv_heads, tokens, d, dtype, data.draw(st.integers(0, 5))) for s in (2, 3))
    if rows and data.draw(st.booleans()):
        key, value = (t[:1].expand(rows, -1, -1, -1) for t in (key, value))
    lengths, mask = None, None
    if data.draw(st.booleans()):
        lengths = torch.tensor([data.draw(st.integers(0, tokens)) for _ in range(rows)], dtype=torch.int64)
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([rows, 1])), 1, data.draw(st.sampled_from([n, 1])), tokens
        mask = drawn_mask(4, *shape, dtype=dtype, hidden=data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])))
        if data.draw(st.booleans()):
            mask[mask == torch.finfo(dtype).min] = float("-inf")
    y = ops.attention(query, key, value, lengths, mask)
    assert y.shape == (rows, n, kv_heads * group, d) and y.is_contiguous()
    truth = exact(query, key, value, lengths, mask)
    torch.testing.assert_close(y.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
    out = torch.full((rows, n, kv_heads * group, d + 2), 7.0, dtype=dtype)[..., :d]
    assert ops.attention(query, key, value, lengths, mask, out=out) is out and torch.equal(out, y)
    dense = [None if t is None else t.contiguous() for t in (query, key, value, lengths, mask)]
    assert torch.equal(ops.attention(*dense), y)


def test_is_for_the_cpu():
    assert ops.attention.is_supported("cpu", torch.float32) and not ops.attention.is_supported("cuda", torch.float32)


def call(**changed: Any) -> Tensor:
    query, key, value = inputs(2, 6, 2, 3, 10, 8, torch.float32)
    given = {"query": query, "key": key, "value": value, "lengths": torch.tensor([3, 10])}
    return ops.attention(**{**given, "mask": torch.zeros(2, 1, 3, 10), **changed})


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"query": torch.zeros(2, 6, 24)}, ValueError, r"query: expected 4 dimensions, got 3"),
        (
            {"query": torch.zeros(2, 5, 3, 8)},
            ValueError,
            "key: expected a number of heads that divides query's 5, got 2",
        ),
        ({"query": torch.zeros(2, 6, 3, 8).double()}, TypeError, "query: expected float32 or"),
        ({"key": torch.zeros(2, 2, 10, 9)}, ValueError, "key: expected size 8 in dimension 3, got 9"),
        ({"key": torch.zeros(1, 2, 10, 8)}, ValueError, "key: expected size 2 in dimension 0, got 1"),
        (
            {"key": torch.zeros(2, 0, 10, 8)},
            ValueError,
            "key: expected a number of heads that divides query's 6, got 0",
        ),
        ({"key": torch.zeros(2, 2, 10, 8).half()}, TypeError, "key: expected float32 as query has"),
        (
            {"key": torch.zeros(2, 2, 10, 16)[..., ::2]},
            ValueError,
            "key: expected stride 1 in the last dimension, got 2",
        ),
        ({"value": torch.zeros(2, 2, 9, 8)}, ValueError, r"value: expected shape \[2, 2, 10, 8\] as key has"),
        ({"value": torch.zeros(2, 2, 10, 16)[..., ::2]}, ValueError, "value: expected stride 1"),
        ({"lengths": torch.tensor([3, 11])}, ValueError, "lengths: expected 0 to 10 keys, got 11 in row 1"),
        ({"lengths": torch.tensor([-1, 4])}, ValueError, "lengths: expected 0 to 10 keys, got -1 in row 0"),
        ({"lengths": torch.tensor([1, 4], dtype=torch.int32)}, TypeError, "lengths: expected int64, got int32"),
        ({"lengths": torch.tensor([1])}, ValueError, "lengths: expected size 2 in dimension 0, got 1"),
        ({"lengths": torch.tensor(1)}, ValueError, "lengths: expected 1 dimensions, got 0"),
        ({"mask": torch.zeros(2, 1, 3, 10).bool()}, TypeError, "mask: expected numbers, got a bool tensor"),
        ({"mask": torch.zeros(2, 1, 3, 10).half()}, TypeError, "mask: expected float32 as query has"),
        (
            {"mask": torch.zeros(2, 6, 3, 10)},
            ValueError,
            r"mask: expected shape \[2 or 1, 1, 3 or 1, 10\], got \[2, 6, 3, 10\]",
        ),
        ({"mask": torch.zeros(3, 10)}, ValueError, "mask: expected 4 dimensions, got 2"),
        ({"mask": torch.zeros(2, 1, 3, 20)[..., ::2]}, ValueError, "mask: expected stride 1"),
        ({"out": torch.zeros(2, 6, 3, 8)}, ValueError, "out: expected size 3 in dimension 1, got 6"),
        ({"out": torch.zeros(2, 3, 6, 8).half()}, TypeError, "out: expected float32 as query has"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else None,
)
def test_what_is_wrong_is_named(changed: dict[str, Tensor], kind: type[Exception], message: str):
    with pytest.raises(kind, match=f"attention: {message}"):
        call(**changed)


def test_a_wrong_length_is_said_before_anything_is_written():
    out = torch.full((2, 3, 6, 8), 7.0)
    for lengths in itertools.permutations((3, 11)):
        with pytest.raises(ValueError, match="lengths: expected 0 to 10 keys, got 11"):
            call(lengths=torch.tensor(lengths), out=out)
    assert torch.equal(out, torch.full_like(out, 7.0))
    call(out=out)
    assert not (out == 7).any()
