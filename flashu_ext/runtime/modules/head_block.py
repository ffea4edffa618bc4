"""The diffusion head: its modulated attention blocks and final layer, on this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.parts import AttentionShape, norm_eps
from ...ops.kernel_sets import KernelSet
from .attention import AttentionPass, Rope, head_norms
from .decoder_layer import project_qkv

__all__ = ["block_modulation", "final_layer", "head_block", "modulation_table"]

BLOCK_PARTS, FINAL_PARTS = 6, 2
"""Shift, scale and gate of attention and FFN in a block; shift and scale in the final layer."""


def modulation_table(blocks: Sequence[Any], final: Any, time: Tensor) -> Tensor:
    """The adaLN projections of every block, and of the final layer, for time embeddings [times, width].

    All times of an image in one product a block, so these weights are read once an image instead of once an evaluation.

    Returns:
        [times, (6 * blocks + 2) * width].
    """
    return torch.cat([layer.adaLN_modulation(time) for layer in (*blocks, final)], dim=1)


def block_modulation(modulation: Tensor, index: int, width: int) -> list[Tensor]:
    """Six [rows, width] of block `index` from rows of a `modulation_table`."""
    first = index * BLOCK_PARTS * width
    return list(modulation[:, first : first + BLOCK_PARTS * width].chunk(BLOCK_PARTS, dim=1))


def head_block(
    block: Any,
    index: int,
    x: Tensor,
    modulation: Tensor | None,
    rope: Rope,
    attention: AttentionPass,
    shape: AttentionShape,
    kernels: KernelSet,
) -> Tensor:
    """Modulated attention block: x [rows, n, width] -> [rows, n, width]. `x` is consumed: it may be overwritten.

    Args:
        modulation: rows of a `modulation_table` for an image span that fills every row, or None for text rows, which
            upstream leaves unmodulated (shift 0, scale 0, gate 1).
    Source: Show-o2 `ModulatedAttentionBlock`.
    """
    rows, n, width = x.shape
    spans = [number for row in range(rows) for number in (row, 0, n)] if modulation is not None else []
    parts = [x.new_empty(0, width)] * BLOCK_PARTS if modulation is None else block_modulation(modulation, index, width)
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = parts

    norm = block.input_layernorm
    normed = kernels.span_modulate(x, norm.weight, shift_attn, scale_attn, spans, norm_eps(norm))
    query, key, value = project_qkv(block.self_attn, normed, shape)
    attended = attention(index, query, key, value, rope, head_norms(block.self_attn))
    kernels.span_gate_add_(x, block.self_attn.o_proj(attended), gate_attn, spans)

    norm = block.post_attention_layernorm
    normed = kernels.span_modulate(x, norm.weight, shift_ffn, scale_ffn, spans, norm_eps(norm))
    mlp = block.mlp
    y = kernels.gathered_ffn(normed, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    kernels.span_gate_add_(x, y, gate_ffn, spans)
    return x


def final_layer(layer: Any, x: Tensor, modulation: Tensor, kernels: KernelSet) -> Tensor:
    """x [rows, tokens, width], rows of a `modulation_table` -> velocity rows [rows, tokens, patch * patch * channels].

    Source: Show-o2 `FinalLayer`.
    """
    rows, n, width = x.shape
    shift, scale = modulation[:, -FINAL_PARTS * width :].chunk(FINAL_PARTS, dim=1)
    spans = [number for row in range(rows) for number in (row, 0, n)]
    norm = layer.norm_final
    return layer.linear(kernels.span_modulate(x, norm.weight, shift, scale, spans, norm_eps(norm)))
