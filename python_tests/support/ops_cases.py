"""One valid call of every op, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpCase:
    """An op with arguments that it accepts.

    Attributes:
        make: dtype -> arguments by name, in the order of the signature; fresh tensors at each call, same numbers.
        option: tells an op's cases apart.
        inplace: tensors that it writes. fixed: tensors that have a dtype of their own. contiguous: tensors that must be.
        schema: arguments by name -> what the torch.ops overload takes, where that is not the same.
    """

    name: str
    make: Callable[[torch.dtype], dict[str, Any]]
    option: str = ""
    inplace: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    contiguous: tuple[str, ...] = ()
    schema: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def oracle(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.flashu, self.name).default

    def __repr__(self) -> str:
        return f"{self.name} {self.option}".rstrip()


def _randn(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _ffn_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "w_gate": _randn(2, 40, 24, dtype=dtype, scale=0.2),
        "w_up": _randn(3, 40, 24, dtype=dtype, scale=0.2),
        "w_down": _randn(4, 20, 40, dtype=dtype, scale=0.2),
    }


def _swiglu(dtype: torch.dtype) -> dict[str, Any]:
    weights = _ffn_weights(dtype)
    return {
        "x": _randn(1, 5, 24, dtype=dtype),
        "w_gate": weights["w_gate"],
        "w_up": weights["w_up"],
        "runs": [2, 7, 20, 5],
    }


def _down(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "h": _randn(1, 5, 12, dtype=dtype),
        "w_down": _ffn_weights(dtype)["w_down"],
        "runs": [2, 7, 20, 5],
        "index": None,
        "residual": _randn(6, 5, 20, dtype=dtype),
    }


def _ffn(dtype: torch.dtype) -> dict[str, Any]:
    index = torch.tensor([7, 3, 39, 0, 12, 25])
    return {"x": _randn(1, 5, 24, dtype=dtype), **_ffn_weights(dtype), "runs": None, "index": index}


def _modulated(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": _randn(1, 2, 7, 19, dtype=dtype),
        "weight": _randn(2, 19, dtype=dtype),
        "eps": 1e-6,
        "shift": _randn(3, 2, 19, dtype=dtype),
        "scale": _randn(4, 2, 19, dtype=dtype),
    }


def _gate(dtype: torch.dtype, gated: bool) -> dict[str, Any]:
    arguments = {"residual": _randn(1, 2, 7, 19, dtype=dtype), "y": _randn(2, 2, 7, 19, dtype=dtype)}
    return {**arguments, "gate": _randn(3, 2, 19, dtype=dtype)} if gated else arguments


def _rotary(dtype: torch.dtype) -> dict[str, Any]:
    """One row begins in front of the cache, the other one ends behind it."""
    angle = _randn(4, 2, 3, 4, dtype=torch.float32, scale=2.0).repeat(1, 1, 2)
    return {
        "query": _randn(1, 2, 3, 6, 8, dtype=dtype),
        "key": _randn(2, 2, 3, 2, 8, dtype=dtype),
        "value": _randn(3, 2, 3, 2, 8, dtype=dtype),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "keys": _randn(5, 2, 5, 2, 8, dtype=dtype),
        "values": _randn(6, 2, 5, 2, 8, dtype=dtype),
        "start": torch.tensor([-1, 3]),
        "query_norm": _randn(7, 8, dtype=dtype),
        "key_norm": _randn(8, 8, dtype=dtype),
        "eps": 1e-6,
    }


def _move(dtype: torch.dtype, moved: bool) -> dict[str, Any]:
    arguments = {"rows": _randn(1, 2, 9, 11, dtype=dtype), "index": torch.tensor([[3, -1, 8, 0], [1, 1, -1, 7]])}
    return {**arguments, "moved": _randn(2, 2, 4, 11, dtype=dtype)} if moved else arguments


def _euler(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latents": _randn(1, 2, 3, 4, 6, dtype=dtype),
        "v": _randn(2, 4, 6, 12, dtype=dtype),
        "s": torch.tensor([5.0, 3.0, 1.0]),
        "dt": torch.tensor([0.1, 0.2, 0.3]),
        "step": torch.tensor(1),
    }


CASES = [
    OpCase("gathered_swiglu", _swiglu),
    OpCase("gathered_down", _down),
    OpCase("gathered_ffn", _ffn, fixed=("index",)),
    OpCase(
        "neuron_norms_",
        lambda dtype: {"acc": _randn(1, 13, dtype=torch.float64).abs(), "h": _randn(2, 6, 13, dtype=dtype)},
        inplace=("acc",),
        fixed=("acc",),
    ),
    OpCase(
        "cosine_importance",
        lambda dtype: {
            "x_in": _randn(1, 2, 5, 37, dtype=dtype),
            "x_out": _randn(2, 2, 5, 37, dtype=dtype),
            "reduce": "none",
        },
        schema=lambda a: {**a, "reduce": ("none", "mean", "last").index(a["reduce"])},
    ),
    OpCase("value_norms", lambda dtype: {"v": _randn(1, 2, 3, 5, 8, dtype=dtype)}),
    OpCase("select_topk", lambda dtype: {"scores": _randn(1, 3, 17, dtype=dtype), "k": 5}),
    OpCase(
        "select_threshold", lambda dtype: {"scores": _randn(1, 3, 17, dtype=dtype), "threshold": 0.2, "capacity": 6}
    ),
    OpCase("gather_rows", lambda dtype: _move(dtype, False), fixed=("index",)),
    OpCase("scatter_rows_", lambda dtype: _move(dtype, True), inplace=("rows",), fixed=("index",)),
    OpCase("scatter_add_rows_", lambda dtype: _move(dtype, True), inplace=("rows",), fixed=("index",)),
    OpCase(
        "rms_norm",
        lambda dtype: {"x": _randn(1, 5, 33, dtype=dtype), "weight": _randn(2, 33, dtype=dtype), "eps": 1e-6},
    ),
    OpCase(
        "add_rms_norm_",
        lambda dtype: {
            "x": _randn(1, 5, 33, dtype=dtype),
            "residual": _randn(2, 5, 33, dtype=dtype),
            "weight": _randn(3, 33, dtype=dtype),
            "eps": 1e-6,
        },
        inplace=("x", "residual"),
    ),
    OpCase("rms_norm", _modulated, option="modulated"),
    OpCase("gate_add_", lambda dtype: _gate(dtype, True), inplace=("residual",)),
    OpCase("gate_add_", lambda dtype: _gate(dtype, False), inplace=("residual",), option="no gate"),
    OpCase("rotary_cache_", _rotary, inplace=("keys", "values"), fixed=("start",)),
    OpCase(
        "guided_euler_step_",
        _euler,
        inplace=("latents",),
        fixed=("s", "dt", "step"),
        contiguous=("latents", "v"),
    ),
    OpCase("feature_delta", lambda dtype: {"a": _randn(1, 3, 41, dtype=dtype), "b": _randn(2, 3, 41, dtype=dtype)}),
    OpCase(
        "taylor_update_",
        lambda dtype: {
            "state": _randn(1, 3, 5, 7, dtype=dtype),
            "feature": _randn(2, 5, 7, dtype=dtype),
            "interval": 3.0,
            "count": 2,
        },
        inplace=("state",),
        contiguous=("state", "feature"),
    ),
    OpCase(
        "taylor_predict",
        lambda dtype: {"state": _randn(1, 3, 5, 7, dtype=dtype), "ahead": 2.0, "count": 3},
        contiguous=("state",),
    ),
]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    return [result] if isinstance(result, Tensor) else list(result)
