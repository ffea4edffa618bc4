"""The diffusion head: its modulated attention blocks and final layer, on this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.parts import AttentionShape
from ...ops.kernel_sets import KernelSet
from .attention import AttentionPass, Rope, head_norms
from .decoder_layer import in_heads
from .layer import Layer
from .linear import Chain, Linear
from .norm import Norm

__all__ = ["block_modulation", "final_layer", "head_block", "modulation_table"]

BLOCK_PARTS, FINAL_PARTS = 6, 2
"""Shift, scale and gate of attention and FFN in a block; shift and scale in the final layer."""


def modulation_table(projections: Sequence[Chain], time: Tensor) -> Tensor:
    """The adaLN projections of every block, and of the final layer, for time embeddings [times, width].

    One product per block for all times of an image, so weights are read once per image, not once per evaluation.

    Returns:
        [times, (6 * blocks + 2) * width].
    """
    return torch.cat([project(time) for project in projections], dim=1)


def block_modulation(modulation: Tensor, index: int, width: int) -> list[Tensor]:
    """Six [rows, width] of block `index` from rows of a `modulation_table`."""
    first = index * BLOCK_PARTS * width
    return list(modulation[:, first : first + BLOCK_PARTS * width].chunk(BLOCK_PARTS, dim=1))


def head_block(
    block: Layer,
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
        modulation: rows of a `modulation_table` for rows of image tokens, or None for text rows, which upstream leaves
            unmodulated (shift 0, scale 0, gate 1).
    Source: Show-o2 `ModulatedAttentionBlock`.
    """
    parts: Sequence[Tensor | None] = [None] * BLOCK_PARTS
    if modulation is not None:
        parts = block_modulation(modulation, index, x.shape[-1])
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = parts

    normed = block.before_attention(x, shift_attn, scale_attn)
    query, key, value = in_heads(block.attention.query_key_value(normed), shape)
    attended = attention(index, query, key, value, rope, head_norms(block.attention.module))
    kernels.gate_add_(x, block.attention.out(attended), gate_attn)

    kernels.gate_add_(x, block.ffn(block.before_ffn(x, shift_ffn, scale_ffn)), gate_ffn)
    return x


def final_layer(linear: Linear, norm: Norm, x: Tensor, modulation: Tensor) -> Tensor:
    """x [rows, tokens, width], rows of a `modulation_table` -> velocity rows [rows, tokens, patch * patch * channels].

    Source: Show-o2 `FinalLayer`.
    """
    shift, scale = modulation[:, -FINAL_PARTS * x.shape[-1] :].chunk(FINAL_PARTS, dim=1)
    return linear(norm(x, shift, scale))
