"""Figures of the fidelity report: cost against fidelity, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .figures import GRID, INK, MUTED, SERIES, figure, style, svg

if TYPE_CHECKING:
    from ..studies.comparison import Point

__all__ = ["front", "pareto"]

MARKS = {
    "dense, fewer steps": ("o", SERIES[5]),
    "exact": ("s", SERIES[0]),
    "exact, fewer steps": ("s", SERIES[0]),
    "paper": ("D", SERIES[1]),
    "one knob": (".", SERIES[3]),
    "fast": ("*", SERIES[2]),
}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points (cost, fidelity), sorted by cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best = float("-inf")
    result = []
    for i in order:
        if points[i][1] > best:
            result.append(i)
            best = points[i][1]
    return result


def pareto(
    points: Sequence[Point],
    cost: Callable[[Point], float],
    fidelity: Callable[[Point], float],
    labels: tuple[str, str],
    interval: Callable[[Point], tuple[float, float]] | None = None,
) -> str:
    """A scatter of cost and fidelity with the front as a line; SVG.

    Args:
        labels: of the two axes.
        interval: error bars of fidelity.
    """
    drawn, axes = figure(5.4, 3.6)
    style(axes)
    values = [(cost(p), fidelity(p)) for p in points]
    best = front(values)
    axes.plot(
        [values[i][0] for i in best], [values[i][1] for i in best], color=MUTED, linewidth=0.8, drawstyle="steps-post"
    )
    seen: set[str] = set()
    for point, (x, y) in zip(points, values, strict=True):
        marker, color = MARKS.get(point.group, ("o", INK))
        label = point.group if point.group not in seen else None
        seen.add(point.group)
        if interval is not None:
            low, high = interval(point)
            axes.vlines(x, low, high, color=color, alpha=0.35, linewidth=1)
        axes.scatter([x], [y], marker=marker, s=70 if marker == "*" else 28, color=color, label=label, zorder=3)
        if point.group in ("paper", "fast", "exact") or point.name == "dense":
            axes.annotate(point.name, (x, y), textcoords="offset points", xytext=(5, -10), fontsize=7.5, color=INK)
    axes.set_xscale("log")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.6, color=GRID)
    axes.legend(fontsize=7, frameon=False)
    return svg(drawn)
