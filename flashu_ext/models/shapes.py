"""A model's sizes, for the cost model and the choice of kernels."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..planning.cost import LayerShape
from .adapter import Adapter, AttentionShape, out_features

__all__ = ["layer_shape", "layer_shapes", "linear_flops"]


def layer_shape(layer: Any, attention: AttentionShape, modulation: float = 0.0) -> LayerShape:
    """Of a decoder layer, or of a block of a head. modulation: operations per row."""
    own = layer.self_attn
    return LayerShape(
        key_value=linear_flops(own.k_proj) + linear_flops(own.v_proj),
        attention=linear_flops(own.q_proj) + linear_flops(own.o_proj),
        ffn=linear_flops(layer.mlp),
        heads=attention.heads,
        head_dim=attention.head_dim,
        width=out_features(layer.mlp.down_proj),
        key_value_width=attention.kv_heads * attention.head_dim,
        modulation=modulation,
    )


def layer_shapes(adapter: Adapter) -> dict[tuple[str, str], LayerShape]:
    """Sizes of the transformer layers of every (task, phase) but the image encoder's."""
    llm = layer_shape(adapter.layers[0], adapter.llm_attention)
    block = layer_shape(adapter.blocks[0], adapter.head_attention) if len(adapter.blocks) else llm
    return {
        ("generation", "backbone"): llm,
        ("generation", "head"): block,
        ("generation", "measuring"): llm,
        ("understanding", "prefill"): llm,
        ("understanding", "decode"): llm,
    }


def linear_flops(module: nn.Module) -> float:
    """Operations per token of all linear layers inside."""
    return sum(2.0 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
