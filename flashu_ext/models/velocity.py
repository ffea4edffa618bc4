"""Velocity rows to velocity of latents and back, and classifier-free guidance. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Scale", "first_branch", "guide", "guided", "patchify", "unpatchify"]

Scale = float | tuple[float, ...]
"""A guidance scale: one for all images, or one for each."""


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


def guided(scale: Scale) -> bool:
    """Whether a scale asks for guidance; 0 does not."""
    return isinstance(scale, tuple) or scale > 0


def first_branch(rows: Tensor, scale: Tensor) -> Tensor:
    """Without guidance: velocity rows of an image's branches -> the first's (a `sampling.Formula`)."""
    return rows[:1]


def guide(branches: Tensor, scale: Scale) -> Tensor:
    """Classifier-free guidance: [2 * B, channels, H, W], the conditional half first -> [B, channels, H, W]."""
    conditional, unconditional = branches.chunk(2)
    if isinstance(scale, tuple):
        factors = torch.tensor(scale, dtype=branches.dtype, device=branches.device)[:, None, None, None]
        return unconditional + factors * (conditional - unconditional)
    return unconditional + scale * (conditional - unconditional)
