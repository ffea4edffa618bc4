"""Figures of an analysis: overlap of critical sets, effect of removing them, redundant layers, drift."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .figures import GRID, INK, MUTED, SERIES, figure, style, svg

if TYPE_CHECKING:
    from ..studies.analysis import Analysis, Drift

__all__ = ["drift", "importance", "overlap", "removal"]


def _label(of: str) -> str:
    """Of a set of removed neurons, 'task:most', 'task:least' or 'random'."""
    task, _, end = of.partition(":")
    return f"{task}'s {end} important" if end else task


def overlap(result: Analysis) -> str:
    """Jaccard index by size of the critical set: between tasks, between halves of one task, of random sets; SVG."""
    drawn, axes = figure(6.4, 3.2)
    style(axes)
    x = [100 * o.fraction for o in result.overlaps]
    for o, at in zip(result.overlaps, x, strict=True):
        axes.scatter([at] * len(o.tasks), o.tasks, s=9, color=SERIES[1], alpha=0.4, linewidths=0)
    axes.plot(x, [o.mean for o in result.overlaps], "o-", color=SERIES[1], label="between the two tasks")
    for color, task in zip((SERIES[0], SERIES[2]), result.pair, strict=True):
        axes.plot(
            x, [o.mean_half(task) for o in result.overlaps], ".--", color=color, label=f"{task}: two halves of samples"
        )
    axes.plot(x, [o.expected for o in result.overlaps], ":", color=MUTED, label="random sets (expected)")
    axes.set(ylim=(0, 1.02), xlabel="size of the critical set, % of a layer", ylabel="Jaccard index")
    axes.legend(fontsize=8, frameon=False)
    return svg(drawn)


def removal(result: Analysis) -> str:
    """Adherence and accuracy by removed share, a line per set, with intervals; SVG."""
    drawn, both = figure(9.6, 3.4, 2)
    for axes, measure, title in zip(both, ("adherence", "accuracy"), ("Right drawings", "Right answers"), strict=True):
        style(axes)
        for color, of in zip(itertools.cycle(SERIES), dict.fromkeys(r.of for r in result.removals), strict=False):
            chosen = [result.intact, *(r for r in result.removals if r.of == of)]
            shares = [getattr(r, measure) for r in chosen]
            low, high = zip(*(share.interval for share in shares), strict=True)
            x = [100 * r.fraction for r in chosen]
            axes.plot(x, [share.value for share in shares], "o-", ms=4, color=color, label=_label(of))
            axes.fill_between(x, low, high, color=color, alpha=0.08, linewidth=0)
        axes.set(ylim=(0, 1.02), xlabel="removed, % of every layer's neurons")
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        axes.grid(axis="y", color=GRID)
    both[0].legend(fontsize=8, frameon=False)
    return svg(drawn)


def importance(result: Analysis) -> str:
    """1 - cosine of every layer's input and output: generation by time, understanding beside it; SVG."""
    drawn, axes = figure(9.6, 3.0, 2)
    last = None
    names = ("generation", "understanding")
    top = max(max(map(max, table)) for table in result.importance.values())
    for one, task in zip(axes, names, strict=True):
        style(one)
        table = result.importance[task]
        last = one.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        one.set_xticks(range(result.layers))
        rows = [f"t = {t:g}" for t in result.times] if task == "generation" else ["prompt's last token", "all tokens"]
        one.set_yticks(range(len(table)), rows[: len(table)])
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                one.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value < 0.6 * top else INK,
                )
        one.set_xlabel("layer")
        one.set_title(task, loc="left", fontsize=10.5, color=INK)
    drawn.colorbar(last, ax=list(axes), shrink=0.8)
    return svg(drawn)


def drift(found: Drift) -> str:
    """Relative change of the head's output from one evaluation to the next; SVG."""
    drawn, axes = figure(6.4, 2.8)
    style(axes)
    x = range(2, 2 + len(found.relative_l1))
    axes.plot(x, found.relative_l1, color=SERIES[0], label="relative L1")
    axes.plot(x, found.relative_l2, color=SERIES[1], label="relative L2")
    axes.plot(x, [1 - c for c in found.cosine], color=SERIES[2], label="1 - cosine")
    axes.set(xlabel="evaluation", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    axes.grid(axis="y", color=GRID)
    return svg(drawn)
