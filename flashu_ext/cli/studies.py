"""The commands analyze, report and tune: studies of the embedded model. Imports only click until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .support import FAMILY, example

__all__ = ["COMMANDS"]

_FOLDER = click.Path(file_okay=False, path_type=Path)
_OLD_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_SEED = click.option("--seed", default=0, show_default=True, help="Of scenes, wordings and noise.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")


def _model(family: str, folder: Path | None) -> tuple[Any, Any, str]:
    """The model, its plan and its name: the shipped one, or from a folder written by `python -m flashu_ext.nano.train`."""
    from ..nano.model import load_model, load_plan
    from ..nano.subject import subject

    source = folder or subject(family).folder
    model = load_model(source)
    return model, load_plan(model, source), f"nano, {family}" if folder is None else str(folder)


@click.command(epilog=example("flashu-ext analyze --out flashu_analysis", "flashu-ext analyze --family bagel"))
@FAMILY
@click.option("--out", default="flashu_analysis", show_default=True, type=_FOLDER, help="Folder for the page and JSON.")
@click.option(
    "--model", "folder", type=_OLD_FOLDER, help="Another checkpoint of the embedded model (default: the shipped one)."
)
@click.option(
    "--samples", default=80, show_default=True, type=click.IntRange(4), help="Calibration samples of each task."
)
@click.option(
    "--drawings", default=60, show_default=True, type=click.IntRange(1), help="Held-out images per measurement."
)
@click.option(
    "--questions", default=150, show_default=True, type=click.IntRange(1), help="Held-out questions per measurement."
)
@_SEED
@_QUIET
def analyze(
    family: str, out: Path, folder: Path | None, samples: int, drawings: int, questions: int, seed: int, quiet: bool
) -> None:
    """Measure whether the model is specialised per task: critical neurons, redundant layers, drift of the head."""
    from ..nano.subject import subject_of
    from ..planning.safe_files import write_text
    from ..report.render import render_analysis, write
    from ..studies import analysis
    from ..studies.worlds import EmbeddedWorld

    model, _, name = _model(family, folder)
    world = EmbeddedWorld(subject_of(model).family, drawings, questions, seed)
    result = analysis.run(model, world, count=samples, seed=seed, model_name=name, progress=not quiet)
    path = write(render_analysis(result), out / "analysis.html")
    write_text(out / "analysis.json", result.to_json())
    click.echo("\n".join(result.verdicts))
    click.echo(f"wrote {path} and {out / 'analysis.json'} ({result.seconds:.0f} s)")


@click.command(epilog=example("flashu-ext report --out flashu_report --drawings 200 --questions 300"))
@click.option("--out", default="flashu_report", show_default=True, type=_FOLDER, help="Folder for the page and JSON.")
@click.option("--drawings", default=100, show_default=True, type=click.IntRange(1), help="Held-out images per setting.")
@click.option(
    "--questions", default=150, show_default=True, type=click.IntRange(1), help="Held-out questions per setting."
)
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Timed rounds.")
@_SEED
@_QUIET
def report(out: Path, drawings: int, questions: int, repeats: int, seed: int, quiet: bool) -> None:
    """Plot cost against fidelity for both tasks: dense at fewer steps, every setting, paper and fast.

    Exit code 1 if a preset fails its gate.
    """
    from ..planning.safe_files import write_text
    from ..report import pareto
    from ..report.render import render_fidelity, write

    result = pareto.run(drawings, questions, repeats, seed, progress=not quiet)
    path = write(render_fidelity(result), out / "fidelity.html")
    write_text(out / "fidelity.json", result.to_json())
    click.echo(result.table())
    click.echo(f"wrote {path} and {out / 'fidelity.json'} ({result.seconds:.0f} s)")
    failed = [gate for gate in result.gates if not gate.passed]
    if failed:
        raise RuntimeError(f"{len(failed)} gates failed, the first: {failed[0].setting}, {failed[0].task}")


@click.command(
    epilog=example(
        "flashu-ext tune --fidelity 0.99 --out flashu_tuned",
        'flashu-ext generate "a red circle" --tuned flashu_tuned',
    )
)
@FAMILY
@click.option(
    "--fidelity",
    default=0.99,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Minimum correct images and answers, as a fraction of dense's.",
)
@click.option(
    "--out",
    default="flashu_tuned",
    show_default=True,
    type=_FOLDER,
    help="Folder for config.json, plan.safetensors and tuning.json.",
)
@click.option(
    "--model", "folder", type=_OLD_FOLDER, help="Another checkpoint of the embedded model (default: the shipped one)."
)
@click.option(
    "--drawings", default=96, show_default=True, type=click.IntRange(1), help="Training scenes generated per trial."
)
@click.option("--questions", default=120, show_default=True, type=click.IntRange(1), help="Questions per trial.")
@click.option(
    "--report",
    "reported",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Held-out images, and questions, of the report.",
)
@_SEED
@_QUIET
def tune(
    family: str,
    fidelity: float,
    out: Path,
    folder: Path | None,
    drawings: int,
    questions: int,
    reported: int,
    seed: int,
    quiet: bool,
) -> None:
    """Search the cheapest settings at a fidelity, on training scenes; report on held-out ones."""
    from ..nano.subject import subject_of
    from ..studies.tuning import tune as search

    model, plan, _ = _model(family, folder)
    result = search(
        model,
        plan,
        fidelity,
        paper=subject_of(model).preset_config("paper"),
        drawings=drawings,
        questions=questions,
        report_drawings=reported,
        report_questions=reported,
        seed=seed,
        progress=not quiet,
    )
    result.save(out, plan)
    click.echo(result.table())
    click.echo(f"wrote {out / 'config.json'}, {out / 'plan.safetensors'} and {out / 'tuning.json'}")


COMMANDS = (analyze, report, tune)
