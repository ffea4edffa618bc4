"""Tells an accelerated model from a dense one."""

from __future__ import annotations

from typing import Any

__all__ = ["HANDLE", "handle_of", "unwrapped"]

HANDLE = "_flashu_handle"
"""The one attribute that acceleration adds to a model; `Handle.remove` deletes it."""


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Class name -> attribute with the model inside. By name: importing them would start torch's compiler."""


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and the data-parallel wrappers."""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None and hasattr(model, attribute):
        model = getattr(model, attribute)
    return model


def handle_of(model: Any) -> Any:
    """The `Handle` of an accelerated model; None for a dense one. Wrappers are looked through."""
    return vars(unwrapped(model)).get(HANDLE)
