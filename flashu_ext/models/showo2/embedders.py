"""Patch embedding of latents and time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PatchEmbed", "TimestepEmbedder"]

MAX_PERIOD = 10000
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
        half = FREQUENCIES // 2
        frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequency
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))
