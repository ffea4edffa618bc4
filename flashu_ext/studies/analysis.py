"""Is a unified model specialised? Neuron sets per task, what removing them does, and where work repeats.

Measures on a model with a world of its own (`worlds.World`) what the Flash-Unified paper (arXiv 2603.15271, sections 3.1 and 3.2)
claims of Show-o2. All numbers come with n and an interval, and the verdicts follow from the numbers. What needs no world is in
`specialisation`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.adapter import adapter_of
from ..nano.evaluate import Proportion
from ..ops import machine
from ..planning.plan import TaskPlan
from ..runtime.handle import accelerate
from .specialisation import PROMPTS, TASKS, Overlap
from .specialisation import measure as measure_overlaps
from .worlds import World

__all__ = ["Analysis", "Drift", "Removal", "run"]

REMOVED = (0.05, 0.1, 0.2)
MEASURES = {"generation": "adherence", PROMPTS: "adherence", "understanding": "accuracy"}
"""What each task is for."""


@dataclass(frozen=True)
class Removal:
    """Both tasks without a set of neurons. of: the set's name; fraction: of each layer."""

    of: str
    fraction: float
    adherence: Proportion
    accuracy: Proportion


@dataclass(frozen=True)
class Drift:
    """How far what the head's cache keeps moves from one evaluation to the next: medians over images, one per evaluation."""

    relative_l1: tuple[float, ...]
    relative_l2: tuple[float, ...]
    cosine: tuple[float, ...]


@dataclass
class Analysis:
    """Everything that the page shows.

    Attributes:
        pair: the tasks that `overlaps` compares. intact: both tasks with all neurons.
        importance: task -> [times][layers], 1 - cosine(input, output). times: of the rows of importance['generation'].
        drift: None where the world does not measure it.
    """

    model: str
    command: str
    machine: Mapping[str, str]
    seconds: float
    layers: int
    intermediate: int
    samples: int
    pair: tuple[str, str]
    overlaps: list[Overlap]
    intact: Removal
    removals: list[Removal]
    importance: Mapping[str, list[list[float]]]
    times: list[float]
    drift: Drift | None
    verdicts: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


# ---- removal


def removed_sets(pair: tuple[str, str]) -> tuple[str, ...]:
    """Whose neurons are removed: the most or the least important ones of a task, or random ones."""
    tasks = tuple(dict.fromkeys((TASKS[0], *pair)))
    return (*(f"{task}:most" for task in tasks), "random", *(f"{task}:least" for task in tasks))


def chosen(plan: TaskPlan, of: str, fraction: float, seed: int) -> Tensor:
    """The neurons of a set, int64 [layers, n]."""
    task, _, end = of.partition(":")
    if task == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        scores = torch.rand(plan.layers, plan.intermediate, generator=generator, dtype=torch.float32, device="cpu")
    else:
        scores = plan.scores[task]
    return torch.topk(scores, int(plan.intermediate * fraction), largest=end == "most").indices


@contextmanager
def without(model: Any, plan: TaskPlan, of: str, fraction: float, seed: int) -> Iterator[None]:
    """A context in which no task has the neurons of a set: their weights in W_down are zero. Where drawing has experts, a set of
    drawings is the drawing experts', and any other one the text's."""
    parts = adapter_of(model)
    layers = parts.experts if len(parts.experts) and of.partition(":")[0] == TASKS[0] else parts.layers
    weights = [layer.mlp.down_proj.weight.detach() for layer in layers]
    sets = [neurons.to(weights[0].device) for neurons in chosen(plan, of, fraction, seed)]
    kept = [weight[:, neurons].clone() for weight, neurons in zip(weights, sets, strict=True)]
    try:
        for weight, neurons in zip(weights, sets, strict=True):
            weight[:, neurons] = 0
        yield
    finally:
        for weight, neurons, values in zip(weights, sets, kept, strict=True):
            weight[:, neurons] = values


def _measure(model: Any, world: World, of: str, fraction: float, advance: Callable[[int], Any]) -> Removal:
    """Of a model as it is now."""
    with accelerate(model):
        return Removal(of, fraction, world.draw(model, advance), world.answer(model, advance))


# ---- drift


def _drift(drawings: Sequence[Sequence[Tensor]]) -> Drift | None:
    """Differences from evaluation to evaluation, for each drawing's states."""
    if not drawings:
        return None
    rows = [[tuple(ops.feature_delta(b, a).tolist()) for a, b in itertools.pairwise(states)] for states in drawings]
    columns = torch.tensor(rows, dtype=torch.float64).median(dim=0).values
    return Drift(*(tuple(columns[:, k].tolist()) for k in range(3)))


# ---- all of it


def run(
    model: Any,
    world: World,
    *,
    count: int = 80,
    seed: int = 0,
    removed: Sequence[float] = REMOVED,
    model_name: str = "nano",
    progress: bool = True,
) -> Analysis:
    """Analyse a model in its world.

    Args:
        model: a model that is not accelerated.
        world: what is drawn, asked and judged.
        count: calibration samples of each task.
        removed: fractions of every layer's neurons to remove.
        seed: of everything random.
        progress: show a progress bar.

    Raises:
        ValueError: count is below 2. Also what `calibrate` raises.
    """
    began = time.perf_counter()
    found = measure_overlaps(model, *world.samples(count, seed), seed=seed, progress=progress)
    plan, sets = found.plan, removed_sets(found.pair)
    removals = []
    with _bar((1 + len(sets) * len(removed)) * (world.drawings + world.questions), progress) as advance:
        intact = _measure(model, world, "nothing", 0.0, advance)
        for fraction in removed:
            for of in sets:
                with without(model, plan, of, fraction, seed):
                    removals.append(_measure(model, world, of, fraction, advance))
    result = Analysis(
        model=model_name,
        command=machine.command_line(),
        machine=machine.facts(),
        seconds=0.0,
        layers=plan.layers,
        intermediate=plan.intermediate,
        samples=count,
        pair=found.pair,
        overlaps=found.overlaps,
        intact=intact,
        removals=removals,
        importance={task: plan.layer_importance[task].tolist() for task in TASKS},
        times=list(plan.times),
        drift=_drift(world.states(model, min(8, world.drawings))),
    )
    result.verdicts = [*found.verdicts(), *verdicts(result)]
    result.seconds = time.perf_counter() - began
    return result


def verdicts(result: Analysis) -> list[str]:
    """Conclusions about removals from the numbers, also negative ones."""
    experts, sentences = result.pair != TASKS, []
    for fraction in dict.fromkeys(r.fraction for r in result.removals):
        found = {r.of: r for r in result.removals if r.fraction == fraction}
        for task in dict.fromkeys((TASKS[0], *result.pair)):
            removal, own = found[f"{task}:most"], MEASURES[task]
            other = "accuracy" if own == "adherence" else "adherence"
            lost_own, lost_other = (
                getattr(result.intact, name).value - getattr(removal, name).value for name in (own, other)
            )
            if not experts:
                text = _compare(lost_own, lost_other)
            elif task == TASKS[0]:
                text = "no answer uses the drawing experts"
            else:
                text = _shared(lost_other)
            sentences.append(
                f"Without {task}'s critical neurons ({100 * fraction:.0f} %): {own} falls by {100 * lost_own:.0f} points, "
                f"{other} by {100 * lost_other:.0f}; {text}."
            )
    least = [r for r in result.removals if r.of.endswith("least")]
    own_pairs = [(r, MEASURES[r.of.split(":")[0]]) for r in least]
    held = [r for r, own in own_pairs if not _below(getattr(r, own), getattr(result.intact, own))]
    sentences.append(
        f"Without a task's least important neurons its own measure stays within the interval in {len(held)} of "
        f"{len(least)} cases."
    )
    return sentences


def _shared(other: float) -> str:
    """Of the text experts, which both tasks use."""
    if other > 0.1:
        return "the other task needs them too: the split into experts separates less than the tasks' neurons would"
    return "the other task does without them"


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
