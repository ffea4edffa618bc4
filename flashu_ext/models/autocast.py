"""Keeps torch.autocast away from what is computed in the weights' own dtype."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which `torch.autocast` changes nothing on this kind of device.

    The kernels take the dtype of the weights, and memory of fixed dtypes is written to; both would meet activations of
    another dtype otherwise.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
