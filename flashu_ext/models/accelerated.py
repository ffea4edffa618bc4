"""Tells an accelerated model from a dense one."""

from __future__ import annotations

from typing import Any

__all__ = ["HANDLE", "handle_of"]

HANDLE = "_flashu_handle"
"""The one attribute that acceleration adds to a model; `Handle.remove` deletes it."""


def handle_of(model: Any) -> Any:
    """The `Handle` of an accelerated model; None for a dense one."""
    return vars(model).get(HANDLE)
