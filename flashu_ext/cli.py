"""Room: command line. Parses arguments and prints; each command imports what does its work when it runs.

Importing this file needs click only, so `--help`, `plan` and `info` work in a build without kernels.
Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__

if TYPE_CHECKING:
    from .config import FlashUConfig

__all__ = ["cli", "main"]

PRESETS = ("dense", "exact", "paper")

# What a command may run into because of its input or the machine. The rest are bugs: their tracebacks stay.
_EXPECTED_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError, MemoryError)


class _Group(click.Group):
    """A group whose commands fail with one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:  # --help and --version; click derives it from RuntimeError
            raise
        except click.Abort:
            raise
        except _EXPECTED_ERRORS as error:
            if ctx.find_root().params.get("traceback"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(text) from error


def _example(*lines: str) -> str:
    """A help epilog that keeps its line breaks."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flashu-ext")
@click.option("--traceback", is_flag=True, help="On failure show the Python traceback instead of one line.")
def cli(traceback: bool) -> None:
    """Draw and answer with Show-o2, dense or accelerated, without training."""


# ---- the main job


@cli.command(epilog=_example("flashu-ext demo --out flashu_demo"))
@click.option(
    "--out",
    default="flashu_demo",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for report.html and results.json.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the noise.")
@click.option(
    "--images",
    default=48,
    show_default=True,
    type=click.IntRange(2),
    help="Held-out prompts drawn per preset for the fidelity figures.",
)
@click.option(
    "--questions",
    default=96,
    show_default=True,
    type=click.IntRange(2),
    help="Held-out questions asked per preset.",
)
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Timed single images and answers per preset.",
)
def demo(out: Path, seed: int, images: int, questions: int, repeats: int) -> None:
    """Draw and answer with the embedded model: dense, exact and paper, compared in a report."""
    from .report import demo as report_demo
    from .report.render import write_report

    result = report_demo.run(seed=seed, images=images, questions=questions, repeats=repeats)
    path = write_report(result, out)
    click.echo(result.table())
    click.echo(f"\nreport: {path}")


def _model_options(command: Any) -> Any:
    for option in (
        click.option(
            "--model",
            default="nano",
            show_default=True,
            help="'nano', or a folder with a Show-o2 checkpoint.",
        ),
        click.option(
            "--preset",
            default="exact",
            show_default=True,
            type=click.Choice(PRESETS),
            help="dense: the unmodified model; exact: same outputs; paper: Flash-Unified's settings.",
        ),
        click.option(
            "--plan",
            "plan_file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Task plan for a pruning preset (nano brings its own).",
        ),
        click.option("--verbose", "-v", is_flag=True, help="Print what the accelerated model did."),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def _pipeline(model: str, preset: str, plan_file: Path | None, verbose: bool) -> Iterator[Any]:
    """A pipeline, accelerated as the preset says while the block runs."""
    from .showo2 import Pipeline

    pipe = Pipeline.from_pretrained(model)
    config = _preset_config(model, preset)
    if config is None:
        yield pipe
        return
    from .plan import TaskPlan
    from .swap import accelerate

    plan = None
    if config.ffn_prune_ratio > 0:
        if plan_file is not None:
            plan = TaskPlan.load(plan_file, model=pipe.model).with_ratio(
                config.ffn_prune_ratio, config.prune_multiple
            )
        elif model == "nano":
            from .nano.model import load_plan

            plan = load_plan(pipe.model)
    with accelerate(pipe.model, config, plan) as handle:
        yield pipe
        if verbose:
            click.echo(str(handle.summary()), err=True)


def _preset_config(model: str, preset: str) -> FlashUConfig | None:
    from .config import FlashUConfig

    if model == "nano":
        from .nano.evaluate import preset_config

        return preset_config(preset)
    return None if preset == "dense" else getattr(FlashUConfig, preset)()


@cli.command(
    epilog=_example(
        'flashu-ext generate "a red circle above a blue square" --preset paper --seed 0 -o out.png'
    )
)
@click.argument("prompt")
@_model_options
@click.option(
    "-o",
    "--output",
    default="out.png",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Image file to write.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the noise.")
@click.option(
    "--steps",
    type=click.IntRange(2),
    help="Grid points of the sampler (default: the preset's; 50 where it names none).",
)
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale (default: the model's).")
def generate(
    prompt: str,
    model: str,
    preset: str,
    plan_file: Path | None,
    verbose: bool,
    output: Path,
    seed: int,
    steps: int | None,
    guidance: float | None,
) -> None:
    """Draw PROMPT."""
    if not output.resolve().parent.is_dir():
        raise click.UsageError(f"--output: expected a file in an existing folder, got {str(output)!r}")
    with _pipeline(model, preset, plan_file, verbose) as pipe:
        start = time.perf_counter()
        image = pipe.generate(prompt, seed=seed, steps=steps, guidance_scale=guidance)
        seconds = time.perf_counter() - start
    image.save(output)
    click.echo(f"{output}: {image.width} x {image.height}, {seconds:.2f} s ({preset})")


@cli.command(epilog=_example('flashu-ext answer out.png "what color is the circle?" --preset exact'))
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("question")
@_model_options
def answer(
    image: Path, question: str, model: str, preset: str, plan_file: Path | None, verbose: bool
) -> None:
    """Answer QUESTION about IMAGE."""
    from PIL import Image

    with Image.open(image) as file:
        picture = file.convert("RGB")
    with _pipeline(model, preset, plan_file, verbose) as pipe:
        click.echo(pipe.answer(picture, question))


# ---- looking inside


@cli.command(epilog=_example("flashu-ext plan --preset paper --steps 35"))
@click.option(
    "--preset",
    default="paper",
    show_default=True,
    type=click.Choice(PRESETS[1:]),
    help="Settings to plan for.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A FlashUConfig as JSON, instead of a preset.",
)
@click.option(
    "--steps", type=click.IntRange(2), help="Grid points (default: the preset's; 50 where it names none)."
)
@click.option(
    "--layers", type=click.IntRange(1), help="LLM layers, to know whether the skip ratio rounds down to none."
)
@click.option(
    "--guidance",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0),
    help="The caller's guidance scale.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plan(
    preset: str,
    config_file: Path | None,
    steps: int | None,
    layers: int | None,
    guidance: float,
    as_json: bool,
) -> None:
    """Print what every evaluation of an image computes, with dead work removed."""
    from .config import FlashUConfig
    from .schedule import StepPlan

    if config_file is not None:
        config = FlashUConfig.from_json(config_file.read_text(encoding="utf-8"))
    else:
        overrides = {"steps": steps} if steps is not None else {}
        config = getattr(FlashUConfig, preset)(**overrides)
    step_plan = StepPlan.build(config, steps, layers)
    if as_json:
        click.echo(json.dumps(_plan_record(step_plan, guidance), indent=1))
    else:
        click.echo(step_plan.describe(guidance))


def _plan_record(step_plan: Any, guidance: float) -> dict[str, Any]:
    import dataclasses

    return {
        "grid_points": step_plan.grid_points,
        "evaluations": len(step_plan),
        "backbone": step_plan.backbone_evaluations,
        "head": step_plan.head_evaluations,
        "dead": step_plan.dead_evaluations,
        "kinds": step_plan.counts(),
        "steps": [
            dataclasses.asdict(step)
            | {"kind": step.kind, "guidance": step_plan.config.guidance_at(step.index, guidance)}
            for step in step_plan.steps
        ],
    }


_FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@cli.command(context_settings=_FORWARD, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def info(arguments: Sequence[str]) -> None:
    """Tell what this build has, what this machine has, and why anything is missing."""
    from . import info as module

    _leave(module.main(list(arguments)))


def _leave(code: int | None) -> None:
    if code:
        raise click.exceptions.Exit(code)


# ---- measuring


@cli.group(cls=_Group)
def bench() -> None:
    """Measure: one op (ffn) or whole images and answers (e2e)."""


@bench.command(context_settings=_FORWARD, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ffn(arguments: Sequence[str]) -> None:
    """Time the gathered FFN beside torch's; `flashu-ext bench ffn --help` lists its options."""
    from .bench import ffn as module

    _leave(module.main(list(arguments)))


@bench.command(
    epilog=_example(
        "flashu-ext bench e2e --model bench --repeats 3 --json e2e.json",
        "flashu-ext bench e2e --upstream path/to/Show-o/show-o2",
    )
)
@click.option(
    "--model",
    default="bench",
    show_default=True,
    type=click.Choice(("bench", "tiny")),
    help="Shape of the random-weight model; tiny only shows that everything runs.",
)
@click.option(
    "--upstream",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Show-o2 checkout: its unmodified classes are the baseline.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(("generation", "understanding")),
    help="Only this task (may be repeated).",
)
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(1),
    default=(32, 64),
    show_default=True,
    help="New tokens of an answer (may be repeated).",
)
@click.option(
    "--steps", default=50, show_default=True, type=click.IntRange(2), help="Grid points of dense and exact."
)
@click.option(
    "--paper-steps", default=35, show_default=True, type=click.IntRange(2), help="Grid points of paper."
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Timed rounds; the median is reported.",
)
@click.option("--threads", type=click.IntRange(1), help="torch threads (default: torch's own).")
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of weights, noise and tokens.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all figures to this file.",
)
def e2e(
    model: str,
    upstream: Path | None,
    tasks: tuple[str, ...],
    tokens: tuple[int, ...],
    steps: int,
    paper_steps: int,
    repeats: int,
    threads: int | None,
    seed: int,
    json_file: Path | None,
) -> None:
    """Time whole images and answers: dense, exact and paper, interleaved in one process."""
    from .bench import e2e as module

    settings = module.Settings(
        model=model,
        upstream=upstream,
        tasks=tasks or ("generation", "understanding"),
        tokens=tokens,
        steps=steps,
        paper_steps=paper_steps,
        repeats=repeats,
        threads=threads,
        seed=seed,
    )
    report = module.run(settings)
    click.echo(report.table())
    if json_file is not None:
        json_file.write_text(report.to_json(), encoding="utf-8")
    if not report.agrees:
        raise RuntimeError(report.disagreement())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `flashu-ext`; leaves with an exit code."""
    cli.main(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="flashu-ext")


if __name__ == "__main__":
    main()
