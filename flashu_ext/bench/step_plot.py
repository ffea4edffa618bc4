"""The plot of an `e2e --gpu` result: where the time of one evaluation, or of one token, goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..planning.safe_files import atomic_path
from .e2e_gpu import check
from .launches import BUCKETS

__all__ = ["plot"]

_COLORS = dict(zip(BUCKETS, ("#3d6fd6", "#e0762f", "#2f9e76", "#a15fc4", "#c9ced8"), strict=True))


def plot(record: dict[str, Any], path: Path) -> None:
    """Write a PNG: a bar for every profiled row, one panel for each task.

    Raises:
        ValueError: the record is not one of `bench e2e --gpu`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in check(record)["rows"] if row["milliseconds"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows)) or ["generation"]
    figure = Figure(figsize=(7 * len(tasks), 1.5 + 0.3 * max(1, len(rows) / len(tasks))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        bars = [row for row in rows if row["task"] == task][::-1]
        names = [f"{row['model']} x{row['batch']} {row['variant']}" for row in bars]
        left = [0.0] * len(bars)
        for kind in BUCKETS:
            widths = [row["milliseconds"][kind] for row in bars]
            axes.barh(range(len(bars)), widths, left=left, color=_COLORS[kind], label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), names, fontsize=7)
        axes.set_xlabel("ms an evaluation" if task == "generation" else "ms a token")
        axes.grid(axis="x", alpha=0.25)
    axes.legend(fontsize=7)
    machine = record["machine"]
    figure.suptitle(f"Under the profiler, on {machine.get('gpu', machine.get('cpu', ''))}", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
