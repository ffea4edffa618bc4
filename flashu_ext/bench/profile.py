"""Where a drawing's or an answer's CPU time goes: torch's profiler, operators of this library beside torch's own.

Shares are of the time inside operators; Python between them is in no share, and counts where a model is very small.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from ..ops import machine
from ..planning.config import FlashUConfig
from ..planning.safe_files import write_text
from ..planning.tables import text_table
from ..runtime.handle import accelerate
from .e2e import GUIDANCE, SHIFT, OwnSubject
from .shapes import SHAPES, fill, inputs, weight_plan

__all__ = ["Report", "Row", "main", "run"]

OURS = "flashu"
"""Namespace of this library's operators."""


@dataclass(frozen=True)
class Row:
    """An operator: its calls, and its share of the CPU time without that of operators that it calls."""

    operator: str
    calls: int
    share: float


@dataclass(frozen=True)
class Report:
    """Rows, largest share first.

    Attributes:
        seconds: of the thread that calls, inside operators; other threads work for them.
        ours: share of this library's operators.
    """

    task: str
    model: str
    preset: str
    size: int
    seconds: float
    ours: float
    rows: list[Row]
    machine: str
    command: str

    def table(self, most: int = 12) -> str:
        lines = [("operator", "calls", "% of the time")]
        lines += [(row.operator, str(row.calls), f"{100 * row.share:.2f}") for row in self.rows[:most]]
        rest = sum(row.share for row in self.rows[most:])
        lines.append((f"{len(self.rows[most:])} more", "", f"{100 * rest:.2f}"))
        return "\n".join(
            [
                f"{self.task} of {self.model} ({self.preset}), {self.seconds:.2f} s inside operators: {100 * self.ours:.1f} % in "
                "this library's",
                text_table(lines, rule=True),
                f"\n{self.machine}; {self.command}",
            ]
        )


def run(task: str = "generation", model: str = "bench", preset: str = "exact", size: int = 10) -> Report:
    """Profile one image or answer on random weights, after a short one.

    Args:
        task: 'generation' or 'understanding'. model: see `SHAPES`. preset: 'exact', 'paper' or 'fast'.
        size: grid points, or new tokens.
    """
    from ..models.showo2 import Showo2

    shape = SHAPES[model]
    subject = OwnSubject(Showo2(shape.config).eval())
    fill(subject.model, seed=0)
    data = inputs(shape, seed=0)
    own: dict[str, Any] = {} if preset == "exact" else {"steps": size, "prune_multiple": shape.prune_multiple}
    config = getattr(FlashUConfig, preset)(**own)
    plan = weight_plan(subject.model, shape.prune_multiple) if config.needs_plan else None

    def work(size: int) -> None:
        if task == "generation":
            subject.generate(data, size, GUIDANCE, SHIFT)
        else:
            subject.answer(data, size)

    with accelerate(subject.model, config, plan):
        work(3)
    # A handle of its own, so that nothing of the short one is reused.
    with (
        accelerate(subject.model, config, plan),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled,
    ):
        work(size)
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    rows = [Row(event.key, event.count, event.self_cpu_time_total / total) for event in events]
    rows.sort(key=lambda row: -row.share)
    ours = sum(row.share for row in rows if row.operator.startswith(f"{OURS}::"))
    return Report(task, model, preset, size, total / 1e6, ours, rows, machine.describe(), machine.command_line())


@click.command(epilog="Example: python -m flashu_ext.bench profile --preset paper --at-least 0.85")
@click.option(
    "--task",
    default="generation",
    show_default=True,
    type=click.Choice(("generation", "understanding")),
    help="An image or an answer.",
)
@click.option(
    "--model", default="bench", show_default=True, type=click.Choice(("bench", "tiny")), help="Random-weight model."
)
@click.option(
    "--preset", default="exact", show_default=True, type=click.Choice(("exact", "paper", "fast")), help="Of the model."
)
@click.option(
    "--size", default=10, show_default=True, type=click.IntRange(3), help="Grid points of an image, words of an answer."
)
@click.option(
    "--at-least",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Exit 1 where this library's kernels have a smaller share.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write all rows here.")
def main(task: str, model: str, preset: str, size: int, at_least: float, json_file: Path | None) -> None:
    """Profile an image or an answer: of the time inside operators the share of this library's, and of every one."""
    report = run(task, model, preset, size)
    click.echo(report.table())
    if json_file is not None:
        write_text(json_file, json.dumps(asdict(report), indent=1) + "\n")
    if report.ours < at_least:
        click.echo(f"expected at least {100 * at_least:g} % in this library's kernels", err=True)
        sys.exit(1)
