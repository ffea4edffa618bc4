"""The decoder of a model of any kind: a stack of layers with SwiGLU FFNs, alone or inside a unified model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import FAMILIES, check_parts, find

__all__ = ["Decoder", "decoder_of"]

_STACKS = ("", "model", "model.language_model", "language_model", "language_model.model", "decoder", "model.decoder")
"""Where transformers' models keep the module with their layers, from the model on."""

_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Decoder:
    """A model's decoder. Modules are the model's own."""

    model: Any
    stack: Any
    """Computes hidden states from `input_ids` or `inputs_embeds`, with `layers` and a final `norm`."""

    @property
    def layers(self) -> Any:
        return self.stack.layers

    @property
    def norm(self) -> Any:
        return self.stack.norm

    @property
    def ffns(self) -> list[Any]:
        return [layer.mlp for layer in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.stack.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.stack.parameters()).device


def decoder_of(model: Any) -> Decoder:
    """The decoder of a unified model, or of a transformers model (Qwen2, Llama, Mistral, ...), found by its structure.

    Raises:
        TypeError: no model, or one without such layers; the message says what is missing.
    """
    if isinstance(model, nn.Module):
        for path in (*(family.stack for family in FAMILIES.values()), *_STACKS):
            stack: Any = find(model, path) if path else model
            if find(stack, "layers.0") is not None and find(stack, "norm") is not None:
                check_parts(stack, "decoder", (f"layers.{i}.{part}" for i in range(len(stack.layers)) for part in _FFN))
                return Decoder(model, stack)
    got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    names = ", ".join(family.name for family in FAMILIES.values())
    raise TypeError(
        f"model: expected a model of a known family ({names}), or one with decoder layers (`layers`, `norm`) as "
        f"transformers' Qwen2 or Llama, got {got}"
    )
