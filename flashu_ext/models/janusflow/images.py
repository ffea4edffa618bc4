"""Images of questions: as pixels, and their place among the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_tensor
from ..pictures import picture
from .config import JanusFlowConfig, config_of

__all__ = ["check_pixels", "image_span", "pixel_values"]

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


def check_pixels(value: Any, images: int, model: Any) -> None:
    """Raise TypeError or ValueError for what is not the pixels of so many images."""
    side = config_of(model).image_size
    check_tensor("pixel_values", value, 4, "a floating-point tensor", model.beg_of_und_embed.device)
    if tuple(value.shape) != (images, 3, side, side):
        raise ValueError(f"pixel_values: expected [{images}, 3, {side}, {side}], got {tuple(value.shape)}")


def image_span(model: Any, tokens: Tensor) -> tuple[int, int]:
    """(start, count) of an image's place in a question's tokens int64 [1, n]: begin_of_image, whose embedding is not used, and
    a run of the placeholder as long as an image has tokens.

    Raises:
        ValueError: there is no such run, or several.
    """
    count = config_of(model).vit_tokens
    same = tokens[0, 1:] == tokens[0, :-1]
    # Of a run of `count` equal ids all neighbours are equal, and the neighbours around it differ.
    runs = torch.nn.functional.pad(same.int(), (1, 1)).diff()
    starts, ends = (torch.nonzero(runs == sign).flatten().tolist() for sign in (1, -1))
    found = [start for start, end in zip(starts, ends, strict=True) if end - start + 1 == count]
    if count == 1 or len(found) != 1 or found[0] == 0:
        raise ValueError(
            f"tokens: expected one image, begin_of_image and {count} placeholders of one id, got {len(found)} such places"
        )
    return found[0] - 1, count + 1
