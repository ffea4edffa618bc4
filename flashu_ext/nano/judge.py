"""Judges generated images: finds coloured regions, classifies shapes and places, compares with a scene. Deterministic.

It shares no code with the model: pixels that differ from the ground are joined to regions, a region has the colour that most
of its pixels are nearest to, and its shape follows from how much of its bounding box it fills.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import BACKGROUND, COLORS, PLACES, SIZE, Object, Scene

__all__ = ["Verdict", "find_objects", "judge"]

FOREGROUND = 115.0
"""Distance in RGB from the ground; about half way to each colour, so anti-aliased edges are split evenly."""
COLOR_SHARE = 0.75
SMALLEST_REGION = 16
"""Pixels; smaller regions are specks."""
MOST_SPECKS = 40
"""Maximum pixels of specks in a correct image."""
OBJECT_AREA = (100, 420)
PLACE_TOLERANCE = 5.0
"""Pixels between a region's centre and its place."""


@dataclass(frozen=True)
class Verdict:
    """right: colour, shape and place of every object, and nothing else. reason: the first thing that is wrong, or ''."""

    right: bool
    reason: str


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected regions of a boolean image, as arrays of (y, x)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    result = []
    while left:
        stack = [left.pop()]
        region = []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
        result.append(np.array(region))
    return result


def _shape(region: np.ndarray) -> str:
    """Fill of the bounding box: a square fills it, a circle pi/4 of it, a triangle half."""
    height, width = region.max(0) - region.min(0) + 1
    fill = len(region) / float(height * width)
    if fill > 0.87:
        return "square"
    return "circle" if fill > 0.65 else "triangle"


def _color(pixels: np.ndarray) -> str:
    """The colour that at least COLOR_SHARE of the pixels are nearest to, or 'mixed'."""
    palette = np.array(list(COLORS.values()), dtype=np.float32)
    nearest = ((pixels[:, None].astype(np.float32) - palette) ** 2).sum(-1).argmin(-1)
    counts = np.bincount(nearest, minlength=len(COLORS))
    best = int(counts.argmax())
    return list(COLORS)[best] if counts[best] >= COLOR_SHARE * len(pixels) else "mixed"


def find_objects(image: np.ndarray) -> tuple[list[tuple[str, str, tuple[float, float]]], int]:
    """Objects (colour, shape, centre (x, y) of the bounding box) and the number of speck pixels of uint8 [48, 48, 3]."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 ({SIZE}, {SIZE}, 3), got {image.dtype} {image.shape}")
    distance = np.sqrt(((image.astype(np.float32) - np.array(BACKGROUND, dtype=np.float32)) ** 2).sum(-1))
    objects, specks = [], 0
    for region in _regions(distance > FOREGROUND):
        if len(region) < SMALLEST_REGION:
            specks += len(region)
            continue
        low, high = region.min(0), region.max(0)
        center = ((low[1] + high[1] + 1) / 2, (low[0] + high[0] + 1) / 2)
        shape = _shape(region) if OBJECT_AREA[0] <= len(region) <= OBJECT_AREA[1] else "blob"
        objects.append((_color(image[region[:, 0], region[:, 1]]), shape, center))
    return objects, specks


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Whether an image (uint8 [48, 48, 3]) shows the scene."""
    found, specks = find_objects(image)
    if len(found) != len(scene.objects):
        return Verdict(False, f"{len(found)} objects instead of {len(scene.objects)}")
    if specks > MOST_SPECKS:
        return Verdict(False, f"{specks} stray pixels")
    for wanted in scene.objects:
        reason = _missing(wanted, found)
        if reason:
            return Verdict(False, reason)
    return Verdict(True, "")


def _missing(wanted: Object, found: list[tuple[str, str, tuple[float, float]]]) -> str:
    x, y = PLACES[wanted.place]
    here = [o for o in found if max(abs(o[2][0] - x), abs(o[2][1] - y)) <= PLACE_TOLERANCE]
    if not here:
        return f"nothing at {wanted.place}"
    color, shape, _ = here[0]
    if color != wanted.color:
        return f"{color} instead of {wanted.color} at {wanted.place}"
    return "" if shape == wanted.shape else f"{shape} instead of {wanted.shape} at {wanted.place}"
