"""Pictures that callers give and get: checks, tensors, sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..planning.extras import extra
from ..planning.groups import whole
from ..planning.reading import MAX_PIXELS, in_rgb, shown

__all__ = ["Size", "covered", "picture", "rgb", "sides", "to_pil", "unit"]

Size = int | tuple[int, int]
"""An image's size in pixels: its side, or (height, width)."""


def picture(image: Any) -> Any:
    """A PIL image in RGB, of one in any mode or of uint8 [height, width, 3]. Raises TypeError or ValueError for anything else."""
    from PIL import Image

    if isinstance(image, (np.ndarray, Tensor)):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise ValueError(f"image: expected uint8 [height, width, 3], got {array.dtype} {list(array.shape)}")
        return Image.fromarray(array)
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image or uint8 [height, width, 3], got {type(image).__name__}")
    return in_rgb(image)


def rgb(image: Any, name: str, on_white: bool = False) -> Any:
    """A PIL image of any mode in RGB, at least one pixel large.

    Args:
        name: of the argument, for messages.
        on_white: what is transparent shows white; else the colours that it hides.

    Raises:
        TypeError: it is no PIL image.
        ValueError: its file is damaged or closed, or it has no pixels.
    """
    with extra("showo2"):
        from PIL import Image

    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected a PIL image, got {type(image).__name__}")
    try:
        if on_white and (image.mode == "RGBA" or "transparency" in image.info):
            image = image.convert("RGBA")
            paper = Image.new("RGB", image.size, "white")
            paper.paste(image, mask=image.getchannel("A"))
            image = paper
        image = in_rgb(image)
    except (
        Exception
    ) as error:  # damaged files end in errors of all kinds; a closed one in an AttributeError or ValueError
        raise ValueError(f"{name}: expected an image that can be read: {error}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name}: expected at least one pixel, got {width} x {height}")
    return image


def covered(image: Any, side: int, name: str) -> Any:
    """A PIL image in RGB scaled to cover a square, bicubically, and cropped in its middle. Raises ValueError where it is long."""
    from PIL.Image import Resampling

    width, height = image.size
    if (width, height) == (side, side):
        return image
    scale = side / min(width, height)
    width, height = max(side, int(width * scale)), max(side, int(height * scale))
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: expected sides of a like length, got {image.size[0]} x {image.size[1]}")
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def unit(image: Any) -> Tensor:
    """A PIL image in RGB -> fp32 [1, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pil(image: Tensor) -> Any:
    """[3, H, W] in [-1, 1] -> PIL image, pixels rounded to the nearest."""
    with extra("showo2"):
        from PIL import Image

    pixels = ((image.permute(1, 2, 0).cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size in pixels. Raises TypeError or ValueError."""
    given = [whole(side) for side in (size if isinstance(size, (tuple, list)) else [size, size])]
    numbers = [side for side in given if side is not None]
    if len(given) != 2 or len(numbers) != 2:
        raise TypeError(f"size: expected pixels, an integer or (height, width), got {shown(size, 80)}")
    height, width = numbers
    if height < 1 or width < 1:
        raise ValueError(f"size: expected at least one pixel, got {shown(height)} x {shown(width)}")
    if max(height, width) > MAX_PIXELS:
        raise ValueError(f"size: expected at most {MAX_PIXELS} pixels a side, got {shown(height)} x {shown(width)}")
    return height, width
