"""Latents as tokens: how they are packed, and their places in the position table."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import BagelConfig

__all__ = ["grid_of", "latent_places", "packed", "unpacked"]


def packed(latents: Tensor, config: BagelConfig) -> Tensor:
    """Latents [1, channels, H, W] -> tokens [n, row in patch x column in patch x channel]."""
    patch = config.latent_patch
    _, channels, height, width = latents.shape
    rows = latents[0].reshape(channels, height // patch, patch, width // patch, patch)
    return rows.permute(1, 3, 2, 4, 0).reshape(-1, config.patch_width)


def unpacked(tokens: Tensor, size: tuple[int, int], config: BagelConfig) -> Tensor:
    """The inverse of `packed` for an image of (height, width) pixels: [1, channels, H, W]."""
    patch, (rows, columns) = config.latent_patch, grid_of(size, config)
    grid = tokens.reshape(rows, columns, patch, patch, config.latent_channels)
    return grid.permute(4, 0, 2, 1, 3).reshape(1, config.latent_channels, rows * patch, columns * patch)


def grid_of(size: tuple[int, int], config: BagelConfig) -> tuple[int, int]:
    """Latent tokens (rows, columns) of an image of (height, width) pixels."""
    height, width = (length // config.token_pixels for length in size)
    return height, width


def latent_places(grid: tuple[int, int], config: BagelConfig, device: torch.device) -> Tensor:
    """int64 [n]: indices into the table of all places, whatever the grid."""
    rows, columns = (torch.arange(count, device=device) for count in grid)
    return (rows[:, None] * config.latent_side + columns).flatten()
