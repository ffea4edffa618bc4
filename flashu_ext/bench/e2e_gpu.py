"""`flashu-ext bench e2e --gpu`: whole images and answers on random weights of the published shapes.

Unmodified Show-o2 (given a checkout), our dense model, torch.compile of it, exact, paper and fast, in one process and
within a budget of seconds: what did not fit says so, and a row that fails says why. Needs no network.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import machine
from ..planning.config import FlashUConfig
from ..planning.plan import TaskPlan
from ..planning.safe_files import write_text
from ..runtime.handle import accelerate
from .e2e import GUIDANCE, SHIFT, OwnSubject, Subject
from .launches import BUCKETS, observe
from .shapes import SHAPES, Inputs, Shape, fill_on_device, inputs, weight_plan

__all__ = ["VARIANTS", "Report", "Row", "Settings", "check", "run", "table_rows"]

VARIANTS = ("Show-o2 (upstream)", "dense", "exact", "paper", "fast", "torch.compile of dense")
TASKS = ("generation", "understanding")
OVER_BUDGET = "not run: budget"
# Grid points of the two short images whose difference is one evaluation's time, and which are profiled.
SHORT, LONGER = 3, 6


@dataclass(frozen=True)
class Settings:
    """What is measured; see `flashu-ext bench e2e --help`. budget: seconds for everything, models included."""

    models: tuple[str, ...] = ("1.5b", "7b")
    batches: tuple[int, ...] = (1, 4)
    variants: tuple[str, ...] = VARIANTS
    tasks: tuple[str, ...] = TASKS
    upstream: Path | None = None
    device: str = "cuda"
    budget: float = 540.0
    steps: int = 50
    paper_steps: int = 35
    tokens: int = 64
    repeats: int = 3
    seed: int = 0
    threads: int | None = None


@dataclass
class Row:
    """One task by one variant of one model at one batch.

    Attributes:
        size: grid points of the images, or new tokens of the answers.
        seconds: of the whole batch, one for each round; empty where `note` says why.
        extrapolated: `seconds` is one number, from images of 3 and 6 grid points, because whole ones did not fit.
        observed: evaluations (or new tokens) of the profiled run, its one-time work (prompt, prefill) included.
        launches, kernels, syncs, operations: of the profiled run, for each observed evaluation; see `launches.Asked`.
        milliseconds: kind of work -> ms for each observed evaluation.
        peak_bytes: most memory that torch's allocator held, weights included; None on a CPU.
    """

    model: str
    batch: int
    task: str
    variant: str
    size: int
    seconds: list[float] = field(default_factory=list)
    extrapolated: bool = False
    observed: int | None = None
    launches: float | None = None
    kernels: float | None = None
    syncs: float | None = None
    operations: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    note: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds for the whole batch."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Report:
    """All rows, and what they were measured on."""

    settings: Settings
    rows: list[Row]
    machine: dict[str, str]
    command: str
    wall_seconds: float

    def record(self) -> dict[str, Any]:
        """The report as JSON values, as `check` wants them."""
        settings = dataclasses.asdict(self.settings)
        settings["upstream"] = str(self.settings.upstream) if self.settings.upstream else None
        rows = [
            dataclasses.asdict(row)
            | {
                "median": row.median,
                "seconds_each": row.median / row.batch if row.median else None,
                "each_per_second": row.batch / row.median if row.median else None,
            }
            for row in self.rows
        ]
        return {
            "command": self.command,
            "machine": self.machine,
            "settings": settings,
            "wall_seconds": self.wall_seconds,
            "rows": rows,
        }

    def save(self, path: Path) -> None:
        """Write the record as JSON: the file is the old one or the whole new one."""
        text = json.dumps(check(self.record()), indent=1, allow_nan=False) + "\n"
        write_text(path, text)

    def table(self) -> str:
        header, rows = table_rows(self.record())
        lines = [header, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return "\n".join([*text, "", about, f"{self.wall_seconds:.0f} s in all; {self.command}"])


def check(record: Any) -> dict[str, Any]:
    """The record, where it is what `Report.record` makes.

    Raises:
        ValueError: it is not; the field is named, with what was expected.
    """
    if not isinstance(record, dict) or not {"command", "machine", "settings", "rows"} <= record.keys():
        raise ValueError("record: expected an object with command, machine, settings and rows")
    if not isinstance(record["rows"], list) or not record["rows"]:
        raise ValueError(f"rows: expected a list with rows, got {type(record['rows']).__name__}")
    names = {each.name for each in dataclasses.fields(Row)} | {"median", "seconds_each", "each_per_second"}
    for i, row in enumerate(record["rows"]):
        if not isinstance(row, dict) or set(row) != names:
            raise ValueError(f"rows[{i}]: expected exactly the fields {', '.join(sorted(names))}")
        if row["task"] not in TASKS:
            raise ValueError(f"rows[{i}].task: expected one of {', '.join(TASKS)}, got {row['task']!r}")
        numbers = [*row["seconds"], *row["milliseconds"].values()]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError(f"rows[{i}]: expected finite seconds and milliseconds, got {numbers}")
        if row["milliseconds"] and set(row["milliseconds"]) != set(BUCKETS):
            raise ValueError(f"rows[{i}].milliseconds: expected the kinds {', '.join(BUCKETS)}")
        if bool(row["seconds"]) == bool(row["note"]):
            raise ValueError(f"rows[{i}]: expected seconds, or a note that says why there are none")
    return record


def table_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of a record, for people: the README's table and the terminal's."""
    header = ["model", "batch", "task", "variant", "s each", "each / s", "speed-up", "launches", "syncs", "peak GiB"]

    def count(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = []
    for row in record["rows"]:
        same = [r for r in record["rows"] if all(r[k] == row[k] for k in ("model", "batch", "task"))]
        base = next((r for name in VARIANTS[:2] for r in same if r["variant"] == name and r["median"]), None)
        drawing = row["task"] == "generation"
        cells = [
            row["model"],
            str(row["batch"]),
            f"image, {row['size']} points" if drawing else f"{row['size']} tokens",
        ]
        cells.append(row["variant"])
        if row["median"] is None:
            rows.append([*cells, row["note"], *[""] * 5])
            continue
        launches = row["launches"]
        rows.append(
            [
                *cells,
                f"{'~' if row['extrapolated'] else ''}{row['seconds_each']:.3f}",
                f"{row['each_per_second']:.3f}",
                "baseline" if row is base else f"{base['median'] / row['median']:.2f}x" if base else "",
                count(launches) if row["operations"] is None else f"{count(row['operations'])} operations",
                count(row["syncs"]),
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
            ]
        )
    return header, rows


@dataclass
class _Case:
    """A row with what produces it. `scheduled`: its evaluations differ, so it is only ever run whole."""

    row: Row
    under: Callable[[], Any]
    action: Callable[[int], Any]
    scheduled: bool
    cost: float = 0.0


def run(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Report:
    """Measure everything that fits the budget.

    Raises:
        RuntimeError: there is no such device.
        ValueError: an unknown model or variant.
    """
    for name, values, known in (("model", settings.models, SHAPES), ("variant", settings.variants, VARIANTS)):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {unknown[0]!r}")
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--gpu: no CUDA device answers here, so nothing was measured")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    began = time.perf_counter()
    rows: list[Row] = []
    groups_left = len(settings.models) * len(settings.batches) * len(settings.tasks)
    for name in settings.models:
        with ExitStack() as stack:
            model = _model(settings, name, device, _left(settings, began))
            if isinstance(model, _Model):
                stack.callback(model.close)
            for batch in settings.batches:
                for task in settings.tasks:
                    cases = _cases(settings, name, model, batch, task)
                    rows += [case.row for case in cases]
                    share = _left(settings, began) / groups_left
                    _measure(cases, settings, device, time.perf_counter() + share, say)
                    groups_left -= 1
    facts = machine.facts() | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})
    return Report(settings, rows, facts, machine.command_line(), time.perf_counter() - began)


def _left(settings: Settings, began: float) -> float:
    return settings.budget - (time.perf_counter() - began)


# ---- models


class _Model:
    """Our model of one shape on the device, upstream's on the same weights, and the plan that paper needs."""

    def __init__(self, settings: Settings, name: str, device: torch.device):
        from ..models.showo2 import Showo2

        self.shape, self.device = SHAPES[name], device
        dtype = torch.bfloat16
        with torch.device(device), _default_dtype(dtype):
            model = Showo2(self.shape.config).eval()
        fill_on_device(model, settings.seed)
        self.own = _BatchSubject(OwnSubject(model))
        self.plan: TaskPlan = weight_plan(model, self.shape.prune_multiple)
        self.upstream: _BatchSubject | None = None
        self.why_no_upstream = "not run: no Show-o2 checkout (--upstream DIR or SHOWO2_UPSTREAM)"
        if settings.upstream is not None and VARIANTS[0] in settings.variants:
            try:
                self.upstream = _BatchSubject(_upstream(settings.upstream, self.shape, model, device, dtype))
            except Exception as error:  # the other rows are still worth having
                self.why_no_upstream = _reason(error)
        self.settings = settings

    def data(self, batch: int) -> list[Inputs]:
        """One `Inputs` for each image, on the device."""

        def moved(value: Inputs) -> Inputs:
            tensors = {name: tensor.to(self.device) for name, tensor in vars(value).items()}
            tensors["image_latents"] = tensors["image_latents"].to(torch.bfloat16)
            return Inputs(**tensors)

        return [moved(inputs(self.shape, self.settings.seed + i)) for i in range(batch)]

    def close(self) -> None:
        self.upstream, self.own = None, None  # type: ignore[assignment]
        _free(self.device)


def _model(settings: Settings, name: str, device: torch.device, left: float) -> _Model | str:
    """The model, or why it has no rows."""
    if left <= 0:
        return OVER_BUDGET
    try:
        return _Model(settings, name, device)
    except Exception as error:  # too large for this device: the other model's rows are still worth having
        _free(device)
        return _reason(error)


def _upstream(directory: Path, shape: Shape, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Subject:
    """Upstream's class holding our model's very tensors, so that two models need the memory of one."""
    from .upstream import build

    with torch.device(device), _default_dtype(dtype):
        subject = build(directory, shape.config)
    subject.model.load_state_dict(model.state_dict(), strict=True, assign=True)
    subject.model.eval()
    return subject


class _BatchSubject:
    """Generates images as one batch, and answers as one batch or, like upstream, one by one."""

    def __init__(self, subject: Subject):
        self.subject, self.model = subject, subject.model

    def generate(self, data: Sequence[Inputs], steps: int) -> Tensor:
        names = ("noise", "text_tokens", "text_tokens_null", "positions", "positions_null")
        together = {name: torch.cat([getattr(each, name) for each in data]) for name in names}
        return self.subject.generate(dataclasses.replace(data[0], **together), steps, GUIDANCE, SHIFT)

    def answer(self, data: Sequence[Inputs], tokens: int) -> Any:
        if not isinstance(self.subject, OwnSubject):
            return [self.subject.answer(each, tokens) for each in data]
        from ..models.showo2 import answer_tokens_batch

        befores, afters = [each.before for each in data], [each.after for each in data]
        latents = torch.cat([each.image_latents for each in data])
        return answer_tokens_batch(self.model, latents, befores, afters, max_new_tokens=tokens)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _compiled(model: Any) -> Iterator[None]:
    """torch.compile of each layer: layers share one compilation, the whole model would take minutes of the budget."""
    layers = [*model.showo.model.layers, *model.und_trans.layers, *model.diffusion_head_a]
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    yield


# ---- rows


def _cases(settings: Settings, name: str, model: _Model | str, batch: int, task: str) -> list[_Case]:
    data = [] if isinstance(model, str) else model.data(batch)
    multiple = SHAPES[name].prune_multiple
    configs = {
        "exact": FlashUConfig.exact(),
        "paper": FlashUConfig.paper(steps=settings.paper_steps, prune_multiple=multiple),
        "fast": FlashUConfig.fast(prune_multiple=multiple),
    }
    cases = []
    for variant in settings.variants:
        config = configs.get(variant)
        steps = (config.steps if config is not None else None) or settings.steps
        scheduled = config is not None and bool(config.approximates)
        row = Row(name, batch, task, variant, steps if task == "generation" else settings.tokens)
        subject = None
        if isinstance(model, str):
            row.note = model
        elif variant == VARIANTS[0]:
            subject = model.upstream
            row.note = None if subject is not None else model.why_no_upstream
        else:
            subject = model.own
        if isinstance(model, str) or subject is None:
            cases.append(_Case(row, lambda: None, lambda size: None, scheduled))
            continue
        plan = None
        if config is not None and config.needs_plan:
            plan = model.plan.with_pruning(config.ffn)
        cases.append(_Case(row, _entering(variant, subject, config, plan), _action(subject, data, task), scheduled))
    return cases


def _entering(
    variant: str, subject: _BatchSubject, config: FlashUConfig | None, plan: TaskPlan | None
) -> Callable[[], Any]:
    if config is not None:
        return lambda: accelerate(subject.model, config, plan)
    if variant == VARIANTS[-1]:
        return lambda: _compiled(subject.model)
    return lambda: _as_it_is(subject.model)


def _action(subject: _BatchSubject, data: Sequence[Inputs], task: str) -> Callable[[int], Any]:
    if task == "generation":
        return lambda steps: subject.generate(data, steps)
    return lambda tokens: subject.answer(data, tokens)


def _measure(
    cases: list[_Case], settings: Settings, device: torch.device, end: float, say: Callable[[str], None]
) -> None:
    """Rounds over the cases until the group's time is over; the first round is the one that decides what can be said."""
    for round_ in range(settings.repeats):
        for position, case in enumerate(cases):
            left = end - time.perf_counter()
            if case.row.note is not None or (round_ > 0 and (case.row.extrapolated or case.cost > left)):
                continue
            if left <= 0:
                case.row.note = OVER_BUDGET
                continue
            began = time.perf_counter()
            try:
                with case.under():
                    _visit(case, device, round_ == 0, left / (len(cases) - position))
            except Exception as error:  # out of memory, a checkout that does not run here: the row says so
                if not case.row.seconds:
                    case.row.note = _reason(error)
                _free(device)
            case.cost = time.perf_counter() - began
            row = case.row
            done = f"{row.median:.3f} s" if row.median is not None else row.note
            say(f"{row.model} batch {row.batch} {row.task} {row.variant}: {done}")


def _visit(case: _Case, device: torch.device, first: bool, limit: float) -> None:
    """Warm up under this round's fresh handle, then time the whole image or answer, or extrapolate it if it is too long."""
    row, size = case.row, case.row.size
    if row.task == "generation":
        short = size if case.scheduled else min(SHORT, size)
    else:
        short = min(2, size)
    _timed(case, short, device)
    again = _timed(case, short, device) if first else 0.0
    whole = True
    if first:
        whole = _fits(case, short, again, device, limit)
        if not row.extrapolated and not whole:
            row.note = OVER_BUDGET
            return
    if whole:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row.seconds.append(again if first and short == size else _timed(case, size, device))
        if device.type == "cuda":
            row.peak_bytes = torch.cuda.max_memory_allocated(device)
    if first:
        _observe(case, device)


def _fits(case: _Case, short: int, seconds: float, device: torch.device, limit: float) -> bool:
    """Whether the whole is run. An image of equal evaluations that is too long gets an extrapolated time."""
    row = case.row
    if short == row.size:
        return True
    if row.task == "understanding":
        return seconds / short * row.size <= limit
    longer = min(LONGER, row.size)
    if longer == short:
        return True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    more = _timed(case, longer, device)
    estimate = more + (row.size - longer) * max(0.0, more - seconds) / (longer - short)
    if estimate <= limit:
        return True
    row.extrapolated = True
    row.seconds.append(estimate)
    row.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return False


def _timed(case: _Case, size: int, device: torch.device) -> float:
    """Seconds of one run: by events on a GPU, from an idle device to the end of its last kernel."""
    if device.type != "cuda":
        began = time.perf_counter()
        case.action(size)
        return time.perf_counter() - began
    torch.cuda.synchronize(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    case.action(size)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _observe(case: _Case, device: torch.device) -> None:
    """Fill in what the profiler sees; a row keeps its times where the profiler fails."""
    row = case.row
    drawing = row.task == "generation"
    size = row.size if case.scheduled or not drawing else min(LONGER, row.size)
    if not drawing:
        size = min(8, row.size)
    row.observed = size - 1 if drawing else size
    asked = observe(lambda: case.action(size), device)
    for name in ("launches", "kernels", "syncs", "operations"):
        value = getattr(asked, name)
        setattr(row, name, None if value is None else value / row.observed)
    if row.variant == VARIANTS[-1]:
        row.operations = None  # counting them makes torch run the layers uncompiled
    row.milliseconds = {kind: value / row.observed for kind, value in asked.milliseconds.items()}


def _reason(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
