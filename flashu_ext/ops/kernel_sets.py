"""Chooses the implementation of every op of the runtime by device and dtype.

There are two: this library's kernels, and plain torch (the reference functions). Families that are switched off or have no
kernel run plain torch; `handle.summary()` shows the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops
from ..planning.config import FlashUConfig
from . import reference

__all__ = ["FAMILIES", "KernelSet", "resolve"]

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "ffn": ("gathered_ffn",),
    "linear": ("linear", "linears"),
    "attention": ("attention",),
    "routing": ("cosine_importance", "value_norms", "select_topk", "gather_rows", "scatter_rows_"),
    "norm": ("rms_norm", "add_rms_norm_", "gate_add_", "rotary_cache_"),
    "step": ("guided_euler_step_", "feature_delta", "taylor_update_", "taylor_predict"),
}
"""Op names by family; FlashUConfig has one switch per family."""


@dataclass(frozen=True)
class KernelSet:
    """The functions that a runtime calls, with a reason for each that is not this library's kernel.

    Attributes:
        chosen: op -> 'flashu' or 'torch'.
        fallbacks: op -> reason for plain torch.
    """

    gathered_ffn: Callable[..., Any]
    linear: Callable[..., Any]
    linears: Callable[..., Any]
    attention: Callable[..., Any]
    cosine_importance: Callable[..., Any]
    value_norms: Callable[..., Any]
    select_topk: Callable[..., Any]
    gather_rows: Callable[..., Any]
    scatter_rows_: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_rms_norm_: Callable[..., Any]
    gate_add_: Callable[..., Any]
    rotary_cache_: Callable[..., Any]
    guided_euler_step_: Callable[..., Any]
    feature_delta: Callable[..., Any]
    taylor_update_: Callable[..., Any]
    taylor_predict: Callable[..., Any]
    chosen: Mapping[str, str] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)


def resolve(
    config: FlashUConfig, device: torch.device, dtype: torch.dtype, why_not_attention: str | None = None
) -> KernelSet:
    """Choose an implementation for every op.

    Args:
        config: its `*_kernels` switches turn whole families off.
        device, dtype: of the model's weights.
        why_not_attention: why attention must run torch's function, or None.
    """
    functions: dict[str, Callable[..., Any]] = {}
    chosen: dict[str, str] = {}
    fallbacks: dict[str, str] = {}
    for family, names in FAMILIES.items():
        for name in names:
            reason = why_not_attention if name == "attention" else None
            reason = reason or _why_not(config, family, name, device, dtype)
            functions[name] = getattr(ops if reason is None else reference, name)
            chosen[name] = "flashu" if reason is None else "torch"
            if reason is not None and reason != "not yet":
                fallbacks[name] = reason
    return KernelSet(**functions, chosen=chosen, fallbacks=fallbacks)


def _why_not(config: FlashUConfig, family: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not getattr(config.execution, f"{family}_kernels"):
        return f"FlashUConfig.{family}_kernels is False"
    if name not in ops.OPS:
        return "not yet"
    if family == "linear" and device.type == "cuda" and not config.execution.batch_invariant:
        return "cuBLAS runs; FlashUConfig.batch_invariant takes the kernel"
    if not getattr(ops, name).is_supported(device, dtype):
        return f"no {name} kernel for {dtype} on {device.type} in this build (see flashu-ext info)"
    return None
