"""The roofline plot of a GPU result: every shape against what the device's product and copy reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..planning.safe_files import atomic_path

__all__ = ["plot"]


def plot(record: dict[str, Any], path: Path) -> None:
    """Write a PNG from a results.json of `python -m flashu_ext.bench gpu`.

    Dots are measured TFLOP/s over operations per byte that the problem needs at least; the line is the lower of the measured
    product and the measured copy. Shapes without operations to count (norms, routing) are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tflops, gbs = record["ceilings"]["tflops"], record["ceilings"]["gbs"]
    lines = [line for line in record["lines"] if line["flops"]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    intensities = [line["flops"] / line["bytes"] for line in lines]
    edges = [0.5 * min(intensities, default=1.0), 2.0 * max(intensities, default=1e4)]
    ridge = 1e3 * tflops / gbs
    corners = sorted({*edges, min(max(ridge, edges[0]), edges[1])})
    axes.plot(corners, [min(tflops, x * gbs / 1e3) for x in corners], color="#6b7386", label="measured ceilings")
    variants = [("ours", "o", "#e0762f"), ("baseline", "x", "#3d6fd6")]
    for role, marker, color in variants:
        points = [
            (x, line["flops"] / line["timing"]["microseconds"][line[role]] / 1e6)
            for x, line in zip(intensities, lines, strict=True)
            if line[role] in line["timing"]["microseconds"]
        ]
        name = lines[0][role] if lines else role
        axes.scatter(
            *zip(*points, strict=True) if points else ([], []), marker=marker, color=color, label=name, zorder=3
        )
    for x, line in zip(intensities, lines, strict=True):
        if line["ours"] in line["timing"]["microseconds"]:
            y = line["flops"] / line["timing"]["microseconds"][line["ours"]] / 1e6
            axes.annotate(line["shape"], (x, y), textcoords="offset points", xytext=(4, -9), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(f"Gathered FFN on {record['machine'].get('gpu', record['machine'].get('cpu', ''))}", loc="left")
    axes.grid(alpha=0.25)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


@click.command(epilog="Example: python -m flashu_ext.bench roofline out/results.json --out roofline.png")
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="PNG to write.")
def main(result: Path, out: Path) -> None:
    """Draw the roofline plot of RESULT, a results.json of the GPU command."""
    record = json.loads(result.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not {"ceilings", "lines", "machine"} <= record.keys():
        raise click.ClickException(f"{result}: expected a results.json of `python -m flashu_ext.bench gpu`")
    plot(record, out)
    click.echo(f"wrote {out}")
