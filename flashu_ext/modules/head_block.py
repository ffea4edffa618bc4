"""Room: modules. The diffusion head: its modulated attention blocks and final layer, on this library's kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernel_sets import KernelSet
from ..structure import AttentionShape, norm_eps
from .attention import AttentionPass, Rope, rotate
from .decoder_layer import project_qkv

__all__ = ["final_layer", "head_block"]


def head_block(
    block: Any,
    index: int,
    x: Tensor,
    time: Tensor | None,
    rope: Rope,
    attention: AttentionPass,
    shape: AttentionShape,
    kernels: KernelSet,
) -> Tensor:
    """Modulated attention block: x [rows, n, width] -> [rows, n, width]. `x` is consumed: it may be overwritten.

    Args:
        time: time embedding [rows, width] of an image span that fills every row, or None for text rows, which upstream
            leaves unmodulated (shift 0, scale 0, gate 1).
    Source: Show-o2 `ModulatedAttentionBlock`.
    """
    rows, n, width = x.shape
    spans = [number for row in range(rows) for number in (row, 0, n)] if time is not None else []
    if time is not None:
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = block.adaLN_modulation(time).chunk(6, dim=1)
    else:
        shift_attn = scale_attn = gate_attn = shift_ffn = scale_ffn = gate_ffn = x.new_empty(0, width)

    norm = block.input_layernorm
    normed = kernels.span_modulate(x, norm.weight, shift_attn, scale_attn, spans, norm_eps(norm))
    query, key, value = project_qkv(block.self_attn, normed, shape)
    query_norm, key_norm = getattr(block.self_attn, "q_norm", None), getattr(block.self_attn, "k_norm", None)
    if query_norm is not None and key_norm is not None:
        query = kernels.rms_norm(query, query_norm.weight, norm_eps(query_norm))
        key = kernels.rms_norm(key, key_norm.weight, norm_eps(key_norm))
    attended = attention(index, rotate(query, rope), rotate(key, rope), value)
    kernels.span_gate_add_(x, block.self_attn.o_proj(attended), gate_attn, spans)

    norm = block.post_attention_layernorm
    normed = kernels.span_modulate(x, norm.weight, shift_ffn, scale_ffn, spans, norm_eps(norm))
    mlp = block.mlp
    y = kernels.gathered_ffn(normed, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    kernels.span_gate_add_(x, y, gate_ffn, spans)
    return x


def final_layer(layer: Any, x: Tensor, time: Tensor, kernels: KernelSet) -> Tensor:
    """x [rows, tokens, width], time [rows, width] -> velocity rows [rows, tokens, patch * patch * channels].

    Source: Show-o2 `FinalLayer`.
    """
    rows, n, _ = x.shape
    shift, scale = layer.adaLN_modulation(time).chunk(2, dim=1)
    spans = [number for row in range(rows) for number in (row, 0, n)]
    norm = layer.norm_final
    return layer.linear(kernels.span_modulate(x, norm.weight, shift, scale, spans, norm_eps(norm)))
