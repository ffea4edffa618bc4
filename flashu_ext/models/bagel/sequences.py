"""What callers of a pipeline give: texts and images in order, and scales of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...planning.groups import real
from ...planning.reading import shown
from ..pictures import rgb
from ..prompts import check_text
from .config import BagelConfig
from .images import vae_image
from .sampling import Guidance

__all__ = ["DRAWING", "EDITING", "INTERLEAVED", "guidance_of", "images_of", "items_of", "read_all"]

DRAWING = Guidance()
"""Of `Pipeline.generate`: the notebook's."""
EDITING = Guidance(4.0, 2.0, (0.0, 1.0), "text_channel")
"""Of `Pipeline.edit`: the demo's."""
INTERLEAVED = Guidance(3.0, 1.5)
"""Of `Pipeline.interleave`: the defaults of upstream's `interleave_inference`."""


def guidance_of(guidance: Any, text: Any, image: Any) -> Guidance:
    """Guidance with a caller's scales. Raises TypeError or ValueError, naming the argument."""
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: expected a Guidance, got {type(guidance).__name__}")
    for name, value in (("text_guidance", text), ("image_guidance", image)):
        if value is not None and (real(value) is None or value < 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {shown(value)}")
    text, image = (own if value is None else value for own, value in ((guidance.text, text), (guidance.image, image)))
    return replace(guidance, text=text, image=image)


def images_of(images: Any, name: str) -> dict[str, Any]:
    """An image, or the images of a list, under their names for messages.

    Raises:
        TypeError: one is a string, which is a text elsewhere. ValueError: the list is empty.
    """
    if not isinstance(images, (list, tuple)):
        named = {name: images}
    elif images:
        named = {f"{name}[{index}]": image for index, image in enumerate(images)}
    else:
        raise ValueError(f"{name}: expected at least one image, got an empty list")
    for own, image in named.items():
        if isinstance(image, str):
            raise TypeError(f"{own}: expected a PIL image, got str")
    return named


def items_of(items: Any) -> dict[str, Any]:
    """Texts and images of a sequence under their names for messages. Raises TypeError or ValueError."""
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise TypeError(f"items: expected a list of strings and PIL images, got {type(items).__name__}")
    if not items:
        raise ValueError("items: expected at least one string or PIL image, got an empty list")
    return {f"items[{index}]": item for index, item in enumerate(items)}


def read_all(items: Mapping[str, Any], config: BagelConfig, sides: tuple[int, int]) -> list[Any]:
    """Strings, and images resized for the VAE. Upstream shows what is transparent as white.

    Args:
        items: under their names for messages.
        sides: longest and shortest, of `vae_image`.

    Raises:
        TypeError, ValueError: one is neither a string nor an image that can be read.
    """
    for name, item in items.items():
        if isinstance(item, str):
            check_text(name, item)
    return [
        item if isinstance(item, str) else vae_image(rgb(item, name, on_white=True), config, *sides)
        for name, item in items.items()
    ]
