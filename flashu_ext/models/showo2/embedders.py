"""Patch embedding of latents and time embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..embedding import sinusoids

__all__ = ["PatchEmbed", "TimestepEmbedder"]

FREQUENCIES = 256


class PatchEmbed(nn.Module):
    """Latents [B, channels, H, W] -> [B, patches, width], patches in raster order."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times [rows] -> [rows, width]: sinusoids of t, then a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoids(t, FREQUENCIES).to(dtype))
