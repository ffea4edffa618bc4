"""Do the tasks use neurons of their own? Overlap of their critical sets, from plans alone: nothing is drawn or judged.

Only scores of the same weights can be compared. Where drawing has experts of its own (BAGEL) the two tasks have no FFN in common,
and their rankings mean nothing to each other. What is compared there is the text's expert: as answers use it, and as drawings do
for their prompts and markers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibrate import calibrate
from ..models.adapter import adapter_of
from ..planning.plan import TaskPlan

__all__ = [
    "FRACTIONS",
    "PROMPTS",
    "TASKS",
    "Overlap",
    "Specialisation",
    "expected_jaccard",
    "jaccard",
    "measure",
    "overlaps",
]

TASKS = ("generation", "understanding")
PROMPTS = "prompts"
"""The task of a drawing's tokens that its experts do not compute."""
FRACTIONS = (0.05, 0.1, 0.2, 0.4)
"""Sizes of critical sets, as fractions of a layer's neurons."""
STATED = (0.1, 0.2)
"""Those that a verdict is about."""


@dataclass(frozen=True)
class Overlap:
    """How much two critical sets of one size have in common, per layer.

    Attributes:
        tasks: Jaccard index of the two tasks' sets. halves: of one task's sets from two halves of its samples, by task: what
            sampling alone leaves of an overlap of 1. expected: of two random sets.
    """

    fraction: float
    tasks: tuple[float, ...]
    halves: Mapping[str, tuple[float, ...]]
    expected: float

    @property
    def mean(self) -> float:
        return sum(self.tasks) / len(self.tasks)

    def mean_half(self, task: str) -> float:
        return sum(self.halves[task]) / len(self.halves[task])


@dataclass(frozen=True)
class Specialisation:
    """What the plans of a model and of two halves of its samples say.

    Attributes:
        plan: of all samples; with experts it has a task `PROMPTS` too.
        pair: the two tasks that score the same weights.
        overlaps: of their critical sets, by fraction.
    """

    plan: TaskPlan
    pair: tuple[str, str]
    overlaps: list[Overlap]

    @property
    def experts(self) -> bool:
        """Whether drawing has experts of its own."""
        return self.pair != TASKS

    def verdicts(self) -> list[str]:
        """Sentences from the numbers."""
        sentences = []
        names = (
            f"the text expert's critical sets of {' and '.join(self.pair)}"
            if self.experts
            else "the tasks' critical sets"
        )
        for overlap in self.overlaps:
            if overlap.fraction not in STATED:
                continue
            floor = min(overlap.mean_half(task) for task in self.pair)
            if overlap.mean < 0.75 * floor:
                text = f"{names} differ by far more than sampling does: specialised"
            elif overlap.mean < floor:
                text = f"{names} differ a little more than sampling does: weakly specialised"
            else:
                text = f"{names} differ no more than sampling does: not specialised"
            sentences.append(
                f"Critical {100 * overlap.fraction:.0f} %: Jaccard {overlap.mean:.2f} between the tasks, {floor:.2f} or more "
                f"between halves of one task's samples, {overlap.expected:.2f} for random sets; {text}."
            )
        return sentences


def measure(
    model: Any, generation: Sequence[Any], understanding: Sequence[Any], *, seed: int = 0, progress: bool = True
) -> Specialisation:
    """Score a model's neurons from all samples and from two halves of them, and compare the critical sets.

    Args:
        model: of a family, not accelerated.
        generation, understanding: its calibration samples, at least two of each.
        seed: of the noise.
        progress: show a progress bar.

    Raises:
        ValueError: fewer samples. Also what `calibrate` raises.
    """
    samples: dict[str, Sequence[Any]] = dict(zip(TASKS, (generation, understanding), strict=True))
    for task, own in samples.items():
        if len(own) < 2:
            raise ValueError(f"{task}: expected at least 2 samples, a half each, got {len(own)}")
    pair = TASKS
    if len(adapter_of(model).experts):
        samples[PROMPTS] = [each.prompt() for each in generation]
        pair = (PROMPTS, TASKS[1])

    def plan_of(half: int | None) -> TaskPlan:
        taken = {task: own if half is None else own[_half(own, half)] for task, own in samples.items()}
        return calibrate(model, tasks=taken, seed=seed, progress=progress)

    plan = plan_of(None)
    return Specialisation(plan, pair, overlaps(plan, [plan_of(0), plan_of(1)], pair=pair))


def _half(samples: Sequence[Any], which: int) -> slice:
    middle = len(samples) // 2
    return slice(middle) if which == 0 else slice(middle, None)


# ---- sets


def jaccard(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two index sets [n], [m]."""
    first, second = set(a.tolist()), set(b.tolist())
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def expected_jaccard(total: int, size: int) -> float:
    """Mean Jaccard index of two random sets of `size` out of `total`: the intersection is hypergeometric."""
    if not 0 < size <= total:
        raise ValueError(f"size: expected 1 to {total}, got {size}")

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    whole = log_choose(total, size)
    return sum(
        math.exp(log_choose(size, common) + log_choose(total - size, size - common) - whole)
        * common
        / (2 * size - common)
        for common in range(max(0, 2 * size - total), size + 1)
    )


def overlaps(
    plan: TaskPlan,
    halves: Sequence[TaskPlan],
    fractions: Sequence[float] = FRACTIONS,
    pair: tuple[str, str] = TASKS,
) -> list[Overlap]:
    """Overlap of two tasks' most important neurons, by fraction.

    Args:
        plan: scores from all samples. halves: scores from two disjoint halves of them.
        pair: the tasks, which score the same weights.
    """
    result = []
    for fraction in fractions:
        size = max(1, round(plan.intermediate * fraction))

        def critical(of: TaskPlan, task: str, layer: int, size: int = size) -> Tensor:
            return torch.topk(of.scores[task][layer], size).indices

        layers = range(plan.layers)
        result.append(
            Overlap(
                fraction=fraction,
                tasks=tuple(jaccard(critical(plan, pair[0], i), critical(plan, pair[1], i)) for i in layers),
                halves={
                    task: tuple(jaccard(critical(halves[0], task, i), critical(halves[1], task, i)) for i in layers)
                    for task in pair
                },
                expected=expected_jaccard(plan.intermediate, size),
            )
        )
    return result
