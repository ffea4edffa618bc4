"""Shared by all figures: colors, axis style, and embedding as SVG data URIs."""

from __future__ import annotations

import base64
import io
from typing import Any

from ..planning.extras import extra

__all__ = ["GRID", "INK", "MUTED", "SERIES", "data_uri", "figure", "style", "svg"]

INK, MUTED, GRID = "#1c2333", "#6b7386", "#e3e6ee"
SERIES = ("#3d6fd6", "#e0762f", "#2f9c72", "#8d5bd0", "#c4442b", "#9aa3b5")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of inches with `columns` axes beside each other: one, or an array of them."""
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.patch.set_alpha(0)
    return drawn, drawn.subplots(1, columns)


def style(axes: Any) -> None:
    """No frame, quiet ticks."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)


def svg(drawn: Any) -> str:
    """The figure as an SVG data URI."""
    with extra("report"):
        import matplotlib

    buffer = io.BytesIO()
    # No date and no random names in the file, so that equal results give equal pages.
    with matplotlib.rc_context({"svg.hashsalt": "flashu_ext"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
