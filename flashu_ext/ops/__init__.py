"""The library's operators as typed functions; `reference` has the same functions in plain torch, `layers` modules of them.

Each function has an attribute `is_supported(device, dtype, shape=None)`. First use loads the compiled library; if that fails,
ImportError lists every cause.

The ops are for inference and have no gradient (see `autograd`). Functional ops raise NotImplementedError in their backward;
ops that write in place or into an output raise it at the call if an argument requires grad, before they write.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import attention
    from .ffn import gathered_down, gathered_ffn, gathered_swiglu, neuron_norms_
    from .int8 import int8_ffn, int8_linear
    from .linear import linear, linears
    from .norm import add_rms_norm_, gate_add_, rms_norm, rotary_cache_
    from .routing import (
        cosine_importance,
        gather_rows,
        scatter_add_rows_,
        scatter_rows_,
        select_threshold,
        select_topk,
        value_norms,
    )
    from .selection import Selection
    from .step import feature_delta, guided_euler_step_, taylor_predict, taylor_update_

__all__ = [
    "Selection",
    "add_rms_norm_",
    "attention",
    "cosine_importance",
    "feature_delta",
    "gate_add_",
    "gather_rows",
    "gathered_down",
    "gathered_ffn",
    "gathered_swiglu",
    "guided_euler_step_",
    "int8_ffn",
    "int8_linear",
    "linear",
    "linears",
    "neuron_norms_",
    "rms_norm",
    "rotary_cache_",
    "scatter_add_rows_",
    "scatter_rows_",
    "select_threshold",
    "select_topk",
    "taylor_predict",
    "taylor_update_",
    "value_norms",
]

OPS = tuple(name for name in __all__ if name != "Selection")
"""The operators; each has `is_supported`."""


def __getattr__(name: str) -> Any:
    if name == "layers":  # of a Hugging Face kernel
        return import_module(".layers", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for family in ("attention", "ffn", "int8", "linear", "norm", "routing", "selection", "step"):
        globals().update(
            {op: value for op, value in vars(import_module(f".{family}", __name__)).items() if op in __all__}
        )
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
