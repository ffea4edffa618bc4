"""Valid calls of every op, one per value of every option, for the tests of the common contract."""

from __future__ import annotations

from typing import Any

import torch

from support.ffn_cases import FFN, INT8
from support.inputs import randn
from support.op_case import Make, OpCase, cases_of

# ---- linear


def _linear(
    epilogue: str, added: bool = True, rows: tuple[int, ...] = (5,), depth: int = 24, columns: int = 37
) -> Make:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": randn(1, *rows, depth, dtype=dtype),
            "weight": randn(2, columns, depth, dtype=dtype, scale=0.2),
            "bias": randn(3, columns, dtype=dtype) if added else None,
            "residual": randn(4, *rows, columns, dtype=dtype) if added else None,
            "epilogue": epilogue,
        }

    return make


LINEAR = cases_of(
    "linear",
    {"": _linear("none"), "alone": _linear("none", added=False)}
    | {epilogue: _linear(epilogue) for epilogue in ("gelu", "gelu_tanh", "silu")}
    | {
        "gelu alone": _linear("gelu", added=False),
        "of one row": _linear("silu", rows=(1, 1)),
        "of no row": _linear("gelu", rows=(2, 0)),
        "of pages": _linear("gelu_tanh", rows=(2, 3)),
        "of one dimension": _linear("gelu", rows=()),
        "of no depth": _linear("gelu", depth=0),
        "of no column": _linear("gelu", columns=0),
    },
    folding=("out",),
    schema=lambda a: {**a, "epilogue": ("none", "gelu", "gelu_tanh", "silu").index(a["epilogue"])},
)


def _linears(
    *columns: int, epilogue: str = "none", biased: bool = True, rows: tuple[int, ...] = (5,), one: bool = False
) -> Make:
    """`one`: the weights and the biases are slices of one matrix and one vector."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        weights = randn(2, sum(columns), 24, dtype=dtype, scale=0.2).split(columns)
        biases = list(randn(3, sum(columns), dtype=dtype).split(columns))
        if not one:
            weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
            biases[1:2] = [None] * len(biases[1:2])
        return {
            "x": randn(1, *rows, 24, dtype=dtype),
            "weights": list(weights),
            "biases": biases if biased else None,
            "residual": randn(4, *rows, sum(columns), dtype=dtype) if epilogue != "none" else None,
            "epilogue": epilogue,
        }

    return make


LINEARS = cases_of(
    "linears",
    {
        "": _linears(37, 8, 16, epilogue="silu"),
        "alone": _linears(37, 8, 16, biased=False),
        "of one matrix": _linears(48, 8, 16, one=True),
        "of one weight": _linears(37, epilogue="gelu"),
        "of four": _linears(1, 33, 0, 7, epilogue="gelu_tanh", rows=(2, 3)),
        "of one row": _linears(40, 8, 8, rows=(1, 1)),
        "of no row": _linears(40, 8, rows=(2, 0)),
    },
    folding=("out",),
    schema=lambda a: {
        **a,
        "biases": a["biases"] or [],
        "epilogue": ("none", "gelu", "gelu_tanh", "silu").index(a["epilogue"]),
    },
)


# ---- attention


def _attention(
    n: int = 5,
    tokens: int = 150,
    rows: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    d: int = 20,
    lengths: tuple[int, ...] | None = None,
    mask: tuple[int, int] | None = None,
) -> Make:
    """mask: how many rows and queries it has. The last key that every query sees is not the last key."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        added = None
        if mask is not None:
            added = randn(5, mask[0], 1, mask[1], tokens, dtype=dtype)
            hidden = randn(6, *added.shape) > 0.5
            hidden[..., tokens - tokens // 4 :] = True
            hidden[:, :, :1] = True  # the average of all
            added = added.masked_fill(hidden, torch.finfo(dtype).min)
        return {
            "query": randn(1, rows, heads, n, d, dtype=dtype),
            "key": randn(2, rows, kv_heads, tokens, d, dtype=dtype),
            "value": randn(3, rows, kv_heads, tokens, d, dtype=dtype),
            "lengths": None if lengths is None else torch.tensor(lengths),
            "mask": added,
        }

    return make


ATTENTION = cases_of(
    "attention",
    {
        "": _attention(lengths=(131, 40), mask=(2, 5)),
        "plain": _attention(),
        "with lengths": _attention(lengths=(0, 150)),
        "with a mask": _attention(mask=(2, 5)),
        "with one mask": _attention(mask=(1, 1)),
        "with a mask for a row": _attention(mask=(2, 1)),
        "of one query": _attention(n=1, lengths=(17, 129)),
        "of many queries": _attention(n=70, tokens=300, mask=(1, 70)),
        "of as many heads": _attention(kv_heads=6, d=72),
        "of one head": _attention(heads=1, kv_heads=1, rows=1, d=1),
        "of no row": _attention(rows=0),
        "of no query": _attention(n=0),
        "of no key": _attention(tokens=0),
        "of no column": _attention(d=0),
    },
    fixed=("lengths",),
    strided=("lengths",),
)


# ---- routing


def _cosine(reduce: str, shape: tuple[int, ...]) -> Make:
    return lambda dtype: {
        "x_in": randn(1, *shape, dtype=dtype),
        "x_out": randn(2, *shape, dtype=dtype),
        "reduce": reduce,
    }


def _moves(moved: bool) -> dict[str, Make]:
    def make(index: list[Any], batch: tuple[int, ...], width: int, of: torch.dtype) -> Make:
        def arguments(dtype: torch.dtype) -> dict[str, Any]:
            at = torch.tensor(index, dtype=of)
            given = {"rows": randn(1, *batch, 9, width, dtype=dtype), "index": at}
            return {**given, "moved": randn(2, *at.shape, width, dtype=dtype)} if moved else given

        return arguments

    table = [[3, -1, 8, 0], [1, 1, -1, 7]]
    return {
        "": make(table, (2,), 11, torch.int64),
        "int32": make(table, (2,), 11, torch.int32),
        "of one sequence": make(table[0], (), 11, torch.int64),
        "of a batch of one": make(table[:1], (1,), 11, torch.int32),
        "of one row": make([[5], [-1]], (2,), 11, torch.int64),
        "of one column": make(table, (2,), 1, torch.int64),
        "of no row": make([[], []], (2,), 11, torch.int64),
    }


ROUTING = [
    *cases_of(
        "cosine_importance",
        {
            "": _cosine("none", (2, 5, 37)),
            "mean": _cosine("mean", (2, 5, 37)),
            "last": _cosine("last", (2, 5, 37)),
            "of one sequence": _cosine("none", (5, 37)),
            "mean of one token": _cosine("mean", (1, 1, 37)),
            "last of one token": _cosine("last", (3, 1, 37)),
            "last of one sequence": _cosine("last", (5, 37)),
            "of many": _cosine("last", (2, 3, 4, 8)),
        },
        contiguous=("out",),
        schema=lambda a: {**a, "reduce": ("none", "mean", "last").index(a["reduce"])},
    ),
    *cases_of(
        "value_norms",
        {
            option: lambda dtype, shape=shape: {"v": randn(1, *shape, dtype=dtype)}
            for option, shape in (
                ("", (2, 3, 5, 8)),
                ("of one head", (2, 1, 5, 8)),
                ("of one token", (2, 3, 1, 8)),
                ("of a batch of one", (1, 3, 5, 1)),
                ("of no token", (2, 3, 0, 8)),
            )
        },
        contiguous=("out",),
    ),
    *cases_of(
        "select_topk",
        {
            option: lambda dtype, shape=shape, k=k: {"scores": randn(1, *shape, dtype=dtype), "k": k}
            for option, shape, k in (
                ("", (3, 17), 5),
                ("none", (3, 17), 0),
                ("one", (2, 2, 17), 1),
                ("all", (3, 17), 17),
                ("of one row", (17,), 5),
                ("of one token", (3, 1), 1),
            )
        },
    ),
    *cases_of(
        "select_threshold",
        {
            option: lambda dtype, shape=shape, t=threshold, c=capacity: {
                "scores": randn(1, *shape, dtype=dtype),
                "threshold": t,
                "capacity": c,
            }
            for option, shape, threshold, capacity in (
                ("", (3, 17), 0.2, 6),
                ("with no room", (3, 17), 0.2, 0),
                ("with room", (2, 2, 17), 0.2, 30),
                ("of one row", (17,), -9.0, 17),
                ("of one token", (3, 1), 0.0, 1),
                ("that none passes", (3, 17), float("inf"), 4),
            )
        },
    ),
    *cases_of("gather_rows", _moves(False), fixed=("index",), strided=("index",)),
    *cases_of("scatter_rows_", _moves(True), inplace=("rows",), fixed=("index",), strided=("index",)),
    *cases_of("scatter_add_rows_", _moves(True), inplace=("rows",), fixed=("index",), strided=("index",)),
]


# ---- norm


def _modulated(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": randn(1, 2, 7, 19, dtype=dtype),
        "weight": randn(2, 19, dtype=dtype),
        "eps": 1e-6,
        "shift": randn(3, 2, 19, dtype=dtype),
        "scale": randn(4, 2, 19, dtype=dtype),
    }


def _gate(dtype: torch.dtype, gated: bool) -> dict[str, Any]:
    arguments = {"residual": randn(1, 2, 7, 19, dtype=dtype), "y": randn(2, 2, 7, 19, dtype=dtype)}
    return {**arguments, "gate": randn(3, 2, 19, dtype=dtype)} if gated else arguments


def _rms(shape: tuple[int, ...], eps: float = 1e-6) -> Make:
    return lambda dtype: {
        "x": randn(1, *shape, dtype=dtype),
        "weight": randn(2, shape[-1], dtype=dtype),
        "eps": eps,
    }


def _add_rms(shape: tuple[int, ...]) -> Make:
    return lambda dtype: {
        "x": randn(1, *shape, dtype=dtype),
        "residual": randn(2, *shape, dtype=dtype),
        "weight": randn(3, shape[-1], dtype=dtype),
        "eps": 1e-6,
    }


NORM_SHAPES = {
    "": (5, 33),
    "of one row": (1, 33),
    "of pages": (2, 1, 3, 33),
    "of one column": (4, 1),
    "of no row": (0, 33),
    "of one dimension": (33,),
}


def _rotary(start: list[int] | int | None, norms: bool, tables: int = 2, kv_heads: int = 2) -> Make:
    """With starts of -1 and 3 one row begins before the cache and the other ends after it."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        angle = randn(4, tables, 3, 8, scale=2.0)  # the halves have different angles: the op must not assume equal ones
        return {
            "query": randn(1, 2, 3, 6, 8, dtype=dtype),
            "key": randn(2, 2, 3, kv_heads, 8, dtype=dtype),
            "value": randn(3, 2, 3, kv_heads, 8, dtype=dtype),
            "cos": angle.cos().to(dtype),
            "sin": angle.sin().to(dtype),
            "keys": randn(5, 2, 5, kv_heads, 8, dtype=dtype),
            "values": randn(6, 2, 5, kv_heads, 8, dtype=dtype),
            "start": None if start is None else torch.tensor(start),
            "query_norm": randn(7, 8, dtype=dtype) if norms else None,
            "key_norm": randn(8, 8, dtype=dtype) if norms else None,
            "eps": 1e-6,
        }

    return make


NORM = [
    *cases_of("rms_norm", {option: _rms(shape) for option, shape in NORM_SHAPES.items()}, folding=("out",)),
    *cases_of("rms_norm", {"with another eps": _rms((5, 33), 0.5)}, folding=("out",)),
    *cases_of("rms_norm", {"modulated": _modulated}),
    *cases_of(
        "add_rms_norm_",
        {option: _add_rms(shape) for option, shape in NORM_SHAPES.items()},
        inplace=("x", "residual"),
        folding=("x", "residual"),
    ),
    OpCase("gate_add_", lambda dtype: _gate(dtype, True), inplace=("residual",)),
    OpCase("gate_add_", lambda dtype: _gate(dtype, False), inplace=("residual",), option="no gate"),
    *cases_of(
        "rotary_cache_",
        {
            "": _rotary([-1, 3], True),
            "without norms": _rotary([-1, 3], False),
            "without start": _rotary(None, True),
            "with one start": _rotary([1], False),
            "with a plain start": _rotary(2, False),
            "with one table": _rotary([-1, 3], True, tables=1),
            "of one head": _rotary(None, False, kv_heads=1),
        },
        inplace=("keys", "values"),
        fixed=("start",),
        strided=("start",),
    ),
]


# ---- step


def _euler(guided: bool, velocity: bool, of: torch.dtype | None = None, images: int = 2, channels: int = 3) -> Make:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        latents = randn(1, images, channels, 4, 6, dtype=dtype)
        return {
            "latents": latents,
            "v": randn(2, images * (2 if guided else 1), 6, 4 * channels, dtype=of or dtype),
            "s": torch.tensor([5.0, 3.0, 1.0]),
            "dt": torch.tensor([0.1, 0.2, 0.3]),
            "step": torch.tensor(1),
            "velocity": torch.zeros_like(latents) if velocity else None,
        }

    return make


def _taylor(order: int, count: int, shape: tuple[int, ...] = (5, 7)) -> tuple[Make, Make]:
    return (
        lambda dtype: {
            "state": randn(1, order + 1, *shape, dtype=dtype),
            "feature": randn(2, *shape, dtype=dtype),
            "interval": 3.0,
            "count": count,
        },
        lambda dtype: {"state": randn(1, order + 1, *shape, dtype=dtype), "ahead": 2.0, "count": count + 1},
    )


TAYLOR = {
    "": _taylor(2, 2),
    "of order 0": _taylor(0, 3),
    "of order 1": _taylor(1, 1),
    "of the first update": _taylor(2, 0),
    "of the second update": _taylor(2, 1),
    "of one element": _taylor(2, 5, (1, 1)),
    "of nothing": _taylor(1, 2, (0, 7)),
}
EULER: dict[str, Any] = {"fixed": ("s", "dt", "step", "velocity"), "contiguous": ("latents", "v", "velocity")}

STEP = [
    *cases_of(
        "guided_euler_step_",
        {
            "": _euler(True, False),
            "without guidance": _euler(False, False),
            "of one image": _euler(True, False, images=1, channels=1),
            "of fp32 velocities": _euler(True, False, torch.float32),
            "of bf16 velocities": _euler(False, False, torch.bfloat16),
        },
        inplace=("latents",),
        **EULER,
    ),
    *cases_of(
        "guided_euler_step_",
        {"with velocity": _euler(True, True), "with velocity, without guidance": _euler(False, True)},
        inplace=("latents", "velocity"),
        **EULER,
    ),
    *cases_of(
        "feature_delta",
        {
            option: lambda dtype, shape=shape: {"a": randn(1, *shape, dtype=dtype), "b": randn(2, *shape, dtype=dtype)}
            for option, shape in (
                ("", (3, 41)),
                ("of one row", (1, 41)),
                ("of pages", (2, 3, 5)),
                ("of nothing", (0, 4)),
                ("of one dimension", (9,)),
            )
        },
        contiguous=("out",),
    ),
    *cases_of(
        "taylor_update_", {o: m[0] for o, m in TAYLOR.items()}, inplace=("state",), contiguous=("state", "feature")
    ),
    *cases_of("taylor_predict", {o: m[1] for o, m in TAYLOR.items()}, contiguous=("state", "out")),
]

CASES = [*FFN, *INT8, *LINEAR, *LINEARS, *ATTENTION, *ROUTING, *NORM, *STEP]
FIRST = [case for case in CASES if not case.option]
"""One case of every op, for what does not depend on its options."""
