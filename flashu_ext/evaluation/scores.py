"""Reads what the benchmarks' tools wrote, with 95 % intervals. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..planning.intervals import Cluster, bootstrap, paired_bootstrap, wilson
from ..planning.reading import MAX_LIST_BYTES, read_text, refusal, shown
from .drawing import IMAGES
from .lists import DPG_IMAGES, json_lines, prompts_of

__all__ = [
    "Difference",
    "Score",
    "Values",
    "difference",
    "dpg_scores",
    "geneval_scores",
    "question_scores",
    "scored_folder",
]


@dataclass(frozen=True)
class Values:
    """What a figure is made of: the values of prompts, pictures or questions.

    Attributes:
        strata: tasks or categories -> prompt -> sum and number of its values.
        unit: what they are of.
        combine: `numpy.mean` or `numpy.sum`, of the strata's means.
    """

    strata: Mapping[str, Mapping[str, Cluster]]
    unit: str
    combine: Callable[..., Any] = np.mean

    @property
    def clusters(self) -> list[list[Cluster]]:
        """Without their names."""
        return [list(own.values()) for own in self.strata.values()]

    @property
    def figure(self) -> float:
        means = [math.fsum(total for total, _ in own) / sum(n for _, n in own) for own in self.clusters]
        return float(self.combine(np.asarray(means)))

    def of(self, prompts: Mapping[str, Sequence[str]]) -> Values:
        """Those of some prompts of every stratum, in their order."""
        strata = {name: {key: self.strata[name][key] for key in keys} for name, keys in prompts.items()}
        return Values(strata, self.unit, self.combine)


@dataclass(frozen=True)
class Score:
    """A figure of a benchmark.

    Attributes:
        name: 'overall' for a benchmark's own headline, else the task's or metric's.
        value: as the tool prints it.
        interval: 95 %; None where there is none.
        n: what was scored, in units of `unit`.
        method: how the interval was found, or why there is none.
        values: what the score is made of, where that is known.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    n: int
    unit: str
    method: str = ""
    values: Values | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Difference:
    """A figure less that of another run, on the prompts that both have.

    Attributes:
        name: of the score.
        interval: 95 %, paired; None where there is none.
        n: prompts, in units of `unit`.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    n: int
    unit: str


def difference(score: Score, other: Score) -> Difference | None:
    """Score less another one of the same metric; None where their values are not known or have no prompt in common."""
    if score.values is None or other.values is None:
        return None
    theirs = other.values.strata
    both = {name: [key for key in own if key in theirs.get(name, {})] for name, own in score.values.strata.items()}
    both = {name: keys for name, keys in both.items() if keys}
    if not both:
        return None
    own, others = score.values.of(both), other.values.of(both)
    interval = paired_bootstrap(own.clusters, others.clusters, own.combine)
    n = sum(map(len, own.clusters))
    return Difference(score.name, own.figure - others.figure, interval, n, own.unit)


# ---- GenEval

_SAMPLE = re.compile(r"(?:^|.*[/\\])(\d+)[/\\]samples[/\\](\d+)[.]png")


def geneval_scores(path: Path, jobs: Sequence[dict[str, Any]]) -> list[Score]:
    """Scores from GenEval's results.jsonl: overall (the mean over tasks), then each task, in [0, 1].

    Args:
        jobs: the images that were drawn, of the folder's manifest.

    Raises:
        ValueError: a malformed line, or one about an image that was not drawn here, has another prompt or task or is there
            twice; file and line are named. OSError: the file cannot be read.
    """
    prompts, known = prompts_of(jobs, "geneval"), {job["name"] for job in jobs}
    tasks: dict[str, dict[str, list[bool]]] = {}
    tags: dict[str, Any] = {}
    seen: set[str] = set()
    for where, line in json_lines(path):
        keys = {"filename": str, "tag": str, "prompt": str, "correct": bool}
        if not isinstance(line, dict) or not all(isinstance(line.get(key), kind) for key, kind in keys.items()):
            raise refusal(where, f"expected an object with filename, tag, prompt and correct, got {shown(line)}")
        match = _SAMPLE.fullmatch(line["filename"])
        name = "" if match is None else f"{match[1]}-{match[2]}.png"
        if match is None or name not in known:
            raise refusal(where, f"filename: expected an image that was drawn here, got {shown(line['filename'])}")
        if line["prompt"] != prompts[match[1]]:
            raise refusal(where, f"prompt: expected {shown(prompts[match[1]])}, got {shown(line['prompt'])}")
        if match[1] not in tags:
            tags[match[1]] = _tag_of(path.parent / IMAGES / match[1] / "metadata.jsonl")
        if tags[match[1]] not in (None, line["tag"]):
            raise refusal(where, f"tag: expected {shown(tags[match[1]])}, got {shown(line['tag'])}")
        if name in seen:
            raise refusal(where, f"filename: expected every image once, got {shown(line['filename'])} again")
        seen.add(name)
        tasks.setdefault(line["tag"], {}).setdefault(match[1], []).append(line["correct"])
    if not tasks:
        raise refusal(path, "expected at least one result, got none")
    values = {
        tag: {prompt: (float(sum(right)), float(len(right))) for prompt, right in task.items()}
        for tag, task in tasks.items()
    }
    rows = []
    for tag, task in values.items():
        own = Values({tag: task}, "prompts")
        n = int(sum(count for _, count in task.values()))
        interval = wilson(own.figure, len(task))
        rows.append(Score(tag, own.figure, interval, n, "images", f"Wilson, n = {len(task)} prompts", own))
    return [_bootstrapped(Values(values, "prompts"), len(seen), "images"), *rows]


def _tag_of(metadata: Path) -> Any:
    """The task of a prompt in the folder for GenEval's tool; None where that is not here any more."""
    if not metadata.is_file():
        return None
    return next((line.get("tag") for _, line in json_lines(metadata) if isinstance(line, dict)), None)


def scored_folder(path: Path) -> Path | None:
    """The folder of images that the first line of a results file names; None where it names none."""
    first = next((line for line in read_text(path, MAX_LIST_BYTES).split("\n") if line.strip()), "")
    match = re.search(r'(?:"filename": *")?([^"]*?)[/\\](?:\d+[/\\]samples[/\\]\d+|[^/\\]+)[.]png', first)
    return None if match is None else Path(match[1])


def _bootstrapped(values: Values, n: int, unit: str) -> Score:
    """A benchmark's headline. n: what was scored, in units of `unit`."""
    interval = bootstrap(values.clusters, values.combine)
    return Score("overall", values.figure, interval, n, unit, _method(interval, values.unit), values)


def _method(interval: object, what: str) -> str:
    return f"fewer than two {what}, or all alike" if interval is None else f"bootstrap over {what}"


# ---- DPG-Bench

_IMAGE_LINE = re.compile(r"(?:.*[/\\])?(?P<name>[^/\\]+)[.]png(?P<scores>(?:, [0-9.e+-]+)+)")
_TOTAL_LINE = re.compile(r"DPG-Bench score: (?P<score>[0-9.e+-]+)")
_TOLERANCE = 1e-6


def dpg_scores(path: Path, jobs: Sequence[dict[str, Any]]) -> list[Score]:
    """The score from the results file of DPG-Bench's tool, in [0, 100]: the mean over prompts.

    Args:
        jobs: the images that were drawn, of the folder's manifest.

    Raises:
        ValueError: a malformed line, one about a picture that was not drawn here or is there twice, or a total that is not
            the mean of the pictures; file and line are named. OSError: the file cannot be read.
    """
    prompts = prompts_of(jobs, "dpg")
    means: dict[str, float] = {}
    total = None
    for number, line in enumerate(read_text(path, MAX_LIST_BYTES).split("\n"), 1):
        where = f"{path}:{number}"
        if (match := _IMAGE_LINE.fullmatch(line)) is not None:
            name, scores = match["name"], _numbers(where, match["scores"].split(", ")[1:])
            if name not in prompts:
                raise refusal(where, f"expected a picture that was drawn here, got {shown(name)}")
            if name in means:
                raise refusal(where, f"expected every picture once, got {shown(name)} again")
            own = scores[:-1]
            if len(own) != DPG_IMAGES or abs(scores[-1] - math.fsum(own) / len(own)) > _TOLERANCE:
                raise refusal(
                    where, f"expected the scores of {DPG_IMAGES} images and their mean, got {shown(match['scores'])}"
                )
            means[name] = scores[-1]
        elif (match := _TOTAL_LINE.fullmatch(line.strip())) is not None:
            total = where, _numbers(where, [match["score"]])[0]
    if not means:
        raise refusal(path, "expected at least one line of a picture with its scores, got none")
    value = 100 * math.fsum(means.values()) / len(means)
    if total is not None and abs(total[1] - value) > 1e-4:
        raise refusal(
            total[0], f"DPG-Bench score: expected {value:.6f}, the mean of the pictures above, got {total[1]:.6f}"
        )
    values = Values({"": {name: (100 * mean, 1.0) for name, mean in means.items()}}, "prompts")
    return [_bootstrapped(values, len(means), "prompts")]


def _numbers(where: str, texts: Iterable[str]) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise refusal(where, f"expected numbers, got {shown(list(texts))}") from error
    if not all(math.isfinite(value) for value in values):
        raise refusal(where, f"expected finite numbers, got {shown(values)}")
    return values


# ---- lmms-eval


def question_scores(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[Score]:
    """Scores of one task of lmms-eval.

    An interval is given where the metric's values of the questions lead to the value that the tool computed: their mean, the
    mean over MMStar's finer categories, or MME's sum over categories of the two questions of each picture.

    Args:
        results: of the task: 'metric,filter' -> value.
        samples: of the task: 'number' and 'metrics' of each question, as the tool's process_results gives them.
    """
    scores = []
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or "_stderr" in metric or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        own = {str(sample["number"]): sample["metrics"][metric] for sample in samples if metric in sample["metrics"]}
        values = _values(float(value), own)
        interval, method = (None, "not from its questions' values") if values is None else _interval(values)
        scores.append(Score(metric, float(value), interval, len(own) or len(samples), "questions", method, values))
    return scores


def _interval(values: Values) -> tuple[tuple[float, float] | None, str]:
    if len(values.strata) == 1 and all(each in ((0.0, 1.0), (1.0, 1.0)) for each in values.clusters[0]):
        return wilson(values.figure, len(values.clusters[0])), f"Wilson, n = {len(values.clusters[0])} questions"
    interval = bootstrap(values.clusters, values.combine)
    return interval, _method(interval, values.unit)


def _values(value: float, own: Mapping[str, Any]) -> Values | None:
    """The questions' values in the way in which the tool has made one of them; None where none of these gives it."""
    ways = (each for each in _ways(own) if each.strata)
    return next((way for way in ways if math.isclose(way.figure, value, rel_tol=1e-6, abs_tol=1e-9)), None)


def _ways(own: Mapping[str, Any]) -> Iterable[Values]:
    """Ways in which a task may have made one value of those of its questions, by their numbers."""
    if not own:
        return
    if all(isinstance(each, (int, float)) for each in own.values()):
        yield Values({"": {key: (float(each), 1.0) for key, each in own.items()}}, "questions")
    elif all(isinstance(each, dict) and isinstance(each.get("score"), (int, float)) for each in own.values()):
        yield Values({"": {key: (float(each["score"]), 1.0) for key, each in own.items()}}, "questions")
        if all("l2_category" in each for each in own.values()):
            groups = _grouped(own, "l2_category")
            strata = {
                name: {key: (float(each["score"]), 1.0) for key, each in group.items()}
                for name, group in groups.items()
            }
            yield Values(strata, "questions")
        if all("category" in each and "question_id" in each for each in own.values()):
            strata = {
                name: {
                    picture: _mme_pair(list(pair.values())) for picture, pair in _grouped(group, "question_id").items()
                }
                for name, group in _grouped(own, "category").items()
            }
            yield Values(strata, "pictures", np.sum)


def _mme_pair(pair: Sequence[Any]) -> tuple[float, float]:
    """MME's score of a picture: 100 times the share of right answers, and 100 more if all are right."""
    share = sum(each["score"] for each in pair) / len(pair)
    return 100.0 * share + 100.0 * (share == 1.0), 1.0


def _grouped(values: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        groups.setdefault(str(value[key]), {})[name] = value
    return groups
