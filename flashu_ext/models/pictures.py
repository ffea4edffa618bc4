"""Pictures that callers give."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["picture"]


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
    return image.convert("RGB")
