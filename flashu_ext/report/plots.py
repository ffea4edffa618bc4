"""Figures of a demo: as SVG for the page, and one PNG that shows the gallery."""

from __future__ import annotations

import io
import statistics
import textwrap
from pathlib import Path

from ..planning.extras import extra
from ..planning.safe_files import atomic_path
from .figures import GRID, INK, MUTED, figure, style, svg
from .result import DemoResult

__all__ = ["KIND_COLORS", "gallery", "timeline", "times"]

PRESET_COLORS = ("#9aa3b5", "#3d6fd6", "#e0762f", "#2f9c72")
KIND_COLORS = {
    "full": "#3d6fd6",
    "measure": "#8d5bd0",
    "measure only": "#c9a8ef",
    "pruned": "#e0762f",
    "head residual": "#f0b98f",
    "head cached": "#e3e6ee",
}


def times(result: DemoResult, attribute: str, title: str) -> str:
    """Bars of `image_seconds` or `answer_seconds` medians, each round as a dot; an SVG data URI.

    Rounds far beyond the longest bar are arrows at the edge: one slow round does not shrink the bars.
    """
    drawn, axes = figure(4.6, 1.9)
    style(axes)
    milliseconds = [[1e3 * seconds for seconds in getattr(preset, attribute)] for preset in result.presets]
    medians = [statistics.median(rounds) for rounds in milliseconds]
    edge = 1.3 * max(medians)
    for row, (rounds, median) in enumerate(zip(milliseconds, medians, strict=True)):
        axes.barh(row, median, color=PRESET_COLORS[row % len(PRESET_COLORS)], height=0.62, zorder=2)
        inside = [value for value in rounds if value <= edge]
        axes.scatter(inside, [row] * len(inside), s=7, color=INK, alpha=0.45, zorder=3, linewidths=0)
        if len(inside) < len(rounds):
            axes.scatter([edge], [row], s=14, color=INK, alpha=0.45, zorder=3, linewidths=0, marker=">")
        label = f" {median:.3g} ms" + (f"   {medians[0] / median:.1f}x" if row else "")
        axes.text(max(median, *inside), row, label, va="center", ha="left", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(result.presets)), [preset.name for preset in result.presets], color=INK, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * edge)
    axes.set_xticks([])
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    return svg(drawn)


def timeline(result: DemoResult) -> str:
    """What every evaluation of one image computes, a row per preset; an SVG data URI."""
    drawn, axes = figure(9.6, 0.55 + 0.42 * len(result.presets))
    style(axes)
    axes.spines["bottom"].set_visible(False)
    for row, preset in enumerate(result.presets):
        for index, kind in enumerate(preset.kinds):
            axes.barh(row, 0.86, left=index + 0.57, height=0.66, color=KIND_COLORS.get(kind, MUTED))
    longest = max(len(preset.kinds) for preset in result.presets)
    axes.set_yticks(range(len(result.presets)), [preset.name for preset in result.presets], color=INK, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0.4, longest + 0.6)
    axes.set_xticks([1, *range(5, longest + 1, 5)])
    return svg(drawn)


def gallery(result: DemoResult, path: Path, columns: int = 6) -> None:
    """Write a PNG with the first drawings: a column per prompt, a row per preset."""
    with extra("report"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

    shown = result.drawings[:columns]
    figure = Figure(figsize=(1.45 * len(shown) + 1.0, 1.5 * len(result.presets) + 0.55), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(result.presets), len(shown), squeeze=False)
    for row, preset in enumerate(result.presets):
        for column, drawing in enumerate(shown):
            axes = grid[row][column]
            with Image.open(io.BytesIO(drawing.images[preset.name])) as image:
                axes.imshow(image.convert("RGB"), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(GRID)
            if row == 0:
                axes.set_title(_wrapped(drawing.prompt), fontsize=7.5, color=INK)
        label = f"{preset.name}\n{1e3 * preset.image_time:.0f} ms"
        if row:
            label += f", {result.image_speedup(preset):.1f}x"
        grid[row][0].set_ylabel(label, fontsize=9, color=INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _wrapped(text: str, width: int = 20) -> str:
    return "\n".join(textwrap.wrap(text, width))
