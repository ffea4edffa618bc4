"""Sinusoidal embeddings of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sinusoids"]

MAX_PERIOD = 10000


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Times [rows] -> fp32 [rows, width]: cosines and sines of t by frequencies from 1 down to 1 / MAX_PERIOD.

    Source: upstream `TimestepEmbedder.timestep_embedding`.
    """
    half = width // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
