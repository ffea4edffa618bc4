"""Rotary embedding into a cache: accuracy relative to torch's own error, slots, strides, dtypes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import Guarded
from support.op_case import DTYPES
from support.tolerance import assert_accurate
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import reference
from flashu_ext.ops.kernel_sets import resolve
from flashu_ext.planning.config import FlashUConfig

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
FAR = 2**63 - 1


def arguments_of(
    dtype: torch.dtype,
    rows: int = 2,
    n: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    capacity: int = 7,
    tables: int | None = None,
    norms: bool = False,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows * 1000 + n * 100 + heads * 10 + d)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    angle = (3 * randn(rows if tables is None else tables, n, d // 2)).repeat(1, 1, 2)
    made: dict[str, Any] = {
        "query": randn(rows, n, heads, d),
        "key": randn(rows, n, kv_heads, d),
        "value": randn(rows, n, kv_heads, d),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "keys": randn(rows, capacity, kv_heads, d),
        "values": randn(rows, capacity, kv_heads, d),
    }
    if norms:
        made |= {"query_norm": randn(d), "key_norm": randn(d)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_right(arguments: dict[str, Any]) -> None:
    """Queries and keys within the tolerance; values, and slots without a token, bit for bit."""
    ours, theirs, truth = copied(arguments), copied(arguments), doubled(arguments)
    truth["keys"], truth["values"] = truth["keys"].clone(), truth["values"].clone()
    true_queries, torchs = reference.rotary_cache_(**truth), reference.rotary_cache_(**theirs)
    got = ops.rotary_cache_(**ours)
    rows, n, heads, d = arguments["query"].shape
    assert got.shape == (rows, heads, n, d) and got.is_contiguous() and got.dtype == arguments["query"].dtype
    assert_accurate(got, true_queries, torchs)
    assert_accurate(ours["keys"], truth["keys"], theirs["keys"])
    assert torch.equal(ours["values"], theirs["values"])
    kept = theirs["values"] == arguments["values"]  # slots without a value
    kept = kept.all(-1, keepdim=True).expand_as(kept)
    assert torch.equal(ours["keys"][kept], arguments["keys"][kept])
    for name in ("query", "key", "value", "cos", "sin"):
        assert torch.equal(ours[name], arguments[name]), f"{name} was written"


@every_dtype
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("d", [2, 6, 8, 16, 64, 72, 88, 128, 130, 256, 1030])
def test_every_head_dimension(d: int, norms: bool, dtype: torch.dtype):
    assert_right(arguments_of(dtype, d=d, norms=norms))


@every_dtype
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 1, "n": 1, "heads": 12, "kv_heads": 2, "d": 128, "capacity": 40},
        {"rows": 2, "n": 33, "heads": 3, "kv_heads": 3, "d": 64, "capacity": 33},
        {"rows": 3, "n": 5, "tables": 1},
        {"n": 0},
        {"rows": 0},
        {"heads": 0},
        {"kv_heads": 0},
        {"d": 0},
        {"n": 0, "capacity": 0},
    ],
    ids=str,
)
def test_sizes_and_empty_inputs(sizes: dict[str, int], dtype: torch.dtype):
    assert_right(arguments_of(dtype, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_is_the_rotation_of_the_modules(dtype: torch.dtype):
    arguments = arguments_of(dtype, d=64, tables=1)
    cos, sin = (arguments[name][:, :, None] for name in ("cos", "sin"))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    expected, keys = rotate(arguments["query"]), rotate(arguments["key"])
    torch.testing.assert_close(ops.rotary_cache_(**arguments), expected.transpose(1, 2))
    torch.testing.assert_close(arguments["keys"][:, :3], keys)


@every_dtype
def test_norms_are_rounded_before_the_rotation(dtype: torch.dtype):
    """Equals `rms_norm` followed by this op without norms, bit for bit."""
    fused = arguments_of(dtype, d=72, norms=True)
    apart = copied(fused)
    norms = {"query": apart.pop("query_norm"), "key": apart.pop("key_norm")}
    for name, weight in norms.items():
        apart[name] = ops.rms_norm(apart[name], weight, 1e-5)
    assert torch.equal(ops.rotary_cache_(**fused, eps=1e-5), ops.rotary_cache_(**apart))
    assert torch.equal(fused["keys"], apart["keys"]) and torch.equal(fused["values"], apart["values"])


STARTS = st.one_of(st.integers(-9, 12), st.sampled_from([FAR, -FAR - 1, FAR - 1, -FAR]))


@settings(deadline=None, max_examples=60)
@given(st.lists(STARTS, min_size=1, max_size=4), st.booleans(), st.integers(0, 5), st.integers(0, 7))
def test_slots_outside_the_cache_are_not_written(starts: list[int], every: bool, n: int, capacity: int):
    """Compared with a loop over tokens; the memory around the caches is guarded."""
    rows = len(starts)
    arguments = arguments_of(torch.float32, rows=rows, n=n, d=8, capacity=capacity)
    starts = starts if every else starts[:1]
    guards = {name: Guarded(arguments[name], padding=3) for name in ("keys", "values")}
    turned = arguments_of(torch.float32, rows=rows, n=n, d=8, capacity=n)
    ops.rotary_cache_(**turned)
    expected = {name: arguments[name].clone() for name in guards}
    for row in range(rows):
        for token in range(n):
            slot = (starts * rows)[row] + token if len(starts) == 1 else starts[row] + token
            if 0 <= slot < capacity:
                expected["keys"][row, slot] = turned["keys"][row, token]
                expected["values"][row, slot] = turned["values"][row, token]
    for kernel in (ops.rotary_cache_, reference.rotary_cache_):
        for name, guarded in guards.items():
            guarded.tensor.copy_(arguments[name])
        kernel(**{**arguments, **{name: g.tensor for name, g in guards.items()}, "start": torch.tensor(starts)})
        for name, guarded in guards.items():
            guarded.check()
            torch.testing.assert_close(guarded.tensor, expected[name])


@pytest.mark.parametrize("shape", [(2,), (1,), ()], ids=str)
def test_start_of_every_shape(shape: tuple[int, ...]):
    arguments = arguments_of(torch.float32)
    expected = copied(arguments)
    ops.rotary_cache_(**expected, start=torch.tensor([2, 2]))
    ops.rotary_cache_(**arguments, start=torch.full(shape, 2))
    assert torch.equal(arguments["keys"], expected["keys"])
    assert torch.equal(arguments["values"], expected["values"])


@every_dtype
def test_strided_rows_transposed_caches_and_out(dtype: torch.dtype):
    """Query, key and value as slices of one product, caches as [rows, kv_heads, capacity, d], tables and starts padded."""
    plain = arguments_of(dtype, n=5, d=24, norms=True)
    start = torch.tensor([1, 2])
    expected = copied(plain)
    queries = ops.rotary_cache_(**expected, start=start)

    fused = torch.cat([plain["query"], plain["key"], plain["value"]], dim=2)
    caches = {name: plain[name].transpose(1, 2).contiguous() for name in ("keys", "values")}
    tables = {name: torch.cat([plain[name], plain[name]], dim=-1)[..., :24] for name in ("cos", "sin")}
    strided = {
        **plain,
        **tables,
        **{name: cache.transpose(1, 2) for name, cache in caches.items()},
        **dict(zip(("query", "key", "value"), fused.split([4, 2, 2], dim=2), strict=True)),
    }
    out = torch.zeros(2, 5, 4, 24, dtype=dtype).transpose(1, 2)
    got = ops.rotary_cache_(**strided, start=torch.stack([start, start], dim=1)[:, 0], out=out)
    assert got is out and torch.equal(out, queries)
    for name, cache in caches.items():
        assert torch.equal(cache.transpose(1, 2), expected[name])


def test_values_keep_their_bits():
    arguments = arguments_of(torch.bfloat16)
    bits = torch.randint(-(2**15), 2**15, arguments["value"].shape, dtype=torch.int16)
    ops.rotary_cache_(**{**arguments, "value": bits.view(torch.bfloat16)})
    assert torch.equal(arguments["values"][:, :3].view(torch.int16), bits)


@every_dtype
def test_a_bad_head_stays_in_its_head(dtype: torch.dtype):
    good = arguments_of(dtype, norms=True)
    bad = copied(good)
    bad["query"][1, 2, 3], bad["key"][0, 1, 0] = float("nan"), float("inf")
    expected, got = ops.rotary_cache_(**good), ops.rotary_cache_(**bad)
    assert got[1, 3, 2].isnan().all() and bad["keys"][0, 1, 0].isnan().any()
    got[1, 3, 2], bad["keys"][0, 1, 0] = expected[1, 3, 2], good["keys"][0, 1, 0]
    assert torch.equal(got, expected) and torch.equal(bad["keys"], good["keys"])


@every_dtype
def test_out_is_filled_and_returned(dtype: torch.dtype):
    arguments = arguments_of(dtype)
    expected = ops.rotary_cache_(**arguments)
    guarded = Guarded(torch.zeros_like(expected), padding=5)
    assert ops.rotary_cache_(**arguments, out=guarded.tensor) is guarded.tensor
    assert torch.equal(guarded.tensor, expected)
    guarded.check()


@pytest.mark.parametrize("with_out", [False, True], ids=["", "out"])
def test_compiles_with_transposed_caches_and_without_start(with_out: bool):
    def step(arguments: dict[str, Any], out: Tensor | None) -> Tensor:
        caches = {name: arguments[name].transpose(1, 2) for name in ("keys", "values")}
        return ops.rotary_cache_(**{**arguments, **caches}, out=out)

    def fresh() -> dict[str, Any]:
        arguments = arguments_of(torch.float32)
        return {**arguments, **{name: arguments[name].transpose(1, 2).contiguous() for name in ("keys", "values")}}

    eager, compiled = fresh(), fresh()
    out = torch.zeros(2, 4, 3, 16) if with_out else None
    expected = step(eager, None)
    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, out)
    assert torch.equal(got, expected) and (out is None or torch.equal(out, expected))
    assert torch.equal(compiled["keys"], eager["keys"]) and torch.equal(compiled["values"], eager["values"])


def test_the_kernel_set_has_it_and_a_fallback():
    cpu = torch.device("cpu")
    kernels, plain = (
        resolve(FlashUConfig.exact(norm_kernels=on), cpu, torch.float32).of("generation", "head")
        for on in (True, False)
    )
    assert kernels.rotary_cache_ is ops.rotary_cache_ and kernels.chosen["rotary_cache_"] == "flashu"
    assert plain.rotary_cache_ is reference.rotary_cache_ and "norm_kernels" in plain.fallbacks["rotary_cache_"]


WRONG = [
    ("query", lambda a: a["query"][..., :15], ValueError, "query: expected an even head dimension, got 15"),
    ("query", lambda a: a["query"][0], ValueError, "query: expected 4 dimensions, got 3"),
    ("query", lambda a: a["query"].int(), TypeError, "query: expected float32 or bfloat16 or float16, got int32"),
    ("key", lambda a: a["key"][:, :2], ValueError, "key: expected size 3 in dimension 1, got 2"),
    ("key", lambda a: a["key"].half(), TypeError, "key: expected float32 as query has, got float16"),
    ("value", lambda a: a["value"][:, :, :1], ValueError, r"value: expected shape \[2, 3, 2, 16\] as key has"),
    ("cos", lambda a: a["cos"][:, :, None], ValueError, "cos: expected 3 dimensions, got 4"),
    ("cos", lambda a: a["cos"].repeat(2, 1, 1), ValueError, "cos: expected 2 rows as query has, or 1, got 4"),
    ("sin", lambda a: a["sin"][..., :8], ValueError, "sin: expected size 16 in dimension 2, got 8"),
    ("sin", lambda a: a["sin"].bfloat16(), TypeError, "sin: expected float32 as query has, got bfloat16"),
    ("keys", lambda a: a["keys"][:1], ValueError, "keys: expected size 2 in dimension 0, got 1"),
    ("keys", lambda a: a["keys"].transpose(1, 2).contiguous(), ValueError, "keys: expected size 2 in dimension 2"),
    ("keys", lambda a: a["keys"][:1].expand(2, -1, -1, -1), ValueError, "keys: expected elements that do not share"),
    ("keys", lambda a: a["values"], ValueError, "values: expected memory of its own, got one that overlaps keys"),
    ("values", lambda a: a["values"][:, 1:], ValueError, r"values: expected shape \[2, 7, 2, 16\] as keys has"),
    ("value", lambda a: a["values"][:, :3], ValueError, "values: expected memory of its own, got .* value"),
    ("start", lambda a: torch.tensor([0, 0], dtype=torch.int32), TypeError, "start: expected int64, got int32"),
    ("start", lambda a: torch.zeros(3, dtype=torch.int64), ValueError, r"start: expected shape \[2\], \[1\] or \[\], got \[3\]"),
    ("start", lambda a: torch.zeros(2, 1, dtype=torch.int64), ValueError, r"start: expected .* got \[2, 1\]"),
    ("query_norm", lambda a: torch.ones(16), ValueError, r"key_norm: expected a weight as query_norm .* got none"),
    ("key_norm", lambda a: torch.ones(16), ValueError, r"query_norm: expected a weight as key_norm .* got none"),
    ("eps", lambda a: -1.0, ValueError, "eps: expected a finite number >= 0, got -1"),
    ("eps", lambda a: float("nan"), ValueError, "eps: expected a finite number"),
    ("out", lambda a: a["query"].view(2, 4, 3, 16), ValueError, "out: expected memory of its own, got .* query"),
    ("out", lambda a: a["query"].clone(), ValueError, "out: expected size 4 in dimension 1, got 3"),
    ("out", lambda a: torch.zeros(2, 4, 3, 16).double(), TypeError, "out: expected float32 as query has, got float64"),
    ("out", lambda a: torch.zeros(1, 1, 1, 16).expand(2, 4, 3, 16), ValueError, "out: expected elements that do not"),
    ("out", lambda a: a["keys"].flatten()[:384].view(2, 4, 3, 16), ValueError, "out: expected memory .* keys"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "error", "text"), WRONG, ids=[w[3][:48] for w in WRONG])
def test_wrong_arguments_are_named_and_nothing_is_written(name: str, wrong: Any, error: type[Exception], text: str):
    arguments = arguments_of(torch.float32)
    arguments[name] = wrong(arguments)
    before = copied(arguments)
    with pytest.raises(error, match=text):
        ops.rotary_cache_(**arguments)
    for key, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(arguments[key], value), f"{key} was written"


@pytest.mark.parametrize("name", ["query_norm", "key_norm"])
def test_wrong_norms(name: str):
    arguments = arguments_of(torch.float32, norms=True)
    for bad, text in (
        (torch.ones(15), f"{name}: expected size 16"),
        (torch.ones(16).half(), f"{name}: expected float32"),
        (torch.ones(32)[::2], f"{name}: expected stride 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            ops.rotary_cache_(**{**arguments, name: bad})


def test_without_a_start_the_cache_must_hold_all_tokens():
    arguments = arguments_of(torch.float32, capacity=2)
    with pytest.raises(ValueError, match=r"keys: expected a capacity of at least 3 tokens as query has .*, got 2"):
        ops.rotary_cache_(**arguments)
    ops.rotary_cache_(**arguments, start=torch.tensor(0))
