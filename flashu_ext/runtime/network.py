"""The model's layers as the runtime runs them: which modules are on kernels, which run as themselves, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    def build(
        cls, parts: Showo2Parts, kernels: KernelSet, layouts: Sequence[NeuronLayout | None] | None = None
    ) -> Network:
        """layouts: for each layer the tasks' neurons in the order in which its weights lie; None: all neurons."""
        like = parts.embed_tokens.weight

        def norm(module: Any) -> Norm:
            return Norm(module, kernels, why_not_norm(module, like))

        def layer(module: Any, layout: NeuronLayout | None) -> Layer:
            ffn = FFN(module.mlp, kernels, why_not_ffn(module.mlp, like), layout)
            return Layer(module.self_attn, norm(module.input_layernorm), norm(module.post_attention_layernorm), ffn)

        chosen = layouts or [None] * len(parts.layers)
        return cls(
            parts,
            kernels,
            tuple(layer(module, layout) for module, layout in zip(parts.layers, chosen, strict=True)),
            norm(parts.final_norm),
            tuple(layer(module, None) for module in parts.blocks),
            norm(parts.final_layer.norm_final),
        )

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
