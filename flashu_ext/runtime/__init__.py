"""Runs an accelerated model: one engine per task, found through the model's own instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["find_runner"]


def find_runner(model: nn.Module) -> Runner | None:
    """The runner of an accelerated model, or None where the model is as it was built.

    It is found through the instance's own `t2i_generate`, so there is no registry to go stale.
    """
    method = model.__dict__.get("t2i_generate")
    owner = getattr(method, "__self__", None)
    if owner is None:
        return None
    from .runner import Runner

    return owner if isinstance(owner, Runner) else None
