"""The image encoder as the runtime runs it: SigLIP's layers on the kernels, or the module itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...models.known import epilogue_of, why_not_vision
from ...ops.kernel_sets import KernelSet
from .adapters import RowAdapters
from .layer import Projections
from .linear import Linear

__all__ = ["VisionEncoder"]


@dataclass(frozen=True)
class VisionLayer:
    """A layer of the encoder; `activation` is the epilogue of its FFN's first half."""

    module: Any
    attention: Projections
    up: Linear
    activation: str
    down: Linear


class VisionEncoder:
    """Attributes:
    module: the model's own.
    why_itself: why it is called as it is, or None; its linear layers may have reasons of their own.
    """

    def __init__(self, module: Any, kernels: KernelSet, like: Tensor, rows: RowAdapters):
        self.module = module
        self.why_itself = why_not_vision(module)
        self._kernels = kernels
        layers = [] if self.why_itself is not None else module.layers
        self.layers = [_layer(each, kernels, like, rows) for each in layers]

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """x [images, patches, width] -> {"last_hidden_state": [images, patches, width]}, as the module itself."""
        if self.why_itself is not None:
            return {"last_hidden_state": self.module(x)["last_hidden_state"]}
        for layer in self.layers:
            head_dim = layer.module.self_attn.head_dim
            projected = layer.attention.query_key_value(layer.module.layer_norm1(x))
            query, key, value = (each.unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in projected)
            attended = self._kernels.attention(query, key, value).flatten(2)
            x = layer.attention.out(attended, residual=x)
            raised = layer.up(layer.module.layer_norm2(x), layer.activation)
            x = layer.down(raised, residual=x)
        return {"last_hidden_state": x}


def _layer(module: Any, kernels: KernelSet, like: Tensor, rows: RowAdapters) -> VisionLayer:
    own = kernels, like, rows
    projections = Projections.build(module.self_attn, module.self_attn.out_proj, *own)
    up, down = (Linear(each, *own) for each in (module.mlp.fc1, module.mlp.fc2))
    activation = epilogue_of(module.mlp.activation_fn)
    assert activation is not None, "why_not_vision has looked"
    return VisionLayer(module, projections, up, activation, down)
