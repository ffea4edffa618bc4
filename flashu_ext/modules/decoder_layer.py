"""Room: modules. One layer of the language model, from a residual stream to the next, on this library's kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernel_sets import KernelSet
from ..structure import AttentionShape, norm_eps
from .attention import AttentionPass, rotate

__all__ = ["decoder_layer", "project_qkv"]

Rope = tuple[Tensor, Tensor]


def project_qkv(attention: Any, x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, n, hidden] -> query [rows, n, heads, d], key and value [rows, n, kv_heads, d], not yet rotated."""
    rows, n, _ = x.shape
    query = attention.q_proj(x).view(rows, n, shape.heads, shape.head_dim)
    key = attention.k_proj(x).view(rows, n, shape.kv_heads, shape.head_dim)
    value = attention.v_proj(x).view(rows, n, shape.kv_heads, shape.head_dim)
    return query, key, value


def decoder_layer(
    layer: Any,
    index: int,
    x: Tensor,
    rope: Rope,
    attention: AttentionPass,
    shape: AttentionShape,
    kernels: KernelSet,
    task: str | None,
) -> Tensor:
    """Qwen2 decoder layer: x [rows, n, hidden] -> [rows, n, hidden]. `x` is consumed: it may be overwritten.

    Args:
        layer: the model's layer, its `mlp` a GatheredFFN. index: its number, for the attention pass's cache.
        task: whose neuron set the FFN uses, or None: all neurons.
    """
    normed = kernels.rms_norm(x, layer.input_layernorm.weight, norm_eps(layer.input_layernorm))
    query, key, value = project_qkv(layer.self_attn, normed, shape)
    attended = layer.self_attn.o_proj(attention(index, rotate(query, rope), rotate(key, rope), value))
    norm = layer.post_attention_layernorm
    normed = kernels.add_rms_norm_(attended, x, norm.weight, norm_eps(norm))
    return layer.mlp(normed, task=task, residual=x)
