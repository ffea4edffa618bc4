"""Requests that come at random times: served together as they come, in whole batches, or one by one.

Arrivals are a Poisson process, the same for every way of serving. Its rate is a share of what one by one can serve, which is
measured first. Time passes for real; latency is from arrival to result.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.showo2 import ImageRequest, Pipeline, QuestionRequest, Showo2
from ..ops import machine
from .shapes import SHAPES, fill

__all__ = ["WAYS", "Report", "Row", "Settings", "run", "serve"]

WAYS = ("together", "batches", "one by one")
"""Ways of serving."""

PROMPTS = ("a red circle", "a blue square above a green triangle", "two yellow circles", "a small red square")
QUESTIONS = ("what color is the circle ?", "how many objects are there ?", "where is the square ?")


@dataclass(frozen=True)
class Settings:
    """What is measured; see `flashu-ext bench arrivals --help`.

    Attributes:
        task: 'images' or 'answers'.
        loads: rates of arrival, as shares of what one by one serves.
        requests: of each run.
        steps: grid points of images. tokens: of answers.
        at_once: requests under way, or in a batch, at most.
        rounds: runs of each way, interleaved.
    """

    task: str = "images"
    model: str = "nano"
    preset: str = "exact"
    loads: tuple[float, ...] = (0.5, 0.9)
    requests: int = 24
    steps: int = 20
    tokens: int = 16
    at_once: int = 8
    rounds: int = 1
    threads: int | None = None
    seed: int = 0


@dataclass
class Row:
    """One way under one load. latencies: seconds of every request; seconds: from the first arrival to the last result."""

    load: float
    way: str
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Requests served in a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """The latency within which this share of the requests was served."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Report:
    settings: Settings
    alone: float
    """Median seconds of one request alone."""
    results: list[Row]
    machine: str
    command: str

    def table(self) -> str:
        """Throughput and latencies of every way."""
        settings = self.settings
        lines = [
            f"{settings.task} of {settings.model} ({settings.preset}), Poisson arrivals; one alone takes {self.alone:.3f} s",
            f"{'load':>5} {'way':>11} {'served/s':>9} {'p50 s':>8} {'p95 s':>8} {'worst s':>8}",
        ]
        for row in self.results:
            lines.append(
                f"{row.load:>5.2f} {row.way:>11} {row.per_second:>9.2f} {row.percentile(0.5):>8.3f} "
                f"{row.percentile(0.95):>8.3f} {max(row.latencies):>8.3f}"
            )
        return "\n".join([*lines, "", f"command: {self.command}", f"machine: {self.machine}"])

    def to_json(self) -> str:
        """All figures."""
        return json.dumps(asdict(self), indent=1)


class _Blocks:
    """Stands in for an image codec, which is not what is measured: a latent is the mean of 8 x 8 pixels."""

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 8).repeat(1, 6, 1, 1)[:, :16]

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8).clamp(-1, 1)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8


def pipeline(name: str) -> Pipeline:
    """'nano', a folder, or the random weights of one of `SHAPES` with nano's words."""
    if name not in SHAPES:
        return Pipeline.from_pretrained(name)
    config = SHAPES[name].config
    model = Showo2(config).eval()
    fill(model, seed=0)
    tokens = 1 + config.image_latent_height * config.image_latent_width
    layout = Pipeline.from_pretrained("nano").layout.with_image_tokens(tokens)
    return Pipeline(model, layout, _Blocks(), pixels=8 * config.patch_size * config.image_latent_height, name=name)


class _Work:
    """The requests of a run and the three ways to serve some of them."""

    def __init__(self, pipe: Pipeline, settings: Settings):
        self.pipe, self.settings = pipe, settings
        choose = random.Random(settings.seed)
        self.picture = pipe.generate(PROMPTS[0], steps=4) if settings.task == "answers" else None
        self.requests = [self._request(choose, index) for index in range(settings.requests)]

    def _request(self, choose: random.Random, index: int) -> Any:
        if self.picture is None:
            return ImageRequest(choose.choice(PROMPTS), seed=index, steps=self.settings.steps)
        return QuestionRequest(self.picture, choose.choice(QUESTIONS), max_new_tokens=self.settings.tokens)

    def batch(self, requests: Sequence[Any]) -> None:
        if self.picture is None:
            prompts, seeds = [each.prompt for each in requests], [each.seed for each in requests]
            self.pipe.generate_batch(prompts, seeds, self.settings.steps)
        else:
            pictures, questions = [each.images for each in requests], [each.question for each in requests]
            self.pipe.answer_batch(pictures, questions, max_new_tokens=self.settings.tokens)

    def many(self) -> Any:
        of = self.pipe.generate_many if self.picture is None else self.pipe.answer_many
        return of(at_once=self.settings.at_once)


def run(settings: Settings, say: Callable[[str], None] | None = None) -> Report:
    """Measure every way under every load. say: called with what runs now."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    pipe = pipeline(settings.model)
    results: list[Row] = []
    with pipe.accelerate(*pipe.preset(settings.preset)):
        work = _Work(pipe, settings)
        work.batch([work.requests[0]])
        alone = statistics.median(_took(work, each) for each in work.requests[:5])
        for load in settings.loads:
            gaps = random.Random(settings.seed + 1)
            arrivals, now = [], 0.0
            for _ in work.requests:
                now += gaps.expovariate(load / alone)
                arrivals.append(now)
            rows = {way: Row(load, way) for way in WAYS}
            for _ in range(settings.rounds):
                for way, row in rows.items():
                    if say is not None:
                        say(f"load {load:g}, {way}")
                    latencies = serve(work, arrivals, way, settings.at_once)
                    row.latencies += latencies
                    row.seconds += max(a + b for a, b in zip(arrivals, latencies, strict=True)) - arrivals[0]
            results += rows.values()
    return Report(settings, alone, results, machine.describe(), machine.command_line())


def serve(work: Any, arrivals: Sequence[float], way: str, at_once: int) -> list[float]:
    """Serve a run's requests; returns the latency of each in seconds.

    Args:
        work: has `requests`, `batch` and `many`.
        arrivals: seconds from the start, ascending.
        way: one of WAYS.
    """
    start = time.perf_counter()
    ended: dict[int, float] = {}
    many = work.many() if way == "together" else None
    most = 1 if way == "one by one" else at_once
    waiting: list[int] = []
    arrived = 0
    while len(ended) < len(arrivals):
        now = time.perf_counter() - start
        while arrived < len(arrivals) and arrivals[arrived] <= now:
            if many is not None:
                many.add(work.requests[arrived])
            else:
                waiting.append(arrived)
            arrived += 1
        if many is not None:
            served = [result.index for result in many.step()]
            idle = not served and not many.in_progress
        else:
            served, waiting = waiting[:most], waiting[most:]
            if served:
                work.batch([work.requests[index] for index in served])
            idle = not served
        now = time.perf_counter() - start
        ended.update(dict.fromkeys(served, now))
        if idle and arrived < len(arrivals):
            time.sleep(max(0.0, arrivals[arrived] - now))
    return [ended[index] - arrival for index, arrival in enumerate(arrivals)]


def _took(work: _Work, request: Any) -> float:
    start = time.perf_counter()
    work.batch([request])
    return time.perf_counter() - start
