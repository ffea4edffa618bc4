"""A transformer layer of the model as the runtime runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .ffn import FFN
from .norm import Norm

__all__ = ["Layer"]


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the language model, or a block of the diffusion head."""

    attention: Any
    """The model's module; the runtime calls its projections."""
    before_attention: Norm
    before_ffn: Norm
    ffn: FFN
