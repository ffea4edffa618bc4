"""Runs the fidelity report: time saved and fidelity lost by every setting, for images and answers, against dense."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..nano.evaluate import Proportion
from ..nano.model import load_model, load_plan
from ..nano.probe import Probe
from ..nano.showo2 import SUBJECT
from ..nano.subject import PRUNE_MULTIPLE
from ..ops import machine
from ..planning.config import FlashUConfig
from ..studies.comparison import Point, Setting, compare

__all__ = ["FidelityResult", "Gate", "gates", "run", "settings"]


@dataclass(frozen=True)
class Gate:
    """Whether a task's measure holds: not lower than dense's beyond what both 95 % intervals allow."""

    setting: str
    task: str
    passed: bool
    measured: Proportion
    dense: Proportion


@dataclass
class FidelityResult:
    """All points (the first is dense at full steps) and the gates of the presets."""

    model: str
    command: str
    machine: Mapping[str, str]
    seconds: float
    points: list[Point]
    gates: list[Gate]

    def point(self, name: str) -> Point:
        return next(point for point in self.points if point.name == name)

    def to_json(self) -> str:
        record = dataclasses.asdict(self)
        for entry, point in zip(record["points"], self.points, strict=True):
            entry |= {"image_median": point.image_time, "answer_median": point.answer_time}
        return json.dumps(record, indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """A line per setting, for a terminal."""
        base = self.points[0]
        header = f"{'setting':<34} {'ms/image':>9} {'x':>6} {'GFLOP':>7} {'drawings':>9} {'PSNR':>6} "
        header += f"{'ms/answer':>10} {'x':>6} {'answers':>8}"
        lines = [header]
        for p in self.points:
            lines.append(
                f"{p.name:<34} {1e3 * p.image_time:>9.1f} {base.image_time / p.image_time:>5.2f}x {p.flops / 1e9:>7.2f} "
                f"{100 * p.adherence.value:>7.1f} % {p.psnr:>6.1f} {1e3 * p.answer_time:>10.2f} "
                f"{base.answer_time / p.answer_time:>5.2f}x {100 * p.accuracy.value:>6.1f} %"
            )
        lines += [
            f"gate {gate.setting}, {gate.task}: {'held' if gate.passed else 'FAILED'} ({gate.measured}, dense {gate.dense})"
            for gate in self.gates
        ]
        return "\n".join(lines)


def settings(fidelities: Sequence[float] = (0.99, 0.95)) -> list[Setting]:
    """Dense at full and at fewer steps, exact, paper, every knob by itself, and fast at each fidelity."""
    pruned: dict[str, Any] = {"prune_multiple": PRUNE_MULTIPLE}
    fewer = (35, 25, 18, 13, 9)

    def knob(name: str, **fields: Any) -> Setting:
        return Setting(name, "one knob", FlashUConfig(**pruned, **fields))

    result = [Setting("dense", "dense, fewer steps", None)]
    result += [Setting(f"dense, {n} grid points", "dense, fewer steps", None, n) for n in fewer]
    result += [Setting("exact", "exact", SUBJECT.preset_config("exact"))]
    result += [
        Setting(f"exact, {n} grid points", "exact, fewer steps", FlashUConfig.exact(steps=n, **pruned)) for n in fewer
    ]
    result += [Setting("paper", "paper", SUBJECT.preset_config("paper"))]
    result += [knob(f"neurons -{100 * r:.0f} %", ffn_prune_ratio=r) for r in (0.2, 0.4)]
    result += [knob("a layer of six skipped", layer_skip_ratio=0.2, layer_skip_interval=10, full_network_steps=0.3)]
    result += [knob(f"head cached, every {n}", head_cache_interval=n, full_network_steps=0.3) for n in (3, 5)]
    result += [
        knob(f"head forecast, order {o}, every 5", head_cache_interval=5, full_network_steps=0.3, head_forecast_order=o)
        for o in (1, 2)
    ]
    result += [knob("guidance 0.75, then 1", guidance=[(35, 0.75), (14, 1.0)], guidance_relative=True)]
    result += [knob(f"visual tokens -{100 * r:.0f} %", token_prune_ratio=r) for r in (0.25, 0.5, 0.75)]
    result += [Setting(f"fast({f:g})", "fast", FlashUConfig.fast(f, **pruned)) for f in fidelities]
    return result


def gates(points: Sequence[Point], names: Sequence[str]) -> list[Gate]:
    """A gate for each task of each named point, against the first point."""
    dense = points[0]
    result = []
    for point in points:
        if point.name not in names:
            continue
        for task, own, reference in (
            ("drawing", point.adherence, dense.adherence),
            ("answering", point.accuracy, dense.accuracy),
        ):
            result.append(Gate(point.name, task, own.interval[1] >= reference.interval[0], own, reference))
    return result


def run(
    drawings: int = 100,
    questions: int = 150,
    repeats: int = 7,
    seed: int = 0,
    chosen: Sequence[Setting] | None = None,
    progress: bool = True,
) -> FidelityResult:
    """Measure every setting on held-out scenes of the embedded model.

    Args:
        drawings, questions: per setting.
        repeats: timed rounds of one image and one answer, all settings interleaved.
        chosen: settings, dense first (default: `settings()`).
        progress: show a progress bar.
    """
    from tqdm import tqdm

    began = time.perf_counter()
    model = load_model()
    every = list(chosen if chosen is not None else settings())
    probe = Probe.build(drawings, questions, seed)
    total = len(every) * (drawings + questions + repeats)
    with tqdm(total=total, desc="report", unit="output", disable=not progress) as bar:
        advance: Callable[[int], Any] = bar.update
        points = compare(model, every, probe, load_plan(model), repeats=repeats, seed=seed, advance=advance)
    presets = [setting.name for setting in every if setting.group in ("exact", "paper", "fast")]
    return FidelityResult(
        model=f"nano ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters)",
        command=machine.command_line(),
        machine=machine.facts(),
        seconds=time.perf_counter() - began,
        points=points,
        gates=gates(points, presets),
    )
