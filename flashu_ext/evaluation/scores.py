"""Reads what the benchmarks' tools wrote, with 95 % intervals. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..planning.intervals import bootstrap, wilson
from ..planning.reading import MAX_LIST_BYTES, read_text, refusal, shown
from .lists import DPG_IMAGES, json_lines, prompts_of

__all__ = ["Score", "dpg_scores", "geneval_scores", "question_scores"]


@dataclass(frozen=True)
class Score:
    """A figure of a benchmark.

    Attributes:
        name: 'overall' for a benchmark's own headline, else the task's or metric's.
        value: as the tool prints it.
        interval: 95 %; None where there is none.
        n: what was scored, in units of `unit`.
        method: how the interval was found; empty without one.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    n: int
    unit: str
    method: str = ""


# ---- GenEval

_SAMPLE = re.compile(r"(?:^|.*[/\\])(\d+)[/\\]samples[/\\](\d+)[.]png")


def geneval_scores(path: Path, jobs: Sequence[dict[str, Any]]) -> list[Score]:
    """Scores from GenEval's results.jsonl: overall (the mean over tasks), then each task, in [0, 1].

    Args:
        jobs: the images that were drawn, of the folder's manifest.

    Raises:
        ValueError: a malformed line, or one about an image that was not drawn here, has another prompt or is there twice;
            file and line are named. OSError: the file cannot be read.
    """
    prompts, known = prompts_of(jobs, "geneval"), {job["name"] for job in jobs}
    tasks: dict[str, dict[str, list[bool]]] = {}
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
        if name in seen:
            raise refusal(where, f"filename: expected every image once, got {shown(line['filename'])} again")
        seen.add(name)
        tasks.setdefault(line["tag"], {}).setdefault(match[1], []).append(line["correct"])
    if not tasks:
        raise refusal(path, "expected at least one result, got none")
    strata = [[(float(sum(right)), float(len(right))) for right in task.values()] for task in tasks.values()]
    shares = [sum(right for right, _ in task) / sum(n for _, n in task) for task in strata]
    rows = [
        Score(tag, share, wilson(share, len(task)), int(sum(n for _, n in task)), "images", "Wilson, n = prompts")
        for tag, share, task in zip(tasks, shares, strata, strict=True)
    ]
    interval = bootstrap(strata)
    overall = Score(
        "overall", math.fsum(shares) / len(shares), interval, len(seen), "images", _method(interval, "prompts")
    )
    return [overall, *rows]


def _method(interval: object, what: str) -> str:
    return "" if interval is None else f"bootstrap over {what}"


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
    interval = bootstrap([[(100 * mean, 1.0) for mean in means.values()]])
    return [Score("overall", value, interval, len(means), "prompts", _method(interval, "prompts"))]


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
        samples: of the task: 'metrics' of each question, as the tool's process_results gives them.
    """
    scores = []
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or "_stderr" in metric or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        own = [sample["metrics"][metric] for sample in samples if metric in sample["metrics"]]
        interval, method = _interval(float(value), own)
        scores.append(Score(metric, float(value), interval, len(own) or len(samples), "questions", method))
    return scores


def _interval(value: float, own: Sequence[Any]) -> tuple[tuple[float, float] | None, str]:
    for strata, combine, of in _ways(own):
        means = [sum(total for total, _ in clusters) / sum(n for _, n in clusters) for clusters in strata]
        if means and math.isclose(float(combine(np.asarray(means))), value, rel_tol=1e-6, abs_tol=1e-9):
            if len(strata) == 1 and all(each in ((0.0, 1.0), (1.0, 1.0)) for each in strata[0]):
                return wilson(value, len(strata[0])), "Wilson, n = questions"
            interval = bootstrap(strata, combine)
            return interval, _method(interval, of)
    return None, ""


def _ways(own: Sequence[Any]) -> Iterable[tuple[list[list[tuple[float, float]]], Any, str]]:
    """Ways in which a task may have made one value of those of its questions: strata of clusters, how they are joined."""
    if own and all(isinstance(each, (int, float)) for each in own):
        yield [[(float(each), 1.0) for each in own]], np.mean, "questions"
    elif own and all(isinstance(each, dict) and isinstance(each.get("score"), (int, float)) for each in own):
        yield [[(float(each["score"]), 1.0) for each in own]], np.mean, "questions"
        if all("l2_category" in each for each in own):
            yield (
                [[(each["score"], 1.0) for each in group] for group in _grouped(own, "l2_category")],
                np.mean,
                "questions",
            )
        if all("category" in each and "question_id" in each for each in own):
            strata = [
                [_mme_pair(pair) for pair in _grouped(group, "question_id")] for group in _grouped(own, "category")
            ]
            yield strata, np.sum, "pictures"


def _mme_pair(pair: Sequence[Any]) -> tuple[float, float]:
    """MME's score of a picture: 100 times the share of right answers, and 100 more if all are right."""
    share = sum(each["score"] for each in pair) / len(pair)
    return 100.0 * share + 100.0 * (share == 1.0), 1.0


def _grouped(values: Sequence[Any], key: str) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for value in values:
        groups.setdefault(str(value[key]), []).append(value)
    return list(groups.values())
