"""Images of questions as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pictures import picture
from .config import JanusFlowConfig

__all__ = ["pixel_values"]

HALF = (0.5, 0.5, 0.5)


def pixel_values(
    image: Any, config: JanusFlowConfig, mean: Sequence[float] = HALF, std: Sequence[float] = HALF
) -> Tensor:
    """A picture as the image encoder reads it: the long side resized to `image_size`, bicubically, padded to a square in the mean
    colour, normalised.

    Args:
        image: a PIL image, or uint8 [height, width, 3].
        mean, std: of red, green and blue in [0, 1]; the checkpoint's preprocessor names them.

    Returns:
        fp32 [1, 3, image_size, image_size].

    Raises:
        TypeError, ValueError: no such image.
    Source: upstream janus/models/image_processing_vlm.py.
    """
    from PIL import Image

    image, side = picture(image), config.image_size
    longest = max(image.size)
    width, height = (max(1, int(length / longest * side)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), tuple(int(each * 255) for each in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    pixels = torch.from_numpy(np.array(square)).float() / 255
    normal = (pixels - torch.tensor(mean, dtype=torch.float32, device="cpu")) / torch.tensor(
        std, dtype=torch.float32, device="cpu"
    )
    return normal.permute(2, 0, 1)[None]
