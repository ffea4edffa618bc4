"""The model's layers as the runtime runs them: which modules are on kernels, which run as themselves, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..models.known import why_not_ffn, why_not_norm
from ..models.parts import Showo2Parts
from ..ops.kernel_sets import KernelSet
from ..planning.neurons import NeuronLayout
from .modules.ffn import FFN
from .modules.layer import Layer
from .modules.norm import Norm

__all__ = ["Network"]


@dataclass(frozen=True)
class Network:
    """A model's layers on one set of kernels."""

    parts: Showo2Parts
    kernels: KernelSet
    layers: tuple[Layer, ...]
    final_norm: Norm
    blocks: tuple[Layer, ...]
    head_norm: Norm

    @classmethod
    def build(cls, parts: Showo2Parts, kernels: KernelSet) -> Network:
        """The model's layers; every task uses all neurons."""
        like = parts.embed_tokens.weight

        def norm(module: Any) -> Norm:
            return Norm(module, kernels, why_not_norm(module, like))

        def layer(module: Any) -> Layer:
            ffn = FFN(module.mlp, kernels, why_not_ffn(module.mlp, like))
            return Layer(module.self_attn, norm(module.input_layernorm), norm(module.post_attention_layernorm), ffn)

        return cls(
            parts,
            kernels,
            tuple(map(layer, parts.layers)),
            norm(parts.final_norm),
            tuple(map(layer, parts.blocks)),
            norm(parts.final_layer.norm_final),
        )

    def over(self, layouts: Sequence[NeuronLayout | None]) -> Network:
        """The same network over the tasks' neurons.

        Args:
            layouts: for each layer, in the order in which its weights lie; None: all neurons.
        """
        layers = [replace(layer, ffn=layer.ffn.over(own)) for layer, own in zip(self.layers, layouts, strict=True)]
        return replace(self, layers=tuple(layers))

    def run_as_themselves(self) -> dict[str, str]:
        """Path in the model -> why the module is not on a kernel."""
        return {name: each.why_itself for name, each in self._named() if each.why_itself is not None}

    def _named(self) -> Iterator[tuple[str, Norm | FFN]]:
        for stack, layers in (("showo.model.layers", self.layers), ("diffusion_head_a", self.blocks)):
            for index, layer in enumerate(layers):
                yield f"{stack}.{index}.input_layernorm", layer.before_attention
                yield f"{stack}.{index}.post_attention_layernorm", layer.before_ffn
                yield f"{stack}.{index}.mlp", layer.ffn
        yield "showo.model.norm", self.final_norm
        yield "diffusion_head_b.norm_final", self.head_norm
