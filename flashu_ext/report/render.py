"""Writes results as self-contained pages, with pictures and JSON beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..planning.extras import extra
from ..planning.safe_files import write_text
from . import analysis_plots, figures, pareto_plots, plots
from .result import DemoResult

__all__ = [
    "page",
    "render",
    "render_analysis",
    "render_evaluation",
    "render_fidelity",
    "write",
    "write_report",
]


def page(template: str, **values: Any) -> str:
    """A template of this folder as HTML that refers to no other file.

    Raises:
        ImportError: jinja2 or matplotlib is missing; the message says how to install them.
    """
    with extra("report"):
        import jinja2
        import matplotlib  # noqa: F401
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def render(result: DemoResult) -> str:
    """The demo's page."""
    kinds = {kind: color for kind, color in plots.KIND_COLORS.items() if any(kind in p.kinds for p in result.presets)}
    return page(
        "demo.html.j2",
        result=result,
        dense=result.presets[0],
        kinds=kinds,
        image_plot=plots.times(result, "image_seconds", "One image"),
        answer_plot=plots.times(result, "answer_seconds", "One answer"),
        timeline=plots.timeline(result),
        png=lambda content: figures.data_uri(content, "image/png"),
    )


def write(text: str, path: Path) -> Path:
    """Write a page atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def write_report(result: DemoResult, folder: Path) -> Path:
    """Write the demo's report.html, gallery.png and results.json into `folder`, and return the page's path."""
    text = render(result)
    folder.mkdir(parents=True, exist_ok=True)
    plots.gallery(result, folder / "gallery.png")
    write_text(folder / "results.json", result.to_json())
    return write(text, folder / "report.html")


def render_analysis(result: Any) -> str:
    """The page of an `analysis.Analysis`."""
    return page(
        "analysis.html.j2",
        result=result,
        overlap_plot=analysis_plots.overlap(result),
        removal_plot=analysis_plots.removal(result),
        importance_plot=analysis_plots.importance(result),
        drift_plot=analysis_plots.drift(result.drift) if result.drift else None,
    )


def render_fidelity(result: Any) -> str:
    """The page of a `pareto.FidelityResult`."""
    points = result.points

    def drawing(cost: Any, fidelity: Any, labels: tuple[str, str], interval: Any = None) -> str:
        return pareto_plots.pareto(points, cost, fidelity, labels, interval)

    return page(
        "fidelity.html.j2",
        result=result,
        dense=points[0],
        drawing_plots=[
            drawing(
                lambda p: 1e3 * p.image_time,
                lambda p: p.adherence.value,
                ("ms per image, measured", "right drawings"),
                lambda p: p.adherence.interval,
            ),
            drawing(
                lambda p: p.flops / 1e9,
                lambda p: p.adherence.value,
                ("GFLOP per image", "right drawings"),
                lambda p: p.adherence.interval,
            ),
            drawing(
                lambda p: 1e3 * p.image_time, lambda p: min(p.psnr, 60), ("ms per image, measured", "PSNR to dense, dB")
            ),
            drawing(lambda p: 1e3 * p.image_time, lambda p: p.ssim, ("ms per image, measured", "SSIM to dense")),
        ],
        answering_plots=[
            drawing(
                lambda p: 1e3 * p.answer_time,
                lambda p: p.accuracy.value,
                ("ms per answer, measured", "right answers"),
                lambda p: p.accuracy.interval,
            ),
            drawing(
                lambda p: 1e3 * p.answer_time,
                lambda p: p.equal_answers.value,
                ("ms per answer, measured", "answers equal to dense's"),
                lambda p: p.equal_answers.interval,
            ),
        ],
    )


def render_evaluation(result: Any) -> str:
    """The page of an `evaluation.Evaluation`."""
    return page("evaluation.html.j2", result=result)
