"""Runs one probe under many settings: fidelity of every output, and times interleaved in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..models.adapter import adapter_of
from ..nano.evaluate import Proportion
from ..nano.probe import Outputs, Probe
from ..nano.subject import subject_of
from ..planning.config import FlashUConfig
from ..planning.cost import dense_flops, image_flops
from ..planning.plan import TaskPlan
from ..planning.schedule import StepPlan
from ..runtime.handle import accelerate
from . import fidelity

__all__ = ["Point", "Setting", "Timed", "compare", "equal_proportion", "running", "time_round"]


@dataclass(frozen=True)
class Setting:
    """A named config; None: dense with `steps` grid points. group: its series in plots."""

    name: str
    group: str
    config: FlashUConfig | None
    steps: int | None = None


@dataclass
class Point:
    """Measured cost and fidelity of a setting.

    Attributes:
        image_seconds, answer_seconds: of single images and answers, one per round.
        flops: per image, from shapes.
        psnr (dB), ssim, lpips: means against dense at the same noise; lpips None where it cannot be computed.
        equal_answers: answers equal to dense's token for token.
    """

    name: str
    group: str
    config: str
    grid_points: int
    flops: float
    adherence: Proportion
    accuracy: Proportion
    equal_answers: Proportion
    psnr: float
    ssim: float
    lpips: float | None
    image_seconds: list[float] = field(default_factory=list)
    answer_seconds: list[float] = field(default_factory=list)

    @property
    def image_time(self) -> float:
        return statistics.median(self.image_seconds)

    @property
    def answer_time(self) -> float:
        return statistics.median(self.answer_seconds)


@contextmanager
def running(model: Any, config: FlashUConfig | None, plan: TaskPlan | None) -> Iterator[Any]:
    """A context with the model under a config and its plan: a new handle, or None for dense."""
    if config is None:
        yield None
        return
    if plan is not None:
        plan = plan.with_pruning(config.ffn)
    with accelerate(model, config, plan) as handle:
        yield handle


def equal_proportion(outputs: Outputs, dense: Outputs) -> Proportion:
    """Answers equal to dense's, token for token."""
    equal = [a == b for a, b in zip(outputs.tokens, dense.tokens, strict=True)]
    return Proportion(sum(equal), len(equal))


def compare(
    model: Any,
    settings: Sequence[Setting],
    probe: Probe,
    plan: TaskPlan | None,
    *,
    repeats: int = 5,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Point]:
    """Run every setting on the probe, then time single images and answers, in a new order each round.

    Args:
        settings: the first is dense at full steps, the reference.
        plan: neuron scores, for settings that prune.
        advance: called with a number of outputs; len(settings) * (drawings + questions + repeats) in all.

    Raises:
        ValueError: the first setting is not dense, or the probe has no prompt or no question.
    """
    if not settings or settings[0].config is not None:
        raise ValueError("settings: expected dense first")
    if not probe.prompts or not probe.asked:
        raise ValueError(f"probe: expected drawings and questions, got {len(probe.prompts)} and {len(probe.asked)}")
    outputs: list[Outputs] = []
    for setting in settings:
        with running(model, setting.config, plan):
            outputs.append(probe.perform(model, advance, setting.steps))
    points = [_point(model, s, probe, own, outputs[0]) for s, own in zip(settings, outputs, strict=True)]
    order = random.Random(seed)
    for turn in range(repeats):
        for setting, point in order.sample(list(zip(settings, points, strict=True)), len(settings)):
            with running(model, setting.config, plan):
                time_round(model, probe, turn, point, setting.steps)
            advance(1)
    return points


class Timed(Protocol):
    """Has lists for times of single images and answers."""

    image_seconds: list[float]
    answer_seconds: list[float]


def time_round(model: Any, probe: Probe, turn: int, into: Timed, steps: int | None = None) -> None:
    """Time one image and one answer; in round `turn` all settings have the same prompt and question."""
    start = time.perf_counter()
    probe.generate(model, [turn % len(probe.prompts)], steps)
    into.image_seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    probe.ask(model, turn % len(probe.asked))
    into.answer_seconds.append(time.perf_counter() - start)


def _point(model: Any, setting: Setting, probe: Probe, own: Outputs, dense: Outputs) -> Point:
    shape = adapter_of(model).shape()
    subject = subject_of(model)
    geometry = subject.geometry(probe.prompts[0])
    if setting.config is None:
        steps = setting.steps or 50
        flops = dense_flops(shape, geometry, steps - 1)
    else:
        plan = StepPlan.build(
            setting.config, setting.steps, len(shape.layers), subject.guidance, geometry.span - shape.time_token
        )
        steps = plan.grid_points
        flops = image_flops(shape, plan, geometry)
    perceptual = fidelity.lpips(own.images, dense.images)
    return Point(
        name=setting.name,
        group=setting.group,
        config="" if setting.config is None else setting.config.to_json(),
        grid_points=steps,
        flops=flops,
        adherence=probe.adherence(own),
        accuracy=probe.accuracy(own),
        equal_answers=equal_proportion(own, dense),
        psnr=fidelity.mean(fidelity.psnr(own.images, dense.images)),
        ssim=fidelity.mean(fidelity.ssim(own.images, dense.images)),
        lpips=None if perceptual is None else fidelity.mean(perceptual),
    )
