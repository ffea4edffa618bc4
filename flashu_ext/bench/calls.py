"""`python -m flashu_ext.bench calls`: what a call of an operator costs beside its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from .. import ops
from ..models.showo2 import Showo2
from ..models.stamp import Stamp
from ..planning.safe_files import write_text
from .shapes import SHAPES
from .timing import Variant, measure

NEURONS, RUNS, LENGTH = 8960, 1120, 6
"""1.5B's FFN in the worst list of runs: one in each block of eight neurons, six of eight neurons kept."""


def variants(hidden: int) -> dict[str, Variant]:
    """gathered_ffn at one token with one list of neurons in each form that it takes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(1, hidden)
    weights = (random(NEURONS, hidden), random(NEURONS, hidden), random(hidden, NEURONS))
    runs = [(8 * block, LENGTH) for block in range(RUNS)]
    index = torch.cat([torch.arange(start, start + length) for start, length in runs])
    selection = ops.Selection.from_runs(runs, NEURONS)
    return {
        "one run": lambda: ops.gathered_ffn(x, *weights, runs=[0, RUNS * LENGTH]),
        f"{RUNS} runs": lambda: ops.gathered_ffn(x, *weights, runs=runs),
        "index": lambda: ops.gathered_ffn(x, *weights, index=index),
        "Selection": lambda: ops.gathered_ffn(x, *weights, selection=selection),
    }


def measured(seconds: float) -> dict[str, dict[str, float]]:
    """Medians in microseconds by hidden size and form; hidden 16 leaves little but the call."""
    cpu = torch.device("cpu")
    rounds = {16: 400, 1536: 60}
    return {
        str(hidden): measure(variants(hidden), cpu, seconds, count).microseconds for hidden, count in rounds.items()
    }


def stamp_microseconds(seconds: float) -> float:
    """What an image or an answer spends on noticing that the 1.5B model has not changed (on meta: no weight is read)."""
    with torch.device("meta"):
        model = Showo2(SHAPES["1.5b"].config)
    stamp = Stamp(model)
    unchanged = {"unchanged": lambda: not stamp.structure_changed() and not stamp.weights_changed()}
    return measure(unchanged, torch.device("cpu"), seconds, 400).microseconds["unchanged"]


def table(rows: dict[str, dict[str, float]]) -> str:
    """One Markdown row for each hidden size."""
    forms = list(next(iter(rows.values())))
    lines = [f"| hidden | {' | '.join(forms)} |", "|---:" * (len(forms) + 1) + "|"]
    lines += [
        f"| {hidden} | " + " | ".join(f"{row[form]:,.1f}" for form in forms) + " |" for hidden, row in rows.items()
    ]
    return "\n".join(lines)


@click.command(epilog="Example: python -m flashu_ext.bench calls --threads 1")
@click.option(
    "--seconds", default=20.0, show_default=True, type=click.FloatRange(0), help="Time spent on each hidden size."
)
@click.option("--threads", type=click.IntRange(1), help="torch threads (default: torch's own).")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(seconds: float, threads: int | None, json_path: Path | None) -> None:
    """Time gathered_ffn at one token and 1,120 runs: runs, index list and Selection. Microseconds a call, on the CPU."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows = measured(seconds)
    click.echo(
        f"gathered_ffn, fp32, 1 token, {NEURONS} neurons, {RUNS * LENGTH} kept; us a call, median\n\n{table(rows)}"
    )
    click.echo(f"\nnoticing that a 1.5B model has not changed: {stamp_microseconds(seconds):.0f} us")
    if json_path is not None:
        write_text(json_path, json.dumps(rows, indent=2) + "\n")
