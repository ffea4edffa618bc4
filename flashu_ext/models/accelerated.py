"""Tells an accelerated model from a dense one."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["HANDLE", "handle_of", "unwrapped"]

HANDLE = "_flashu_handle"
"""The one attribute that acceleration adds to a model; `Handle.remove` deletes it."""


_WRAPPERS = {
    **{"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"},
    "InterleaveInferencer": "model",
}
"""Class name -> attribute with the model inside: torch's wrappers, and what BAGEL's scripts have around a model. By name:
importing them would start torch's compiler."""


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and the data-parallel wrappers, inside peft's of LoRA, or inside upstream's inferencer."""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None and hasattr(model, attribute):
        model = getattr(model, attribute)
    tuner = getattr(model, "base_model", None)
    if (
        type(model).__module__.startswith("peft.") and type(tuner).__name__ == "LoraModel"
    ):  # adds nothing to the call itself
        return unwrapped(getattr(tuner, "model", model))
    return model


def handle_of(model: Any) -> Any:
    """The `Handle` of an accelerated model, or of a pipeline's; None for a dense one. Wrappers are looked through.

    Raises:
        TypeError: not a model.
    """
    inside = unwrapped(model)
    if HANDLE not in getattr(inside, "__dict__", ()) and not isinstance(inside, nn.Module):
        inside = unwrapped(getattr(inside, "model", inside))  # of a pipeline
    try:
        return vars(inside).get(HANDLE)
    except TypeError as error:
        raise TypeError(f"model: expected a model or a pipeline, got {type(model).__name__}") from error
