"""Pictures as the VAE and the image encoder read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pictures import picture
from .config import BagelConfig

__all__ = ["encoded", "pixels", "vae_image", "vit_image"]

SHIFT, SCALE = 0.1159, 0.3611
"""Of the VAE's latents; its config names them."""

MOST_PIXELS = 14 * 14 * 9 * 1024
"""Of a resized picture before its long side is limited; only very long pictures have more."""


def vae_image(image: Any, config: BagelConfig, largest: int = 1024, smallest: int = 512) -> Any:
    """A picture resized for the VAE: sides of whole latent tokens.

    Args:
        image: a PIL image, or uint8 [height, width, 3].
        largest: of the long side. smallest: of the short side, which is more important.

    Returns:
        A PIL image; `pixels` are what the VAE encodes.

    Raises:
        TypeError, ValueError: no such image.
    Source: upstream data/transforms.py.
    """
    return _resized(picture(image), config.token_pixels, largest, smallest)


def vit_image(image: Any, config: BagelConfig, largest: int = 980, smallest: int = 224) -> tuple[Tensor, Tensor]:
    """A picture as tokens of the image encoder; upstream gives it what `vae_image` has resized.

    Returns:
        Tokens fp32 [n, row x column x channel], and their places int64 [n], for `Image`.
    """
    resized = _resized(picture(image), config.vit_patch, largest, smallest)
    rows, columns = resized.height // config.vit_patch, resized.width // config.vit_patch
    if max(rows, columns) > config.vit_side:
        raise ValueError(f"image: expected at most {config.vit_side} patches a side, got {rows} x {columns}")
    patch = config.vit_patch
    grid = pixels(resized)[0].reshape(3, rows, patch, columns, patch)
    tokens = grid.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    row, column = torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
    places = row[:, None] * config.vit_side + column
    return tokens, places.flatten()


def pixels(image: Any) -> Tensor:
    """A PIL image -> fp32 [1, 3, height, width] in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5


def encoded(mean: Tensor, std: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of an image to be edited, sampled from the VAE's posterior as upstream does.

    Args:
        mean, std: [1, channels, H, W] of the posterior.
        generator: of the noise; None: torch's own.
    """
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return SCALE * (mean + std * noise - SHIFT)


def _resized(image: Any, stride: int, largest: int, smallest: int) -> Any:
    from PIL import Image

    width, height = image.size
    scale = max(min(largest / max(width, height), 1.0), smallest / min(width, height))
    size = _whole(width, height, scale, stride)
    if size[0] * size[1] > MOST_PIXELS:
        # Both sides by the ratio of areas, as upstream.
        size = _whole(*size, MOST_PIXELS / (size[0] * size[1]), stride)
    if max(size) > largest:
        size = _whole(*size, largest / max(size), stride)
    return image.resize(size, Image.Resampling.BICUBIC)


def _whole(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    """Scaled sides, rounded to multiples of the stride, at least one."""
    sides = (max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))
    return next(sides), next(sides)
