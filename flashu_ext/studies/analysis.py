"""Is a unified model specialised? Neuron sets per task, what removing them does, and where work repeats.

Measures on the embedded model what the Flash-Unified paper (arXiv 2603.15271, sections 3.1 and 3.2) claims of Show-o2. All
numbers come with n and an interval, and the verdicts follow from the numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..calibration.calibrate import GenerationSample, UnderstandingSample, calibrate
from ..models.adapter import adapter_of
from ..nano.evaluate import Proportion
from ..nano.probe import Probe
from ..nano.showo2 import SHIFT, SUBJECT
from ..ops import machine
from ..planning.config import FlashUConfig
from ..planning.plan import TaskPlan
from ..runtime.handle import accelerate

__all__ = ["Analysis", "Drift", "Overlap", "Removal", "expected_jaccard", "jaccard", "run"]

TASKS = ("generation", "understanding")
FRACTIONS = (0.05, 0.1, 0.2, 0.4)
"""Sizes of critical sets, as fractions of a layer's neurons."""
REMOVED = (0.05, 0.1, 0.2)
STEPS = 30


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
class Removal:
    """Both tasks without a set of neurons. of: the set's name; fraction: of each layer."""

    of: str
    fraction: float
    adherence: Proportion
    accuracy: Proportion


@dataclass(frozen=True)
class Drift:
    """How far the head's output moves from one evaluation to the next: medians over images, one per evaluation."""

    relative_l1: tuple[float, ...]
    relative_l2: tuple[float, ...]
    cosine: tuple[float, ...]


@dataclass
class Analysis:
    """Everything that the page shows.

    Attributes:
        intact: both tasks with all neurons. importance: task -> [times][layers], 1 - cosine(input, output).
        times: times of the rows of importance['generation'].
    """

    model: str
    command: str
    machine: Mapping[str, str]
    seconds: float
    layers: int
    intermediate: int
    samples: int
    overlaps: list[Overlap]
    intact: Removal
    removals: list[Removal]
    importance: Mapping[str, list[list[float]]]
    times: list[float]
    drift: Drift
    verdicts: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


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


def overlaps(plan: TaskPlan, halves: Sequence[TaskPlan], fractions: Sequence[float] = FRACTIONS) -> list[Overlap]:
    """Overlap of the tasks' most important neurons, by fraction.

    Args:
        plan: scores from all samples. halves: scores from two disjoint halves of them.
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
                tasks=tuple(jaccard(critical(plan, TASKS[0], i), critical(plan, TASKS[1], i)) for i in layers),
                halves={
                    task: tuple(jaccard(critical(halves[0], task, i), critical(halves[1], task, i)) for i in layers)
                    for task in TASKS
                },
                expected=expected_jaccard(plan.intermediate, size),
            )
        )
    return result


# ---- removal


def _without(plan: TaskPlan, of: str, fraction: float, seed: int) -> TaskPlan:
    """A plan under which both tasks run without the named neurons of every layer."""
    if of == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        scores = torch.rand(plan.layers, plan.intermediate, generator=generator, dtype=torch.float32, device="cpu")
    else:
        task, end = of.split(":")
        # The lowest scores are pruned, so the reversed order removes the critical ones.
        scores = plan.scores[task] * (-1.0 if end == "most" else 1.0)
    return TaskPlan(dict.fromkeys(TASKS, scores), fraction, 1, plan.fingerprint)


def _measure(model: Any, probe: Probe, of: str, fraction: float, advance: Callable[[int], Any]) -> Removal:
    outputs = probe.perform(model, advance, steps=STEPS)
    return Removal(of, fraction, probe.adherence(outputs), probe.accuracy(outputs))


REMOVED_SETS = (
    "generation:most",
    "understanding:most",
    "random",
    "generation:least",
    "understanding:least",
)
"""Whose neurons are removed: the most or the least important ones of a task, or random ones."""


# ---- drift


def _drift(model: Any, probe: Probe, count: int) -> Drift:
    """Differences of the head's last block over the image span, from evaluation to evaluation, for each image."""
    parts = adapter_of(model)
    states: list[Tensor] = []
    from ..models.showo2.sampling import sample
    from ..nano.tokenizer import layout

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).detach().float().clone())

    rows: list[list[tuple[float, ...]]] = []
    for number in range(count):
        inputs = layout().generation([probe.prompts[number]])
        offset, length = inputs.modality_positions[0, 0].tolist()
        states.clear()
        hook = parts.blocks[-1].register_forward_hook(keep)
        try:
            noise = probe.noise[number : number + 1]
            sample(
                model, noise, **vars(inputs), steps=STEPS, guidance_scale=SUBJECT.guidance, time_shifting_factor=SHIFT
            )
        finally:
            hook.remove()
        spans = [state[0, offset : offset + length].contiguous() for state in states]
        rows.append([tuple(ops.feature_delta(b, a).tolist()) for a, b in itertools.pairwise(spans)])
    columns = torch.tensor(rows, dtype=torch.float64).median(dim=0).values
    return Drift(*(tuple(columns[:, k].tolist()) for k in range(3)))


# ---- all of it


def run(
    model: Any,
    samples: Callable[[int, int], tuple[list[GenerationSample], list[UnderstandingSample]]],
    *,
    count: int = 80,
    drawings: int = 60,
    questions: int = 150,
    seed: int = 0,
    removed: Sequence[float] = REMOVED,
    model_name: str = "nano",
    progress: bool = True,
) -> Analysis:
    """Analyse the embedded model (or a checkpoint trained on its world).

    Args:
        model: a model that is not accelerated.
        samples: (count, seed) -> calibration samples of both tasks.
        count: calibration samples of each task. drawings, questions: held-out ones per measurement.
        removed: fractions of every layer's neurons to remove.
        seed: of everything random.
        progress: show a progress bar.
    """
    began = time.perf_counter()
    generation, understanding = samples(count, seed)
    half = count // 2
    plan = calibrate(model, generation, understanding, seed=seed, progress=progress)
    halves = [
        calibrate(model, generation[part], understanding[part], seed=seed, progress=progress)
        for part in (slice(half), slice(half, None))
    ]
    probe = Probe.build(drawings, questions, seed)
    runs = 1 + len(REMOVED_SETS) * len(removed)
    removals = []
    with _bar(runs * (drawings + questions), progress) as advance:
        intact = _measure(model, probe, "nothing", 0.0, advance)
        for fraction in removed:
            for of in REMOVED_SETS:
                config = FlashUConfig(ffn_prune_ratio=fraction, prune_multiple=1)
                with accelerate(model, config, _without(plan, of, fraction, seed)):
                    removals.append(_measure(model, probe, of, fraction, advance))
    result = Analysis(
        model=model_name,
        command=machine.command_line(),
        machine=machine.facts(),
        seconds=0.0,
        layers=plan.layers,
        intermediate=plan.intermediate,
        samples=count,
        overlaps=overlaps(plan, halves),
        intact=intact,
        removals=removals,
        importance={task: table.tolist() for task, table in plan.layer_importance.items()},
        times=list(plan.times),
        drift=_drift(model, probe, min(8, drawings)),
    )
    result.verdicts = verdicts(result)
    result.seconds = time.perf_counter() - began
    return result


def verdicts(result: Analysis) -> list[str]:
    """Conclusions about the paper's findings from the numbers, also negative ones."""
    sentences = []
    for overlap in result.overlaps:
        if overlap.fraction not in (0.1, 0.2):
            continue
        floor = min(overlap.mean_half(task) for task in TASKS)
        if overlap.mean < 0.75 * floor:
            text = "the tasks' critical sets differ by far more than sampling does: specialised"
        elif overlap.mean < floor:
            text = "the tasks' critical sets differ a little more than sampling does: weakly specialised"
        else:
            text = "the tasks' critical sets differ no more than sampling does: not specialised"
        sentences.append(
            f"Critical {100 * overlap.fraction:.0f} %: Jaccard {overlap.mean:.2f} between the tasks, {floor:.2f} or more between "
            f"halves of one task's samples, {overlap.expected:.2f} for random sets; {text}."
        )
    for fraction in dict.fromkeys(r.fraction for r in result.removals):
        found = {r.of: r for r in result.removals if r.fraction == fraction}
        cross = [
            ("generation's critical neurons", found["generation:most"], "adherence", "accuracy"),
            ("understanding's critical neurons", found["understanding:most"], "accuracy", "adherence"),
        ]
        for name, removal, own, other in cross:
            lost_own = getattr(result.intact, own).value - getattr(removal, own).value
            lost_other = getattr(result.intact, other).value - getattr(removal, other).value
            sentences.append(
                f"Without {name} ({100 * fraction:.0f} %): {own} falls by {100 * lost_own:.0f} points, {other} by "
                f"{100 * lost_other:.0f}; {_compare(lost_own, lost_other)}."
            )
    least = [r for r in result.removals if r.of.endswith("least")]
    own_pairs = [(r, "adherence" if r.of.startswith("generation") else "accuracy") for r in least]
    held = [r for r, own in own_pairs if not _below(getattr(r, own), getattr(result.intact, own))]
    sentences.append(
        f"Without a task's least important neurons its own measure stays within the interval in {len(held)} of "
        f"{len(least)} cases."
    )
    return sentences


def _compare(own: float, other: float) -> str:
    if own > other + 0.1:
        return "it hurts its own task more, as the paper says"
    if other > own + 0.1:
        return "it hurts the other task more, against the paper"
    return "it hurts both tasks alike, which the paper does not say"


def _below(share: Proportion, reference: Proportion) -> bool:
    """Whether a share is lower than the reference, with disjoint intervals."""
    return share.interval[1] < reference.interval[0]


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    with tqdm(total=total, desc="analyze", unit="output", disable=not progress) as bar:
        yield bar.update
