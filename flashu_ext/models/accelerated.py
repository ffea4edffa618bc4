"""How an accelerated model is told from a dense one."""

from __future__ import annotations

from typing import Any

__all__ = ["HANDLE", "handle_of"]

HANDLE = "_flashu_handle"
"""The one attribute that acceleration adds to a model, for as long as it lasts."""


def handle_of(model: Any) -> Any:
    """The `Handle` of an accelerated model, or None where it is dense."""
    return vars(model).get(HANDLE)
