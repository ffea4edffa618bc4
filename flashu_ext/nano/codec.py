"""A fixed linear image codec: 16 numbers for every 4 x 4 pixels, from a formula, invertible up to fine detail.

Pixels are turned to one brightness and two colour axes; of each block's discrete cosine transform the 8 lowest brightness
and 4 + 4 lowest colour coefficients are kept. Blocks are stored so that every 2 x 2 group of them is one patch of the
model: the image's 6 x 6 patches stand below each other, as latents of 72 x 2. That is the order in which Show-o2 lays its
predicted patches out (`Showo2.unpatchify`), so a patch is read and written by the same token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.autocast import without_autocast
from .world import SIZE

__all__ = [
    "CHANNELS",
    "GRID",
    "GridCodec",
    "LATENT_SHAPE",
    "decode",
    "encode",
    "grid",
    "latent_size",
    "pictures",
    "to_unit",
    "ungrid",
]

BLOCK = 4
CHANNELS = 16
GRID = SIZE // (2 * BLOCK)
LATENT_SHAPE = (CHANNELS, 2 * GRID * GRID, 2)


def _constant(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


# Orthonormal brightness, red-blue and green axes.
_AXES = _constant([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
_AXES = _AXES / _AXES.norm(dim=1, keepdim=True)


def _basis() -> Tensor:
    """Analysis matrix [CHANNELS, 3 * BLOCK * BLOCK] with orthonormal rows."""
    n = torch.arange(BLOCK, dtype=torch.float32, device="cpu")
    dct = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / (2 * BLOCK))
    dct = dct / dct.norm(dim=1, keepdim=True)
    order = sorted(((u, v) for u in range(BLOCK) for v in range(BLOCK)), key=lambda uv: (uv[0] + uv[1], uv))
    rows = []
    for axis, kept in zip(_AXES, (8, 4, 4), strict=True):
        for u, v in order[:kept]:
            rows.append(torch.einsum("c,y,x->cyx", axis, dct[u], dct[v]).flatten())
    return torch.stack(rows)


_BASIS = _basis()

# Mean and scale of the channels over the training scenes (`python -m flashu_ext.nano.codec` prints them). The scale is half
# the geometric mean of the channel's standard deviation and the strongest channel's: fine detail stays weaker than form, so
# that form is learned first, and latents as a whole have about the spread of the noise.
_MEAN = _constant([4.646, 0, 0, 0, 0, 0, 0, 0, 0.198, 0, 0, 0, 0.112, 0, 0, 0])
_SCALE = _constant(
    [1.171, 0.572, 0.57, 0.38, 0.366, 0.387, 0.266, 0.294, 0.932, 0.434, 0.432, 0.287, 0.672, 0.311, 0.309, 0.206]
)


def _analyse(images: Tensor) -> Tensor:
    """Images [B, 3, SIZE, SIZE] in [-1, 1] -> raw coefficients [B, GRID, GRID, 2, 2, CHANNELS]."""
    batch = images.shape[0]
    blocks = images.view(batch, 3, GRID, 2, BLOCK, GRID, 2, BLOCK).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return blocks.reshape(batch, GRID, GRID, 2, 2, -1) @ _BASIS.T.to(images)


def encode(images: Tensor) -> Tensor:
    """Images [B, 3, 48, 48] in [-1, 1] -> latents fp32 [B, 16, 72, 2]."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f"images: expected [B, 3, {SIZE}, {SIZE}], got {tuple(images.shape)}")
    with without_autocast(images.device):
        codes = (_analyse(images.float()) - _MEAN.to(images.device)) / _SCALE.to(images.device)
    return codes.permute(0, 5, 1, 2, 3, 4).reshape(images.shape[0], *LATENT_SHAPE)


def decode(latents: Tensor) -> Tensor:
    """Latents [B, 16, 72, 2] -> images fp32 [B, 3, 48, 48], clamped to [-1, 1]."""
    if latents.dim() != 4 or tuple(latents.shape[1:]) != LATENT_SHAPE:
        raise ValueError(f"latents: expected [B, {', '.join(map(str, LATENT_SHAPE))}], got {tuple(latents.shape)}")
    batch = latents.shape[0]
    codes = latents.float().reshape(batch, CHANNELS, GRID, GRID, 2, 2).permute(0, 2, 3, 4, 5, 1)
    codes = codes * _SCALE.to(latents.device) + _MEAN.to(latents.device)
    with without_autocast(latents.device):
        blocks = codes @ _BASIS.to(latents.device)
    blocks = blocks.view(batch, GRID, GRID, 2, 2, 3, BLOCK, BLOCK)
    return blocks.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(batch, 3, SIZE, SIZE).clamp(-1, 1)


def grid(latents: Tensor) -> Tensor:
    """Latents [B, 16, 72, 2] -> the same numbers where they lie in the image, [B, 16, 12, 12]."""
    blocks = latents.unflatten(2, (GRID, GRID, 2))  # [B, 16, row, column, row in patch, column in patch]
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(latents.shape[0], CHANNELS, 2 * GRID, 2 * GRID)


def ungrid(latents: Tensor) -> Tensor:
    """The inverse of `grid`."""
    blocks = latents.view(latents.shape[0], CHANNELS, GRID, 2, GRID, 2)
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(latents.shape[0], *LATENT_SHAPE)


class GridCodec:
    """The codec of pipelines whose latents lie as the pixels do (`models.codec.Codec`): [B, 16, 12, 12]."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return grid(encode(images))

    def decode(self, latents: Tensor) -> Tensor:
        return decode(ungrid(latents))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(12, 12); a ValueError for another size than 48 x 48 pixels."""
        latent_size(height, width)
        return 2 * GRID, 2 * GRID


def latent_size(height: int, width: int) -> tuple[int, int]:
    """(72, 2), the latents of the one size of images that there is, 48 x 48 pixels; a ValueError for any other."""
    if (height, width) != (SIZE, SIZE):
        raise ValueError(
            f"size: expected {SIZE} x {SIZE} pixels, all that the embedded model draws, got {height} x {width}"
        )
    return LATENT_SHAPE[1:]


def to_unit(images: np.ndarray) -> Tensor:
    """Pictures uint8 [B, 48, 48, 3] -> images fp32 [B, 3, 48, 48] in [-1, 1], as `encode` takes them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(latents: Tensor) -> np.ndarray:
    """Latents [B, 16, 72, 2] -> pictures uint8 [B, 48, 48, 3]."""
    pixels = (decode(latents).permute(0, 2, 3, 1) + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _measure() -> None:
    """Print the constants above, measured over one rendering of every training scene."""
    import random

    from .world import render, scenes

    rng = random.Random(0)
    images = np.stack([render(scene, rng) for scene in scenes(held_out=False)])
    codes = _analyse(to_unit(images)).flatten(0, 4)
    std = codes.std(0)
    print("mean", [round(v, 3) for v in codes.mean(0).tolist()])
    print("scale", [round(v, 3) for v in (0.5 * (std * std.max()).sqrt()).tolist()])


if __name__ == "__main__":
    _measure()
