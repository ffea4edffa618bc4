"""Room: report. Writes a demo's result as a self-contained page, a picture and JSON."""

from __future__ import annotations

import os
from pathlib import Path

from . import plots
from .result import DemoResult

__all__ = ["render", "write_report"]

TEMPLATE = Path(__file__).with_name("demo.html.j2")


def render(result: DemoResult) -> str:
    """The page as HTML; it refers to no other file.

    Raises:
        ImportError: jinja2 or matplotlib is missing; the message says how to install them.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"report: {error.name} is needed; install it with: pip install 'flashu_ext[report]'"
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    kinds = {kind: color for kind, color in plots.KIND_COLORS.items() if any(kind in p.kinds for p in result.presets)}
    return template.render(
        result=result,
        dense=result.presets[0],
        kinds=kinds,
        image_plot=plots.times(result, "image_seconds", "One image"),
        answer_plot=plots.times(result, "answer_seconds", "One answer"),
        timeline=plots.timeline(result),
        png=lambda content: plots.data_uri(content, "image/png"),
    )


def write_report(result: DemoResult, folder: Path) -> Path:
    """Write report.html, gallery.png and results.json into `folder`, and return the page's path.

    The page is complete or absent: it is written beside its place and moved there.
    """
    page = render(result)
    folder.mkdir(parents=True, exist_ok=True)
    plots.gallery(result, folder / "gallery.png")
    (folder / "results.json").write_text(result.to_json(), encoding="utf-8")
    path = folder / "report.html"
    draft = path.with_suffix(".html.part")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return path
