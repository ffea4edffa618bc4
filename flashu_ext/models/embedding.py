"""Embeddings of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["TimestepEmbedder", "sinusoids"]

MAX_PERIOD = 10000
FREQUENCIES = 256

TIMES = 64
"""Times that are embedded at once: below the size from which torch shares a sine out over threads."""


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Times [rows] -> fp32 [rows, width]: cosines and sines of t by frequencies from 1 down to 1 / MAX_PERIOD.

    Source: upstream `TimestepEmbedder.timestep_embedding`.
    """
    half = width // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = [some[:, None].float() * frequency for some in t.split(TIMES)]
    return torch.cat([torch.cat([each.cos(), each.sin()], dim=-1) for each in angles])


class TimestepEmbedder(nn.Module):
    """Times [rows] -> [rows, width]: sinusoids of t, then a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoids(t, FREQUENCIES).to(dtype))
