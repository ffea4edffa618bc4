"""Gathers what `flashu-ext evaluate` and the benchmarks' tools left in a folder, beside the paper's published figures."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.drawing import IMAGES, RECORD, read_drawing, results_file
from ..evaluation.scores import (
    Difference,
    Score,
    difference,
    dpg_scores,
    geneval_scores,
    question_scores,
    scored_folder,
)
from ..evaluation.understanding import read_results
from ..ops import machine
from ..planning.config import PRESETS, FlashUConfig
from ..planning.reading import refusal
from ..planning.tables import text_table

__all__ = ["PUBLISHED", "Benchmark", "Evaluation", "Result", "gather"]

SOURCE = "Flash-Unified, arXiv 2603.15271"


@dataclass(frozen=True)
class Published:
    """Figures that others published, for Show-o2 dense and by Flash-Unified, and what the whole benchmark has."""

    title: str
    size: str
    dense: float
    accelerated: float
    metric: str
    scale: float
    digits: int
    whole: int
    unit: str


PUBLISHED = {
    "geneval": Published("GenEval, overall", "1.5B", 0.73, 0.71, "overall", 1, 3, 553, "prompts"),
    "dpg": Published("DPG-Bench", "7B", 86.14, 84.39, "overall", 1, 2, 1065, "prompts"),
    "mme": Published("MME, perception", "7B", 1620.5, 1560.5, "mme_perception_score", 1, 1, 2374, "questions"),
    "mmstar": Published("MMStar, average", "7B", 56.6, 48.3, "average", 100, 1, 1500, "questions"),
}
"""The paper's table. A benchmark's tool may have changed since: compare presets of one run first."""

# Settings that presets may differ in. Others are the same in a fair comparison.
_OWN = {"preset", "config", "plan", "steps"}

_BY_HAND = ("--steps", "--guidance", "--samples", "--size", "--limit")
"""Options that change what is measured, where somebody gives them."""

_RUNTIME = ("prune_multiple", "_kernels", "step_graphs", "skip_unit_guidance", "batch_invariant")
"""Ends of settings' names that are no part of the published method."""


@dataclass
class Result:
    """One benchmark under one preset.

    Attributes:
        state: 'scored', or what is missing.
        scores: the headline first; empty where nothing was scored.
        scored, expected, unit: how much was scored of what was drawn or asked.
        settings: that outputs depend on, of the record.
        runs: command and machine of every run.
        notes: what a reader has to know.
        changes: scores less those of the benchmark's baseline.
    """

    preset: str
    state: str
    scores: list[Score] = field(default_factory=list)
    scored: int = 0
    expected: int = 0
    unit: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[Difference] = field(default_factory=list)

    def change(self, metric: str) -> Difference | None:
        return next((change for change in self.changes if change.name == metric), None)

    def score(self, metric: str) -> Score | None:
        return next((score for score in self.scores if score.name == metric), None)

    def setting(self, key: str, otherwise: str = "-") -> str:
        """A setting as text."""
        value = self.settings.get(key)
        return otherwise if value is None else str(value)

    @property
    def commits(self) -> str:
        """Of every run, without repetition."""
        return ", ".join(dict.fromkeys(run["machine"].get("commit", "unknown") for run in self.runs))


@dataclass
class Benchmark:
    """A benchmark under every preset, in the order of the page's columns."""

    name: str
    results: list[Result]
    differences: list[str]
    baseline: str | None = None
    """The preset that the others' changes are against: the first that was scored."""

    @property
    def published(self) -> Published | None:
        return PUBLISHED.get(self.name)

    @property
    def title(self) -> str:
        return self.published.title if self.published else self.name

    def headline(self, result: Result) -> Score | None:
        """The score that is compared with the published one; for other benchmarks the first."""
        if self.published is not None:
            return result.score(self.published.metric)
        return result.scores[0] if result.scores else None

    @property
    def metrics(self) -> list[str]:
        """Names of all scores, in their order."""
        return list(dict.fromkeys(score.name for result in self.results for score in result.scores))

    def shown(self, score: Score | None) -> str:
        """A score in the published figure's unit, with its interval."""
        if score is None:
            return "missing"
        scale, digits = self._form
        text = f"{scale * score.value:.{digits}f}"
        if score.interval is None:
            return f"{text} (no interval)"
        return f"{text} ({scale * score.interval[0]:.{digits}f} to {scale * score.interval[1]:.{digits}f})"

    def shown_change(self, change: Difference) -> str:
        """A difference to the baseline, with its paired interval."""
        if change.value == 0 and change.interval is None:
            return f"as {self.baseline} on each of {change.n} {change.unit}"
        scale, digits = self._form
        ends = [] if change.interval is None else [f"{scale * end:+.{digits}f}" for end in change.interval]
        between = " to ".join(ends) or "no interval"
        return (
            f"{scale * change.value:+.{digits}f} ({between}) against {self.baseline}, {change.n} {change.unit} of both"
        )

    @property
    def _form(self) -> tuple[float, int]:
        return (self.published.scale, self.published.digits) if self.published else (1, 4)


@dataclass
class Evaluation:
    """Everything that the page shows."""

    folder: str
    presets: list[str]
    benchmarks: list[Benchmark]
    command: str
    machine: dict[str, str]
    seconds: float
    source: str = SOURCE

    @property
    def missing(self) -> list[str]:
        """What was not run or not scored, in words."""
        return [
            f"{benchmark.title}, {result.preset}: {result.state}"
            for benchmark in self.benchmarks
            for result in benchmark.results
            if result.state != "scored"
        ]

    def table(self) -> str:
        """Headline figures for a terminal."""
        rows = [("benchmark", "published dense", "published Flash-Unified", *self.presets)]
        for each in self.benchmarks:
            there = each.published
            published = (
                (f"{there.dense:g} ({there.size})", f"{there.accelerated:g} ({there.size})") if there else ("-", "-")
            )
            rows.append((each.title, *published, *(each.shown(each.headline(result)) for result in each.results)))
        return text_table(rows, rule=True)

    def to_json(self) -> str:
        record = dataclasses.asdict(self, dict_factory=_without_values) | {
            "published": {name: dataclasses.asdict(each) for name, each in PUBLISHED.items()},
            "missing": self.missing,
        }
        return json.dumps(record, indent=1, allow_nan=False) + "\n"


def _without_values(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields but the values of single prompts."""
    return {key: value for key, value in items if key != "values"}


def gather(folder: Path) -> Evaluation:
    """Read an evaluation's folder.

    Raises:
        ValueError: there is no evaluation, or a file is malformed; it is named, with its line where it has lines.
        OSError: a file cannot be read.
    """
    began = time.perf_counter()
    presets = [name for name in (*PRESETS, "tuned") if name in PRESETS or (folder / name).is_dir()]
    tasks = sorted({path.stem for preset in presets for path in (folder / preset / "understanding").glob("*.json")})
    if not tasks and not any((folder / preset / name / RECORD).is_file() for preset in presets for name in PUBLISHED):
        raise refusal(folder, f"expected a folder of `flashu-ext evaluate` with {', '.join(PRESETS)}, got none of them")
    names = [*PUBLISHED, *(task for task in tasks if task not in PUBLISHED)]
    benchmarks = []
    for name in names:
        results = [_result(folder / preset, preset, name) for preset in presets]
        benchmarks.append(Benchmark(name, results, list(_differences(results)), _compare(results)))
    return Evaluation(
        folder=str(folder),
        presets=presets,
        benchmarks=benchmarks,
        command=machine.command_line(),
        machine=machine.facts(),
        seconds=time.perf_counter() - began,
    )


def _result(folder: Path, preset: str, name: str) -> Result:
    result = _drawn(folder / name, preset, name) if name in ("geneval", "dpg") else _asked(folder, preset, name)
    result.notes += _notes(result, name)
    return result


def _compare(results: list[Result]) -> str | None:
    """Fill in the changes against the first preset that was scored; its name."""
    scored = [result for result in results if result.scores]
    if not scored:
        return None
    baseline = scored[0]
    for result in scored[1:]:
        pairs = ((score, baseline.score(score.name)) for score in result.scores)
        changes = (difference(score, other) for score, other in pairs if other is not None)
        result.changes = [change for change in changes if change is not None]
    return baseline.preset


def _drawn(folder: Path, preset: str, name: str) -> Result:
    if not (folder / RECORD).is_file():
        return Result(preset, "not drawn")
    record = read_drawing(folder)
    settings = record["settings"] | {key: record[key] for key in ("seed", "prompts", "images", "digest")}
    unit = "images" if name == "geneval" else "prompts"
    result = Result(preset, "scored", expected=record[unit], unit=unit, settings=settings, runs=record["runs"])
    path = results_file(folder, name)
    if not path.is_file():
        result.state = f"drawn, not scored: no {path}"
        return result
    result.scores = (geneval_scores if name == "geneval" else dpg_scores)(path, record["jobs"])
    result.scored = result.scores[0].n
    expected, named = (folder / IMAGES).absolute().parts[-3:], scored_folder(path)
    # The same on another machine, or by a relative path.
    if named is not None and (tail := named.parts[-3:]) != expected[3 - len(tail) :]:
        result.notes.append(f"{path.name} is of images in {named}, and not of {'/'.join(expected)}")
    if path.stat().st_mtime < (folder / RECORD).stat().st_mtime:
        result.notes.append(f"{path.name} is older than the last run that drew images: score them again")
    return result


def _asked(folder: Path, preset: str, name: str) -> Result:
    path = folder / "understanding" / f"{name}.json"
    if not path.is_file():
        return Result(preset, "not run")
    record = read_results(path)
    return Result(
        preset,
        "scored",
        scores=question_scores(record["results"], record["samples"]),
        scored=len(record["samples"]),
        expected=record["questions"],
        unit="questions",
        settings=record["settings"] | {"task": record["task_settings"]},
        runs=record["runs"],
    )


def _notes(result: Result, name: str) -> Iterator[str]:
    given = dict.fromkeys(each for run in result.runs for each in _by_hand(run["command"]))
    if given:
        yield f"by hand, not as the preset or the benchmark has it: {', '.join(given)}"
    if result.preset == "paper" and isinstance(config := result.settings.get("config"), dict):
        method = FlashUConfig.paper().flat()
        others = {key: value for key, value in config.items() if key in method and not key.endswith(_RUNTIME)}
        listed = [
            f"{key} {value} (published: {method[key]})"
            for key, value in others.items()
            if json.dumps(value) != json.dumps(method[key])
        ]
        if listed:
            yield f"other settings than the published ones: {', '.join(listed)}"
    if result.state == "scored" and result.scored != result.expected:
        yield f"only {result.scored} of {result.expected} {result.unit} were scored"
    published = PUBLISHED.get(name)
    if published is not None and result.runs:
        own = result.settings["prompts"] if published.unit == "prompts" else result.expected
        if own != published.whole:
            yield f"not the whole benchmark: {own} {published.unit}, it has {published.whole}"
    if any("local changes" in run["machine"].get("commit", "") for run in result.runs):
        yield "a run's sources had local changes"
    if len({run["machine"].get("commit", "") for run in result.runs}) > 1:
        yield f"runs of several commits: {result.commits}"


def _by_hand(command: str) -> Iterator[str]:
    """Those options of a command, with their values."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that nothing closes
        words = command.split()
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in _BY_HAND:
            yield f"{name} {value or after}"


def _differences(results: list[Result]) -> Iterator[str]:
    """Settings in which presets differ though they need not."""
    there = [result for result in results if result.settings]
    for result in there[1:]:
        first = there[0].settings
        for key in dict.fromkeys((*first, *result.settings)):
            if key not in _OWN and first.get(key) != result.settings.get(key):
                yield f"{key}: {there[0].preset} {first.get(key)!s:.60}, {result.preset} {result.settings.get(key)!s:.60}"
