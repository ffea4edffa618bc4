"""Whole images and answers: dense, exact and paper, interleaved in one process.

The baseline is this library's dense model or, with `--upstream`, the unmodified classes of a checkout on the same weights.
Rows with as many steps as the baseline and rows with fewer are kept apart. An answer of one token is its prefill.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops import machine
from ..planning.config import FlashUConfig
from ..planning.plan import TaskPlan
from ..planning.tables import text_table
from ..runtime.handle import accelerate
from .families import SUBJECTS
from .shapes import SHAPES, Inputs, Shape, fill, inputs, weight_plan

__all__ = ["Report", "Row", "Settings", "run"]

GUIDANCE = 5.0
SHIFT = 3.0
LATENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Settings:
    """What is measured; see `flashu-ext bench e2e --help`."""

    model: str = "bench"
    family: str = "showo2"
    upstream: Path | None = None
    tasks: tuple[str, ...] = ("generation", "understanding")
    tokens: tuple[int, ...] = (1, 32, 64)
    steps: int = 50
    paper_steps: int = 35
    repeats: int = 3
    threads: int | None = None
    seed: int = 0
    drawing: str = "api"


class Subject(Protocol):
    """A model that generates and answers, by this library's loops or by upstream's."""

    name: str
    model: Any
    evaluates_only: bool
    """Its loop is not this library's and does not say which step a call is: every evaluation is whole."""

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor: ...

    def answer(self, inputs: Inputs, tokens: int) -> Tensor: ...


class OwnSubject:
    """This library's Show-o2, through `showo2.sample` and `showo2.answer_tokens`."""

    name = "flashu_ext"
    evaluates_only = False

    def __init__(self, model: nn.Module):
        self.model: Any = model

    def generate(self, inputs: Inputs, steps: int, guidance: float, shift: float) -> Tensor:
        from ..models.showo2 import sample

        return sample(
            self.model,
            inputs.noise,
            inputs.text_tokens,
            inputs.text_tokens_null,
            inputs.positions,
            inputs.positions_null,
            steps=steps,
            guidance_scale=guidance,
            time_shifting_factor=shift,
        )

    def answer(self, inputs: Inputs, tokens: int) -> Tensor:
        from ..models.showo2 import answer_tokens

        return answer_tokens(self.model, inputs.image_latents, inputs.before, inputs.after, max_new_tokens=tokens)


@dataclass
class Row:
    """One line of the result: one task of one size, by one program under one preset.

    Attributes:
        size: grid points of an image, or new tokens of an answer.
        baseline: this row is what the task's other rows are compared with.
        backbone, head: evaluations that ran (dense: all of them); None for answers.
        seconds: one wall-clock time per round.
        difference: relative L2 distance of the latents to the baseline's of the same steps, if any.
        equal_tokens: leading tokens that equal the baseline's, of `size`; None for images.
    """

    task: str
    program: str
    preset: str
    size: int
    baseline: bool = False
    evaluations: int | None = None
    backbone: int | None = None
    head: int | None = None
    seconds: list[float] = field(default_factory=list)
    difference: float | None = None
    equal_tokens: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def disagrees(self) -> bool:
        """An exact row that does not equal its baseline."""
        if self.preset not in ("dense", "exact"):
            return False
        if self.equal_tokens is not None:
            return self.equal_tokens != self.size
        return self.difference is not None and not self.difference <= LATENT_TOLERANCE


@dataclass
class Report:
    """All rows, and what they were measured on."""

    settings: Settings
    rows: list[Row]
    machine: dict[str, str]
    command: str

    def baseline_of(self, row: Row) -> Row:
        """The baseline's image (of more steps where the row has fewer), or its answer of equal length."""
        same_task = [r for r in self.rows if r.baseline and r.task == row.task]
        return next((r for r in same_task if r.size == row.size), same_task[0])

    @property
    def agrees(self) -> bool:
        """Whether every row that promises the baseline's outputs has them."""
        return not any(row.disagrees for row in self.rows)

    def disagreement(self) -> str:
        row = next(row for row in self.rows if row.disagrees)
        if row.equal_tokens is not None:
            return f"{row.program} {row.preset}: {row.equal_tokens} of {row.size} tokens equal the baseline's"
        expected = f"expected latents within {LATENT_TOLERANCE:g} of the baseline's"
        return f"{row.program} {row.preset}: {expected}, got {row.difference:.2e}"

    def to_json(self) -> str:
        rows = []
        for row in self.rows:
            base = self.baseline_of(row)
            rows.append(
                dataclasses.asdict(row)
                | {
                    "median": row.median,
                    "speedup": base.median / row.median,
                    "equal_steps": base.size == row.size,
                }
            )
        settings = dataclasses.asdict(self.settings)
        settings["upstream"] = str(self.settings.upstream) if self.settings.upstream else None
        record = {"command": self.command, "machine": self.machine, "settings": settings, "rows": rows}
        return json.dumps(record, indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        header = (
            "task",
            "program",
            "preset",
            "size",
            "compared at",
            "backbone",
            "head",
            "s (median)",
            "x baseline",
            "output",
        )
        lines = [header]
        for row in self.rows:
            base = self.baseline_of(row)
            size = f"{row.size} points" if row.task == "generation" else f"{row.size} tokens"
            equal = "equal steps" if base.size == row.size else f"{base.size} points"
            lines.append(
                (
                    row.task,
                    row.program,
                    row.preset,
                    size,
                    "baseline" if row.baseline else equal if row.task == "generation" else "equal tokens",
                    "" if row.backbone is None else str(row.backbone),
                    "" if row.head is None else str(row.head),
                    f"{row.median:.3f}",
                    f"{base.median / row.median:.2f}",
                    _output_column(row),
                )
            )
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return "\n".join(
            [text_table(lines, rule=True), "", about, f"{self.settings.repeats} interleaved rounds; {self.command}"]
        )


def _output_column(row: Row) -> str:
    if row.baseline:
        return ""
    if row.equal_tokens is not None:
        return f"{row.equal_tokens}/{row.size} tokens equal"
    if row.difference is not None:
        return f"{row.difference:.1e} from baseline"
    return "other steps"


@dataclass
class _Case:
    """A row with what produces it."""

    row: Row
    subject: Subject
    config: FlashUConfig | None
    action: Callable[[int | None], Tensor]
    output: Tensor | None = None


def run(settings: Settings, say: Callable[[str], None] | None = None) -> Report:
    """Measure everything that `settings` asks for.

    Args:
        settings: model, rows, rounds.
        say: called with progress messages; None: a tqdm bar on stderr.

    Raises:
        ValueError, ImportError: the upstream checkout cannot be used.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    shape = SHAPES[settings.model]
    own, upstream = _subjects(settings, shape)
    cases = _cases(settings, shape, own, upstream)
    plans = {id(subject): weight_plan(subject.model, shape.prune_multiple) for subject in (own, upstream) if subject}
    for case in cases:  # short, to allocate and to load kernels outside the measurement
        with _under(case, plans):
            case.action(3)
    with _progress(settings.repeats * len(cases), say) as advance:
        for _ in range(settings.repeats):
            for case in cases:
                with _under(case, plans) as handle:
                    start = time.perf_counter()
                    case.output = case.action(None)
                    case.row.seconds.append(time.perf_counter() - start)
                    _count(case.row, handle)
                advance(f"{case.row.task} {case.row.program} {case.row.preset} {case.row.size}")
    _compare(cases)
    return Report(settings, [case.row for case in cases], machine.facts(), machine.command_line())


def _upstream(family: str, directory: Path, own: Any) -> Any:
    """The same of a checkout's unmodified class, on the same weights."""
    from .upstream_bagel import UpstreamBagelSubject
    from .upstream_janusflow import UpstreamJanusFlowSubject

    return {"bagel": UpstreamBagelSubject, "janusflow": UpstreamJanusFlowSubject}[family](directory, own)


def _subjects(settings: Settings, shape: Shape) -> tuple[Subject, Subject | None]:
    from ..models.showo2 import Showo2

    if (subject := SUBJECTS.get(settings.family)) is not None:
        own = subject(settings.model, settings.seed, settings.drawing)
        return own, None if settings.upstream is None else _upstream(settings.family, settings.upstream, own)

    model = Showo2(shape.config).eval()
    fill(model, settings.seed)
    if settings.upstream is None:
        return OwnSubject(model), None
    from .upstream import build

    upstream = build(settings.upstream, shape.config)
    upstream.model.load_state_dict(model.state_dict(), strict=True)
    return OwnSubject(model), upstream


def _cases(settings: Settings, shape: Shape, own: Subject, upstream: Subject | None) -> list[_Case]:
    data = inputs(shape, settings.seed)
    exact = FlashUConfig.exact()

    def paper(steps: int) -> FlashUConfig:
        return FlashUConfig.paper(steps=steps, prune_multiple=shape.prune_multiple)

    base: Subject = upstream or own
    extrapolates = settings.drawing == "taylorseer"
    cases: list[_Case] = []

    def generate(
        subject: Subject, preset: str, steps: int, config: FlashUConfig | None, baseline: bool = False
    ) -> None:
        counts = (None,) * 3 if extrapolates and config is None else (steps - 1,) * 3
        row = Row("generation", subject.name, preset, steps, baseline, *counts)

        def action(short: int | None) -> Tensor:
            return subject.generate(data, short or steps, GUIDANCE, SHIFT)

        cases.append(_Case(row, subject, config, action))

    def answer(subject: Subject, preset: str, tokens: int, config: FlashUConfig | None, baseline: bool = False) -> None:
        def action(short: int | None) -> Tensor:
            return subject.answer(data, short or tokens)

        cases.append(_Case(Row("understanding", subject.name, preset, tokens, baseline), subject, config, action))

    subjects: list[Subject] = [own] if upstream is None else [own, upstream]
    if "generation" in settings.tasks:
        generate(base, "dense", settings.steps, None, baseline=True)
        for subject in subjects:
            generate(subject, "exact", settings.steps, exact)
        for steps in dict.fromkeys((settings.steps, settings.paper_steps)):
            for subject in subjects if steps == settings.paper_steps else [own]:
                # TaylorSeer predicts what the preset would cache.
                if not subject.evaluates_only and not extrapolates:
                    generate(subject, "paper", steps, paper(steps))
    if "understanding" in settings.tasks:
        for tokens in settings.tokens:
            answer(base, "dense", tokens, None, baseline=True)
            for subject in subjects:
                answer(subject, "exact", tokens, exact)
            answer(own, "paper", tokens, paper(settings.paper_steps))
            halved = paper(settings.paper_steps).replace(token_prune_ratio=0.5)
            answer(own, "paper, half the image", tokens, halved)
    return cases


@contextmanager
def _under(case: _Case, plans: dict[int, TaskPlan]) -> Iterator[Any]:
    """The case's subject as its row says; a fresh handle, so that nothing is reused between rounds."""
    if case.config is None:
        yield None
        return
    plan = plans[id(case.subject)] if case.config.needs_plan else None
    with accelerate(case.subject.model, case.config, plan) as handle:
        yield handle


def _count(row: Row, handle: Any) -> None:
    if handle is not None and row.task == "generation" and handle.runner.last_image is not None:
        summary = handle.summary()
        row.backbone, row.head = summary.backbone_evaluations, summary.head_evaluations


def _compare(cases: list[_Case]) -> None:
    for case in cases:
        base = next(
            (c for c in cases if c.row.baseline and c.row.task == case.row.task and c.row.size == case.row.size),
            None,
        )
        if base is None or base.output is None or case.output is None:
            continue
        if case.row.task == "generation":
            distance = torch.linalg.vector_norm(case.output.double() - base.output.double())
            case.row.difference = float(distance / torch.linalg.vector_norm(base.output.double()))
        else:
            same = (case.output.flatten() == base.output.flatten()).long()
            case.row.equal_tokens = int(same.cumprod(0).sum())


@contextmanager
def _progress(total: int, say: Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    if say is not None:
        yield say
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda text: None
        return
    with tqdm(total=total, unit="run", leave=False) as bar:

        def advance(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        yield advance
