"""The world the embedded model lives in: procedural scenes, how they look, and what is said and asked about them.

One or two coloured shapes on a plain ground. One object stands in the centre or at one of four sides; two stand left and
right or one above the other. Places and sizes vary by a pixel or two. A scene's combination of objects and places decides
by a hash whether it belongs to training or is held out, so held-out combinations are never trained on.
"""

from __future__ import annotations

import hashlib
import itertools
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
    "crowded_scene",
    "description",
    "is_held_out",
    "questions",
    "render",
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
# Three in a line are smaller and further apart.
CENTER = SIZE / 2
CROWDED_SPREAD = 1.45
CROWDED_RADIUS = 6.5
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
    """One object, or several in a line: from left to right or from top to bottom."""

    objects: tuple[Object, ...]

    @property
    def key(self) -> str:
        """The combination, as text."""
        return " + ".join(f"{o.name} {o.place}" for o in self.objects)

    @property
    def relation(self) -> str | None:
        """How an object lies to the ones after it: 'left' or 'above'."""
        if len(self.objects) < 2:
            return None
        return "left" if self.objects[0].place == "left" else "above"

    def pair(self, first: int, second: int) -> Scene:
        """The scene of two of the objects alone, at its two ends."""
        ends = ("left", "right") if self.relation == "left" else ("top", "bottom")
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


def crowded_scene(rng: random.Random) -> Scene:
    """Three different objects in a line, no two of which make up a held-out combination.

    For training answers only: neither drawn nor asked about in evaluation. They are many more combinations than one or two
    objects have, too many to be known by heart.
    """
    kinds = list(itertools.product(COLORS, SHAPES))
    while True:
        places = rng.choice([("left", "center", "right"), ("top", "center", "bottom")])
        scene = Scene(tuple(Object(*kind, place) for kind, place in zip(rng.sample(kinds, 3), places, strict=True)))
        if not any(is_held_out(scene.pair(i, j)) for i, j in itertools.combinations(range(3), 2)):
            return scene


def captions(scene: Scene) -> list[str]:
    """What a scene may be called when it is to be drawn."""
    first = scene.objects[0]
    relation = scene.relation
    if relation is None:
        plain = [f"a {first.name}"] if first.place == "center" else []
        return [*plain, f"a {first.name} {_WHERE[first.place]}"]
    second = scene.objects[1]
    return [
        f"a {first.name} {_SAID[relation]} a {second.name}",
        f"a {second.name} {_SAID[_OPPOSITE[relation]]} a {first.name}",
    ]


def description(scene: Scene) -> Question:
    """All of a scene, for training only: every word of the answer has to belong to the right object."""
    relation = scene.relation
    if relation is None:
        text = captions(scene)[-1]
    else:
        text = f" {_SAID[relation]} ".join(f"a {o.name}" for o in scene.objects)
    return Question("description", "what objects are there ?", text)


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
        before = scene.objects.index(asked) < scene.objects.index(other)
        relation = scene.relation if before else _OPPOSITE[scene.relation or ""]
        assert relation is not None
        result.append(Question("relation", f"where is the {asked.name} relative to the {other.name} ?", relation))
        claimed = relation if rng.random() < 0.5 else rng.choice([r for r in _OPPOSITE if r != relation])
        text = f"is the {asked.name} {_SAID[claimed]} the {other.name} ?"
        result.append(Question("yes/no", text, "yes" if claimed == relation else "no"))
    else:
        result.append(Question("relation", f"where is the {asked.shape} ?", asked.place))
    if not others or rng.random() < 0.5:
        name, answer = asked.name, "yes"
        if rng.random() < 0.5:
            present = {o.name for o in scene.objects}
            name = rng.choice([f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in present])
            answer = "no"
        if others:
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
    across = rng.uniform(-LOOSE_SHIFT, LOOSE_SHIFT) if loose and rng is not None and scene.relation else 0.0
    shift = (0.0, across) if scene.relation == "left" else (across, 0.0)
    crowded = len(scene.objects) > 2
    if crowded:
        place_jitter, size_jitter = PLACE_JITTER, SIZE_JITTER
    for item in scene.objects:
        cx, cy = (at + by for at, by in zip(PLACES[item.place], shift, strict=True))
        radius = RADIUS
        if crowded:
            cx, cy, radius = (
                CENTER + CROWDED_SPREAD * (cx - CENTER),
                CENTER + CROWDED_SPREAD * (cy - CENTER),
                CROWDED_RADIUS,
            )
        color = np.array(COLORS[item.color], dtype=np.float32)
        if rng is not None:
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
