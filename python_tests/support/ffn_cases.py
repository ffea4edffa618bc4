"""Valid calls of the FFN ops, one per value of every option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashu_ext import ops
from support.inputs import randn
from support.op_case import Make, cases_of

# ---- ffn

SELECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "runs": lambda: {"runs": [2, 7, 20, 5], "index": None},
    "tuples": lambda: {"runs": [(2, 7), (20, 5)], "index": None},
    "one run": lambda: {"runs": [7, 12], "index": None},
    "none": lambda: {"runs": [], "index": None},
    "index": lambda: {"runs": None, "index": torch.tensor([7, 3, 39, 0, 12, 25, 8, 9, 10, 11, 30, 1])},
    "int32 index": lambda: {"runs": None, "index": torch.arange(27, 15, -1, dtype=torch.int32)},
    "all": lambda: {"runs": None, "index": None},
    "selection": lambda: {"selection": ops.Selection.from_runs([2, 7, 20, 5], 40)},
    "selection of eights": lambda: {"selection": ops.Selection.from_index([*range(16, 24), *range(3, 11)], 40)},
    "selection of one run": lambda: {"selection": ops.Selection.from_index(torch.arange(7, 19), 40)},
    "selection of none": lambda: {"selection": ops.Selection.from_runs([], 40)},
}
COUNTS = {"none": 0, "selection of none": 0, "selection of eights": 16, "all": 40}  # neurons, 12 in the others


def _weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "w_gate": randn(2, 40, 24, dtype=dtype, scale=0.2),
        "w_up": randn(3, 40, 24, dtype=dtype, scale=0.2),
        "w_down": randn(4, 20, 40, dtype=dtype, scale=0.2),
    }


def _swiglu(selection: str, rows: tuple[int, ...] = (5,), added: tuple[str, ...] = ()) -> Make:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        weights = _weights(dtype)
        del weights["w_down"]
        addends = {name: randn(7 + len(name), *rows, COUNTS.get(selection, 12), dtype=dtype) for name in added}
        return {"x": randn(1, *rows, 24, dtype=dtype), **weights, **SELECTIONS[selection](), **addends}

    return make


def _down(selection: str, residual: bool, rows: tuple[int, ...] = (5,)) -> Make:
    return lambda dtype: {
        "h": randn(1, *rows, COUNTS.get(selection, 12), dtype=dtype),
        "w_down": _weights(dtype)["w_down"],
        **SELECTIONS[selection](),
        "residual": randn(6, *rows, 20, dtype=dtype) if residual else None,
    }


def _ffn(
    selection: str, residual: bool = False, norms: torch.dtype | None = None, rows: tuple[int, ...] = (5,)
) -> Make:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        arguments = {"x": randn(1, *rows, 24, dtype=dtype), **_weights(dtype), **SELECTIONS[selection]()}
        arguments["residual"] = randn(6, *rows, 20, dtype=dtype) if residual else None
        if norms is not None:
            arguments["norms"] = torch.full((COUNTS.get(selection, 12),), 2.0, dtype=norms)
        return arguments

    return make


def _neurons_schema(*order: str, last: tuple[str, ...] = ()) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Arguments as the operator takes them: flat runs, and a selection by its parts."""

    def schema(arguments: dict[str, Any]) -> dict[str, Any]:
        given = {"listed": False, "block": 1, **dict.fromkeys(last), **arguments}
        if (selection := given.pop("selection", None)) is not None:
            given |= {"runs": selection.runs, "index": selection.list}
            given |= {"listed": selection.list is not None, "block": selection.block}
        if given["runs"] is not None:
            given["runs"] = [n for run in given["runs"] for n in (run if isinstance(run, tuple) else (run,))]
        return {name: given[name] for name in (*order, "listed", "block", *last)}

    return schema


FFN = [
    *cases_of(
        "gathered_swiglu",
        {"": _swiglu("runs"), **{name: _swiglu(name) for name in SELECTIONS if name != "runs"}}
        | {
            "of one row": _swiglu("one run", (1, 1)),
            "of no row": _swiglu("runs", (2, 0)),
            "of pages": _swiglu("index", (2, 3)),
        },
        fixed=("index",),
        strided=("index",),
        folding=("out",),
        schema=_neurons_schema("x", "w_gate", "w_up", "runs", "index"),
    ),
    *cases_of(
        "gathered_swiglu",
        {
            "with addends": _swiglu("index", (2, 3), added=("gate_add", "up_add")),
            "with one for up": _swiglu("all", (1, 1), added=("up_add",)),
            "with one for gate": _swiglu("runs", added=("gate_add",)),
        },
        fixed=("index",),
        strided=("index",),
        folding=("out",),
        schema=_neurons_schema("x", "w_gate", "w_up", "runs", "index", last=("gate_add", "up_add")),
    ),
    *cases_of(
        "gathered_down",
        {"": _down("runs", True), "without residual": _down("runs", False)}
        | {name: _down(name, name != "all") for name in SELECTIONS if name != "runs"}
        | {"of one row": _down("all", True, (1, 1)), "of pages": _down("one run", True, (2, 3))},
        fixed=("index",),
        strided=("index",),
        folding=("out",),
        schema=_neurons_schema("h", "w_down", "runs", "index", "residual"),
    ),
    *cases_of(
        "gathered_ffn",
        {"": _ffn("index"), "with residual": _ffn("index", True)}
        | {name: _ffn(name, name != "none") for name in SELECTIONS if name != "index"}
        | {"of one row": _ffn("all", True, rows=(1, 1)), "of no row": _ffn("index", rows=(0,))}
        | {"of pages": _ffn("runs", True, rows=(2, 3))},
        fixed=("index",),
        strided=("index",),
        folding=("out",),
        schema=_neurons_schema("x", "w_gate", "w_up", "w_down", "runs", "index", "residual"),
    ),
    *cases_of(
        "gathered_ffn",
        {
            "with norms": _ffn("runs", True, torch.float64),
            "with fp32 norms": _ffn("index", False, torch.float32),
            "with norms of all": _ffn("all", True, torch.float32),
        },
        inplace=("norms",),
        fixed=("index", "norms"),
        strided=("index",),
        schema=_neurons_schema("x", "w_gate", "w_up", "w_down", "norms", "runs", "index", "residual"),
        packet="gathered_ffn_norms",
    ),
    *cases_of(
        "neuron_norms_",
        {
            option: lambda dtype, acc=acc, shape=shape: {
                "acc": randn(1, shape[-1]).abs().to(acc),
                "h": randn(2, *shape, dtype=dtype),
            }
            for option, acc, shape in (
                ("", torch.float64, (6, 13)),
                ("fp32", torch.float32, (6, 13)),
                ("of one row", torch.float64, (1, 13)),
                ("of no row", torch.float64, (0, 13)),
                ("of one neuron", torch.float32, (2, 3, 1)),
            )
        },
        inplace=("acc",),
        fixed=("acc",),
    ),
]


# ---- int8


def int8(seed: int, *shape: int) -> Tensor:
    """Every number of eight bits."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def scales(seed: int, count: int, width: int) -> Tensor:
    return (randn(seed, count).abs() + 0.5) * 0.01 * max(width, 1) ** -0.5


def _int8_ffn(selection: str, residual: bool = False, rows: tuple[int, ...] = (5,)) -> Make:
    return lambda dtype: {
        "x": randn(1, *rows, 24, dtype=dtype),
        **{"w_gate": int8(2, 40, 24), "gate_scale": scales(5, 40, 24)},
        **{"w_up": int8(3, 40, 24), "up_scale": scales(6, 40, 24)},
        **{"w_down": int8(4, 20, 40), "down_scale": scales(7, 20, 40)},
        **SELECTIONS[selection](),
        "residual": randn(8, *rows, 20, dtype=dtype) if residual else None,
    }


def _int8_linear(
    epilogue: str, added: bool = True, rows: tuple[int, ...] = (5,), depth: int = 24, columns: int = 37
) -> Make:
    return lambda dtype: {
        "x": randn(1, *rows, depth, dtype=dtype),
        "weight": int8(2, columns, depth),
        "scale": scales(5, columns, depth),
        "bias": randn(3, columns, dtype=dtype) if added else None,
        "residual": randn(4, *rows, columns, dtype=dtype) if added else None,
        "epilogue": epilogue,
    }


INT8 = [
    *cases_of(
        "int8_ffn",
        {"": _int8_ffn("index", True), "without residual": _int8_ffn("index")}
        | {name: _int8_ffn(name, name != "all") for name in SELECTIONS if name != "index"}
        | {"of one row": _int8_ffn("all", True, (1, 1)), "of no row": _int8_ffn("runs", rows=(2, 0))}
        | {"of pages": _int8_ffn("runs", True, (2, 3))},
        fixed=("index", "gate_scale", "up_scale", "down_scale", "w_gate", "w_up", "w_down"),
        strided=("index",),
        folding=("out",),
        schema=_neurons_schema(
            *("x", "w_gate", "gate_scale", "w_up", "up_scale", "w_down", "down_scale", "runs", "index", "residual")
        ),
    ),
    *cases_of(
        "int8_linear",
        {"": _int8_linear("none"), "alone": _int8_linear("none", added=False)}
        | {epilogue: _int8_linear(epilogue) for epilogue in ("gelu", "gelu_tanh", "silu")}
        | {
            "of one row": _int8_linear("silu", rows=(1, 1)),
            "of no row": _int8_linear("gelu", rows=(2, 0)),
            "of pages": _int8_linear("gelu_tanh", rows=(2, 3)),
            "of no depth": _int8_linear("gelu", depth=0),
            "of no column": _int8_linear("gelu", columns=0),
        },
        fixed=("scale", "weight"),
        folding=("out",),
        schema=lambda a: {**a, "epilogue": ("none", "gelu", "gelu_tanh", "silu").index(a["epilogue"])},
    ),
]
