"""Room: nano. The world the embedded model lives in: procedural scenes, how they look, and what is said and asked about them.

One or two coloured shapes on a plain ground. One object stands in the centre or at one of four sides; two stand left and
right or one above the other. Places and sizes vary by a pixel or two. A scene's combination of objects and places decides
by a hash whether it belongs to training or is held out, so held-out combinations are never trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np

__all__ = [
    "COLORS",
    "PLACES",
    "SHAPES",
    "SIZE",
    "Object",
    "Question",
    "Scene",
    "captions",
    "description",
    "is_held_out",
    "questions",
    "render",
    "scattered_scene",
    "scenes",
]

SIZE = 48
"""Image side in pixels."""

COLORS = {"red": (214, 48, 49), "green": (0, 158, 90), "blue": (32, 92, 214), "yellow": (250, 196, 24)}
BACKGROUND = (236, 236, 232)
SHAPES = ("circle", "square", "triangle")
PLACES = {"center": (24, 24), "left": (13, 24), "right": (35, 24), "top": (24, 13), "bottom": (24, 35)}
"""Centres as (x, y) in pixels, y down."""

RADIUS = 9.0
PLACE_JITTER = 1.0
SIZE_JITTER = 0.07
# Of scenes that are rendered loosely: more of both, pairs moved along or across their line, colours varied.
LOOSE_PLACE_JITTER = 3.0
LOOSE_SIZE_JITTER = 0.25
LOOSE_SHIFT = 8.0
LOOSE_COLOR_JITTER = 20.0
# Of scattered scenes: radii, and how much free ground is between objects and to the edge.
SCATTERED_RADII = (5.0, 10.0)
SCATTERED_GAP = 1.5
SCATTERED_SLOPE = 1.5
"""One object is left of another, and not above it, where they are this many times further apart across than along."""
HELD_OUT_SHARE = 6
"""One combination in this many is held out."""

_WHERE = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_SAID = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Object:
    color: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object, or two: from left to right or from top to bottom. Scattered ones also have centres and radii.

    Attributes:
        points: (x, y, radius) of each object in pixels, y down, or None where `place` says it all.
    """

    objects: tuple[Object, ...]
    points: tuple[tuple[float, float, float], ...] | None = None

    @property
    def key(self) -> str:
        """The combination, as text."""
        return " + ".join(f"{o.name} {o.place}" for o in self.objects)

    def relation(self, first: int, second: int) -> str | None:
        """How an object lies to another: 'left', 'right', 'above' or 'below'; None where it is neither clearly."""
        if self.points is None:
            ahead = "left" if self.objects[0].place == "left" else "above"
            return ahead if first < second else _OPPOSITE[ahead]
        across = self.points[second][0] - self.points[first][0]
        along = self.points[second][1] - self.points[first][1]
        if abs(across) >= SCATTERED_SLOPE * abs(along):
            return "left" if across > 0 else "right"
        if abs(along) >= SCATTERED_SLOPE * abs(across):
            return "above" if along > 0 else "below"
        return None

    def pair(self, first: int, second: int) -> Scene | None:
        """The combination that two of the objects make up where they stand clearly beside or above each other."""
        relation = self.relation(first, second)
        if relation in ("right", "below"):
            first, second, relation = second, first, _OPPOSITE[relation]
        if relation is None:
            return None
        ends = ("left", "right") if relation == "left" else ("top", "bottom")
        chosen = (self.objects[first], self.objects[second])
        return Scene(tuple(Object(o.color, o.shape, place) for o, place in zip(chosen, ends, strict=True)))


@dataclass(frozen=True)
class Question:
    """kind is 'color', 'shape', 'count', 'relation' or 'yes/no'."""

    kind: str
    text: str
    answer: str


def is_held_out(scene: Scene) -> bool:
    """Whether a scene's combination belongs to evaluation; decided by its text alone."""
    return hashlib.sha256(scene.key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def scenes(held_out: bool, count: int | None = None) -> list[Scene]:
    """All combinations of one side of the split, in a fixed order; `count` restricts to one or two objects."""
    kinds = list(itertools.product(COLORS, SHAPES))
    singles = [Scene((Object(c, s, place),)) for c, s in kinds for place in PLACES]
    pairs = [
        Scene((Object(*a, first), Object(*b, second)))
        for a, b in itertools.permutations(kinds, 2)
        for first, second in (("left", "right"), ("top", "bottom"))
    ]
    chosen = [scene for scene in singles + pairs if is_held_out(scene) == held_out]
    return [scene for scene in chosen if count is None or len(scene.objects) == count]


def scattered_scene(rng: random.Random) -> Scene:
    """Two to four different objects of any size anywhere, no two of which make up a held-out combination.

    For training answers only: neither drawn nor asked about in evaluation. There are too many of them to be known by heart,
    so what is asked has to be looked up in the picture.
    """
    kinds = list(itertools.product(COLORS, SHAPES))
    while True:
        objects = tuple(Object(*kind, "anywhere") for kind in rng.sample(kinds, rng.randint(2, 4)))
        points: list[tuple[float, float, float]] = []
        for _ in range(40):
            radius = rng.uniform(*SCATTERED_RADII)
            x, y = (rng.uniform(radius + 1, SIZE - radius - 1) for _ in range(2))
            if all(math.hypot(x - a, y - b) >= radius + r + SCATTERED_GAP for a, b, r in points):
                points.append((x, y, radius))
            if len(points) == len(objects):
                break
        if len(points) < len(objects):
            continue
        scene = Scene(objects, tuple(points))
        pairs = (scene.pair(i, j) for i, j in itertools.combinations(range(len(objects)), 2))
        if not any(pair is not None and is_held_out(pair) for pair in pairs):
            return scene


def captions(scene: Scene) -> list[str]:
    """What a scene may be called when it is to be drawn."""
    first = scene.objects[0]
    if len(scene.objects) == 1:
        plain = [f"a {first.name}"] if first.place == "center" else []
        return [*plain, f"a {first.name} {_WHERE[first.place]}"]
    second, relation = scene.objects[1], scene.relation(0, 1)
    assert relation is not None
    return [
        f"a {first.name} {_SAID[relation]} a {second.name}",
        f"a {second.name} {_SAID[_OPPOSITE[relation]]} a {first.name}",
    ]


def description(scene: Scene) -> Question:
    """All of a scene, for training only: every word of the answer has to belong to the right object."""
    return Question("description", "what objects are there ?", captions(scene)[-1 if len(scene.objects) == 1 else 0])


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of each kind that the scene allows, in a random wording; yes and no are equally likely."""
    result = []
    if len(scene.objects) <= 2:
        result.append(Question("count", "how many objects are there ?", "one" if len(scene.objects) == 1 else "two"))
    asked = rng.choice(scene.objects)
    others = [o for o in scene.objects if o is not asked]
    if all(o.shape != asked.shape for o in others):
        result.append(Question("color", f"what color is the {asked.shape} ?", asked.color))
    if all(o.color != asked.color for o in others):
        result.append(Question("shape", f"what shape is the {asked.color} object ?", asked.shape))
    if others:
        other = rng.choice(others) if len(others) > 1 else others[0]
        relation = scene.relation(scene.objects.index(asked), scene.objects.index(other))
        if relation is not None:
            result.append(Question("relation", f"where is the {asked.name} relative to the {other.name} ?", relation))
            claimed = relation if rng.random() < 0.5 else rng.choice([r for r in _OPPOSITE if r != relation])
            text = f"is the {asked.name} {_SAID[claimed]} the {other.name} ?"
            result.append(Question("yes/no", text, "yes" if claimed == relation else "no"))
    else:
        result.append(Question("relation", f"where is the {asked.shape} ?", asked.place))
    if all(question.kind != "yes/no" for question in result) or rng.random() < 0.5:
        name, answer = asked.name, "yes"
        if rng.random() < 0.5:
            present = {o.name for o in scene.objects}
            name = rng.choice([f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in present])
            answer = "no"
        if result and result[-1].kind == "yes/no":
            result.pop()
        result.append(Question("yes/no", f"is there a {name} ?", answer))
    return result


def render(scene: Scene, rng: random.Random | None = None, loose: bool = False, supersample: int = 4) -> np.ndarray:
    """Draw a scene: uint8 [SIZE, SIZE, 3]. With `rng` places and sizes vary, without they are exact.

    loose: vary them much more, and colours too. Answers are trained on such pictures: what is asked about does not depend
    on the exact place, and a model that may not rely on it learns to look instead of knowing every scene by heart.
    """
    place_jitter, size_jitter = (LOOSE_PLACE_JITTER, LOOSE_SIZE_JITTER) if loose else (PLACE_JITTER, SIZE_JITTER)
    side = SIZE * supersample
    axis = (np.arange(side) + 0.5) / supersample
    x, y = axis[None, :], axis[:, None]
    image = np.empty((side, side, 3), dtype=np.float32)
    image[:] = BACKGROUND
    shift = (0.0, 0.0)
    if loose and rng is not None and scene.points is None and len(scene.objects) == 2:
        across = rng.uniform(-LOOSE_SHIFT, LOOSE_SHIFT)
        shift = (0.0, across) if scene.relation(0, 1) == "left" else (across, 0.0)
    for number, item in enumerate(scene.objects):
        if scene.points is None:
            cx, cy = (at + by for at, by in zip(PLACES[item.place], shift, strict=True))
            radius = RADIUS
        else:
            cx, cy, radius = scene.points[number]
        color = np.array(COLORS[item.color], dtype=np.float32)
        if rng is not None and scene.points is None:
            cx, cy = cx + rng.uniform(-place_jitter, place_jitter), cy + rng.uniform(-place_jitter, place_jitter)
            radius *= 1 + rng.uniform(-size_jitter, size_jitter)
        if loose and rng is not None:
            varied = [c + rng.uniform(-LOOSE_COLOR_JITTER, LOOSE_COLOR_JITTER) for c in color]
            color = np.clip(np.array(varied, dtype=np.float32), 0, 255)
        image[_inside(item.shape, x - cx, y - cy, radius)] = color
    return image.reshape(SIZE, supersample, SIZE, supersample, 3).mean((1, 3)).round().astype(np.uint8)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        half = 0.9 * radius
        return (np.abs(x) <= half) & (np.abs(y) <= half)
    top, height = -0.95 * radius, 1.9 * radius
    return (y >= top) & (y <= top + height) & (np.abs(x) <= (y - top) / height * 1.1 * radius)
