"""Room: modules. One layer of the language model, from a residual stream to the next, on this library's kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernel_sets import KernelSet
from ..structure import AttentionShape, norm_eps
from .attention import AttentionPass, Rope, rotate

__all__ = ["decoder_layer", "project_qkv", "routed_decoder_layer"]


def project_qkv(attention: Any, x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, n, hidden] -> query [rows, n, heads, d], key and value [rows, n, kv_heads, d], not yet rotated."""
    rows, n, _ = x.shape
    query = attention.q_proj(x).view(rows, n, shape.heads, shape.head_dim)
    return query, *_project_kv(attention, x, shape)


def _project_kv(attention: Any, x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    rows, n, _ = x.shape
    key = attention.k_proj(x).view(rows, n, shape.kv_heads, shape.head_dim)
    value = attention.v_proj(x).view(rows, n, shape.kv_heads, shape.head_dim)
    return key, value


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


def routed_decoder_layer(
    layer: Any,
    index: int,
    x: Tensor,
    active: Tensor,
    rope: Rope,
    attention: AttentionPass,
    shape: AttentionShape,
    kernels: KernelSet,
    task: str | None,
) -> Tensor:
    """`decoder_layer` for the active tokens; the others leave as they came: x [rows, n, hidden], overwritten and returned.

    The active tokens attend to all n: the keys and values of a carried token are made from the state it is carried in, so
    what is computed is what the whole layer would give. They cost little (a seventh of the attention's weights
    in the 1.5B model, an eighth in the 7B one); queries, output projection and FFN are what is saved.

    Args:
        active: int64 [rows, k], the tokens to compute, each once. Others: as for `decoder_layer`; rope for all n tokens.
    """
    rows, k = active.shape
    normed = kernels.rms_norm(x, layer.input_layernorm.weight, norm_eps(layer.input_layernorm))
    key, value = _project_kv(layer.self_attn, normed, shape)
    moved = kernels.gather_rows(x, active)
    query = layer.self_attn.q_proj(kernels.gather_rows(normed, active)).view(rows, k, shape.heads, shape.head_dim)
    cos, sin = (kernels.gather_rows(table[:, :, 0], active)[:, :, None] for table in rope)
    attended = attention(index, rotate(query, (cos, sin)), rotate(key, rope), value)
    attended = layer.self_attn.o_proj(attended)
    norm = layer.post_attention_layernorm
    normed = kernels.add_rms_norm_(attended, moved, norm.weight, norm_eps(norm))
    return kernels.scatter_rows_(x, active, layer.mlp(normed, task=task, residual=moved))
