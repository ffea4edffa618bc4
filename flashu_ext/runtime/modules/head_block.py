"""A modulated attention block of a diffusion head, on this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...models.adapter import BLOCK_PARTS, AttentionShape
from ...ops.kernel_sets import KernelSet
from .attention import AttentionPass, Rope
from .decoder_layer import in_heads
from .layer import Layer

__all__ = ["block_modulation", "head_block"]


def block_modulation(modulation: Tensor, index: int, width: int) -> list[Tensor]:
    """Six [rows, width] of block `index` from rows of `Adapter.modulation`."""
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
        modulation: rows of `Adapter.modulation` for rows of image tokens, or None for text rows, which upstream leaves
            unmodulated (shift 0, scale 0, gate 1).
    Source: Show-o2 `ModulatedAttentionBlock`.
    """
    parts: Sequence[Tensor | None] = [None] * BLOCK_PARTS
    if modulation is not None:
        parts = block_modulation(modulation, index, x.shape[-1])
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = parts

    normed = block.before_attention(x, shift_attn, scale_attn)
    query, key, value = in_heads(block.attention.query_key_value(normed), shape)
    attended = attention(index, query, key, value, rope, block.head_norms)
    kernels.gate_add_(x, block.attention.out(attended), gate_attn)

    kernels.gate_add_(x, block.ffn(block.before_ffn(x, shift_ffn, scale_ffn)), gate_ffn)
    return x
