"""Searches the cheapest settings that reach a fidelity on training scenes, and reports on held-out ones.

Greedy: starting from exact settings, raise the knob that saves most by the machine's cost model, accept if the measured fidelity
is still reached, stop when no knob is left. All trials are recorded.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.adapter import adapter_of
from ..nano.evaluate import Proportion
from ..nano.probe import Probe
from ..nano.subject import subject_of
from ..ops import machine
from ..planning.config import FlashUConfig
from ..planning.cost import CostModel
from ..planning.plan import TaskPlan
from ..planning.safe_files import write_text
from .comparison import Point, Setting, compare, running

__all__ = ["IMAGE_KNOBS", "KNOBS", "Trial", "Tuned", "tune"]

Levels = Sequence[Mapping[str, Any]]

IMAGE_KNOBS: Mapping[str, Levels] = {
    "steps": [{"steps": n} for n in (50, 35, 25, 20, 16, 13, 11, 9)],
    "head cache": [
        {"head_cache_interval": 0},
        *(
            {"head_cache_interval": n, "head_forecast_order": 1, "full_network_steps": tail}
            for n, tail in ((2, 0.3), (3, 0.3), (3, 0.15), (4, 0.15))
        ),
    ],
    "encoder cache": [
        {"encoder_cache": False},
        *({"encoder_cache": True, "encoder_cache_interval": n} for n in (2, 4)),
    ],
    "neurons": [{"ffn_prune_ratio": ratio} for ratio in (0.0, 0.1, 0.2, 0.3, 0.4)],
    "skipped tokens": [
        {"token_skip": False},
        *({"token_skip": True, "token_skip_ratio": ratio, "token_skip_interval": 5} for ratio in (0.2, 0.4)),
    ],
}
ANSWER_KNOBS: Mapping[str, Levels] = {
    "visual tokens": [
        {"token_prune_ratio": ratio, "token_prune_score": "value_norm_small"} for ratio in (0.0, 0.25, 0.5, 0.7)
    ],
    "answer layers": [{"answer_layer_skip_ratio": ratio} for ratio in (0.0, 0.17, 0.34)],
}
KNOBS: Mapping[str, Levels] = {**IMAGE_KNOBS, **ANSWER_KNOBS}
"""Knob -> its levels, mildest first; the first level of each is exact. IMAGE_KNOBS are priced per image, the others per
answer."""

LEAST_SAVING = 0.02
"""Steps that save a smaller fraction of the predicted cost are not measured."""


@dataclass(frozen=True)
class Trial:
    """One measured step of the search.

    Attributes:
        seconds: of one image (predicted) or, for answer knobs, of one answer.
        before: the same without the step.
        accepted: it became the base of the next step.
    """

    knob: str
    level: int
    seconds: float
    before: float
    adherence: Proportion
    accuracy: Proportion
    accepted: bool


@dataclass
class Tuned:
    """The outcome. `points`: dense, exact, paper and the tuned settings, measured on held-out scenes."""

    fidelity: float
    config: FlashUConfig
    command: str
    machine: Mapping[str, str]
    trials: list[Trial]
    dense: tuple[Proportion, Proportion]
    points: list[Point] = field(default_factory=list)

    def to_json(self) -> str:
        record = dataclasses.asdict(self)
        record["config"] = json.loads(self.config.to_json())
        return json.dumps(record, indent=1, allow_nan=False) + "\n"

    def save(self, folder: Path, plan: TaskPlan) -> None:
        """Write config.json, plan.safetensors and tuning.json, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        plan.with_pruning(self.config.ffn).save(folder / "plan.safetensors")
        for name, text in (("config.json", self.config.to_json() + "\n"), ("tuning.json", self.to_json())):
            write_text(folder / name, text)

    def table(self) -> str:
        """Search and report as text."""
        lines = [f"{'knob':<15} {'level':<66} {'cost':>14} {'right drawings':>15} {'right answers':>14}"]
        for trial in self.trials:
            level = ", ".join(f"{k} {v}" for k, v in KNOBS[trial.knob][trial.level].items())
            cost = 100 * (trial.seconds / trial.before - 1)
            drawn, answered = 100 * trial.adherence.value, 100 * trial.accuracy.value
            verdict = "kept" if trial.accepted else "dropped"
            lines.append(
                f"{trial.knob:<15} {level:<66} {cost:>+12.1f} % {drawn:>13.1f} % {answered:>12.1f} %  {verdict}"
            )
        if self.points:
            lines += ["", "on the other split:"]
            base = self.points[0].image_time
            for point in self.points:
                lines.append(
                    f"  {point.name:<8} {1e3 * point.image_time:8.1f} ms/image ({base / point.image_time:.2f}x dense)  drawings "
                    f"{point.adherence}  answers {point.accuracy}"
                )
        return "\n".join(lines)


def tune(
    model: Any,
    plan: TaskPlan,
    fidelity: float = 0.99,
    *,
    base: FlashUConfig | None = None,
    paper: FlashUConfig | None = None,
    drawings: int = 96,
    questions: int = 120,
    report_drawings: int = 200,
    report_questions: int = 200,
    repeats: int = 9,
    seed: int = 0,
    knobs: Mapping[str, Levels] = KNOBS,
    progress: bool = True,
) -> Tuned:
    """Search settings for the embedded model (or a checkpoint trained on its world).

    Args:
        model: a model that is not accelerated.
        plan: its neuron scores for both tasks.
        fidelity: minimum correct images, and answers, as a fraction of dense's, in (0, 1].
        base: start of the search (default: exact).
        paper: a setting to report with the result.
        drawings, questions: of training scenes, for the search.
        report_drawings, report_questions: of held-out scenes, for the report.
        repeats: timed rounds of the report.
        knobs: knob -> levels, mildest first.

    Raises:
        ValueError: fidelity outside (0, 1].
    """
    if not 0 < fidelity <= 1:
        raise ValueError(f"fidelity: expected a number in (0, 1], got {fidelity!r}")
    config = base or FlashUConfig.exact(prune_multiple=plan.multiple)
    probe = Probe.build(drawings, questions, seed, "training")
    bar = _bar(progress)

    def advance(count: int) -> None:
        bar.update(count)

    dense = probe.perform(model, advance)
    reference = probe.adherence(dense), probe.accuracy(dense)

    def generate(settings: FlashUConfig, callback: Callable[[int, Any], None]) -> None:
        with running(model, settings, plan):
            probe.generate(model, [0], callback=callback)

    subject, shape = subject_of(model), adapter_of(model).shape()
    tokens = subject.geometry(probe.prompts[0]).span - shape.time_token
    costs = CostModel(generate, len(shape.layers), subject.guidance, tokens)

    answers: dict[FlashUConfig, float] = {}

    def price(knob: str, settings: FlashUConfig) -> float:
        if knob in IMAGE_KNOBS:
            return costs.seconds(settings)
        if settings not in answers:
            with running(model, settings, plan):
                answers[settings] = _answer_seconds(model, probe)
        return answers[settings]

    levels = dict.fromkeys(knobs, 0)
    trials: list[Trial] = []
    closed: set[str] = set()
    while True:
        offers = []
        for knob, options in knobs.items():
            if knob in closed or levels[knob] + 1 >= len(options):
                continue
            changed = config.replace(**options[levels[knob] + 1])
            now, then = price(knob, config), price(knob, changed)
            if then < now * (1 - LEAST_SAVING):
                offers.append((then / now, then, now, knob, changed))
            elif knob in ANSWER_KNOBS:
                closed.add(knob)
        if not offers:
            break
        _, then, now, knob, changed = min(offers, key=lambda offer: offer[0])
        with running(model, changed, plan):
            outputs = probe.perform(model, advance)
        shares = probe.adherence(outputs), probe.accuracy(outputs)
        kept = all(own.value >= fidelity * ref.value for own, ref in zip(shares, reference, strict=True))
        trials.append(Trial(knob, levels[knob] + 1, then, now, *shares, kept))
        if kept:
            config = changed
            levels[knob] += 1
        else:
            closed.add(knob)
    result = Tuned(fidelity, config, machine.command_line(), machine.facts(), trials, reference)
    settings = [
        Setting("dense", "dense", None),
        Setting("exact", "exact", FlashUConfig.exact(prune_multiple=plan.multiple)),
        *([Setting("paper", "paper", paper)] if paper else []),
        Setting("tuned", "fast", config),
    ]
    held_out = Probe.build(report_drawings, report_questions, seed + 1, "held-out")
    result.points = compare(model, settings, held_out, plan, repeats=repeats, seed=seed, advance=advance)
    bar.close()
    return result


def _answer_seconds(model: Any, probe: Probe, count: int = 24) -> float:
    """Median time of one answer about a picture not seen before."""
    first = {picture: number for number, (picture, _) in reversed(list(enumerate(probe.asked)))}
    times = []
    for number in list(first.values())[: count + 2]:
        start = time.perf_counter()
        probe.ask(model, number)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:] or times)


def _bar(progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc="tune", unit=" outputs", disable=not progress)
