"""Velocity rows to velocity of latents and back, and classifier-free guidance. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["guide", "patchify", "unpatchify"]


def unpatchify(rows: Tensor, shape: torch.Size) -> Tensor:
    """Velocity rows [B, patches, patch * patch * channels] -> [B, channels, H, W].

    Show-o2 writes the patch * patch vectors of each token consecutively in raster order of the latents; they do not form
    square patches. Its checkpoints are trained that way.

    Args:
        shape: of latents; its batch size is ignored.
    """
    return rows.reshape(rows.shape[0], -1, shape[1]).transpose(1, 2).reshape(rows.shape[0], *shape[1:])


def patchify(velocity: Tensor, patch: int) -> Tensor:
    """The inverse of `unpatchify`: [B, channels, H, W] -> [B, patches, patch * patch * channels], contiguous."""
    rows, channels, height, width = velocity.shape
    vectors = velocity.reshape(rows, channels, -1).transpose(1, 2)
    return vectors.reshape(rows, height * width // patch**2, -1).contiguous()


def guide(branches: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: [2 * B, ...], the conditional half first -> [B, ...]."""
    conditional, unconditional = branches.chunk(2)
    return unconditional + scale * (conditional - unconditional)
