"""The command group `flashu-ext`: parses arguments, calls the library, prints results.

Commands import their code when they run. Importing this file needs only click, so `--help`, `schedule` and `info` work in a
build without kernels. Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__
from .bench import bench
from .evaluate import evaluate
from .generate import generate
from .serve import serve
from .studies import COMMANDS
from .support import (
    DTYPES,
    FAMILIES,
    FAMILY,
    PRESETS,
    Group,
    check_family,
    check_writable,
    example,
    model_options,
    open_pipeline,
    read_config,
)

__all__ = ["cli", "main"]

ESTIMATORS = ("wanda", "flap", "reconstruction")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flashu-ext")
@click.option("--traceback", is_flag=True, help="On failure show the Python traceback instead of one line.")
def cli(traceback: bool) -> None:
    """Generate images and answer questions with one model, dense or accelerated, without training."""


# ---- generate, answer, calibrate


@cli.command(epilog=example("flashu-ext demo --out flashu_demo", "flashu-ext demo --family bagel"))
@FAMILY
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
    help="Held-out prompts generated per preset for the fidelity figures.",
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
def demo(family: str, out: Path, seed: int, images: int, questions: int, repeats: int) -> None:
    """Generate and answer with an embedded model: dense, exact, paper and fast, compared in a report."""
    from ..report import demo as report_demo
    from ..report.render import write_report

    result = report_demo.run(seed=seed, images=images, questions=questions, repeats=repeats, family=family)
    path = write_report(result, out)
    click.echo(result.table())
    click.echo(f"\nreport: {path}")


@cli.command(
    epilog=example(
        'flashu-ext answer out.png "what color is the circle?" --preset exact',
        'flashu-ext answer before.png --image after.png "what has changed?"',
        'flashu-ext answer out.png "describe the image" --temperature 0.7 --top-p 0.9 --seed 1',
    )
)
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("question")
@click.option(
    "--image",
    "more",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another image that the question is about, after IMAGE (may be repeated).",
)
@model_options
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(0), help="Longest answer.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="0: the most likely token; above: sample one.",
)
@click.option("--top-k", type=click.IntRange(1), help="Sample from the k most likely tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the likeliest tokens with this total probability.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the sampling.")
@click.option("--stream", is_flag=True, help="Print the answer while it is generated.")
def answer(
    image: Path,
    question: str,
    more: tuple[Path, ...],
    model: str,
    family: str,
    preset: str,
    tuned: Path | None,
    plan_file: Path | None,
    verbose: bool,
    device: str | None,
    dtype: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stream: bool,
) -> None:
    """Answer QUESTION about IMAGE, and about the images of --image after it."""
    from ..planning.reading import read_image

    pictures = [read_image(path) for path in (image, *more)]
    with open_pipeline(model, preset, plan_file, verbose, tuned, device, dtype, family=family) as (pipe, _):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        if stream:
            pipe.answer(
                pictures, question, max_new_tokens, on_text=lambda piece: click.echo(piece, nl=False), **settings
            )
            click.echo()
        else:
            click.echo(pipe.answer(pictures, question, max_new_tokens, **settings))


@cli.command(
    epilog=example(
        "flashu-ext calibrate nano --out plan.safetensors",
        "flashu-ext calibrate nano --family bagel --out plan.safetensors",
        "flashu-ext calibrate CHECKPOINT --data DIR --estimator flap --checkpoint state.safetensors --out plan.safetensors",
    )
)
@click.argument("model")
@FAMILY
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the samples (default for nano: generated ones).",
)
@click.option(
    "--out",
    default="plan.safetensors",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Task plan to write.",
)
@click.option(
    "--estimator",
    default="wanda",
    show_default=True,
    type=click.Choice(ESTIMATORS),
    help="Score of a neuron: the paper's, its variance, or the error when it is pruned.",
)
@click.option(
    "--ratio",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Fraction of neurons to prune.",
)
@click.option("--adaptive", is_flag=True, help="Distribute the kept neurons over the layers by their scores.")
@click.option(
    "--multiple", type=click.IntRange(1), help="Kept neurons are a multiple of this (default: 64, for nano 16)."
)
@click.option(
    "--times",
    multiple=True,
    type=click.FloatRange(0, 1),
    help="Time at which generation is measured: 0 noise, 1 image (may be repeated; default: five from 0.05 to 0.95).",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the noise.")
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to resume from after an interruption; deleted when done.",
)
@click.option("--limit", type=click.IntRange(1), help="At most this many samples per task (default: all, for nano 40).")
def calibrate(
    model: str,
    family: str,
    data: Path | None,
    out: Path,
    estimator: str,
    ratio: float,
    adaptive: bool,
    multiple: int | None,
    times: tuple[float, ...],
    seed: int,
    checkpoint: Path | None,
    limit: int | None,
) -> None:
    """Score the neurons and layers of MODEL ('nano' or a checkpoint folder of any family) for each task.

    DATA holds images and one file of JSON lines per task: generation.jsonl with {"image": "cat.png", "prompt": "a cat"},
    understanding.jsonl with {"image": "cat.png", "question": "what is it?", "answer": "a cat"}, and any other name with
    either.
    """
    for name, path in (("--out", out), ("--checkpoint", checkpoint)):
        if path is not None:
            check_writable(name, path)
    if data is None and model != "nano":
        raise click.UsageError("--data: expected a folder with samples; only nano generates its own")
    check_family(model, family)
    from ..calibration.calibrate import DEFAULT_TIMES
    from ..calibration.calibrate import calibrate as run
    from ..calibration.data import folder_samples
    from ..models.folders import load_pipeline
    from ..nano.calibrate import SAMPLES, samples
    from ..nano.model import load_model
    from ..nano.subject import PRUNE_MULTIPLE, subject

    own: Any
    if data is not None:
        pipe = load_pipeline(model, family=family)
        own, tasks = pipe.model, dict[str, Any](folder_samples(pipe, data, limit))
    else:
        own = load_model(subject(family).folder)
        tasks = dict(zip(("generation", "understanding"), samples(limit or SAMPLES, seed, family), strict=True))
    plan = run(
        own,
        tasks=tasks,
        estimator=estimator,
        ratio=ratio,
        multiple=multiple or (PRUNE_MULTIPLE if model == "nano" else 64),
        times=times or DEFAULT_TIMES,
        seed=seed,
        checkpoint=checkpoint,
        keep_checkpoint=True,
    )
    if adaptive:
        plan = plan.with_adaptive_ratios()
    plan.save(out)
    if checkpoint is not None:  # only now: a plan that cannot be written costs no second run
        checkpoint.unlink(missing_ok=True)
    click.echo(f"{out}\n{plan.describe()}")


# ---- schedule, info


@cli.command(
    epilog=example(
        "flashu-ext schedule --preset paper --steps 35",
        "flashu-ext schedule --kernels --model 1.5b --device cuda --dtype bf16",
    )
)
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
@FAMILY
@click.option("--steps", type=click.IntRange(2), help="Grid points (default: the preset's; 50 if it has none).")
@click.option(
    "--layers", type=click.IntRange(1), help="LLM layers; needed to see whether the skip ratio rounds down to none."
)
@click.option(
    "--guidance",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0),
    help="The caller's guidance scale.",
)
@click.option(
    "--kernels",
    is_flag=True,
    help="Print which kernel runs every op of images and answers, why, and its predicted cost, instead of the evaluations.",
)
@click.option(
    "--model",
    help="With --kernels: 'nano', '1.5b', '7b', or a checkpoint folder of any family, whose weights are not read.  "
    "[default: nano]",
)
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    help="With --kernels: where it would run.  [default: cuda where torch sees a GPU, else cpu]",
)
@click.option(
    "--dtype",
    type=click.Choice(tuple(DTYPES)),
    help="With --kernels: of the model's weights.  [default: bf16 on a GPU, fp32 on the CPU]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def schedule(
    preset: str,
    config_file: Path | None,
    family: str,
    steps: int | None,
    layers: int | None,
    guidance: float,
    kernels: bool,
    model: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Print the work of every evaluation of an image, without dead work; or the kernels that it would run on."""
    from ..planning.config import FlashUConfig
    from ..planning.schedule import StepPlan

    asked = None if family == FAMILIES[0] else family
    for name, value in (("--model", model), ("--device", device), ("--dtype", dtype), ("--family", asked)):
        if value is not None and not kernels:
            raise click.UsageError(f"{name}: expected with --kernels only")
    check_family(model or "nano", family)
    if config_file is not None:
        config: Any = read_config(config_file)
    elif kernels and model in (None, "nano"):
        from ..nano.subject import subject

        config = subject(family).preset_config(preset, steps)
    else:
        overrides = {"steps": steps} if steps is not None else {}
        config = getattr(FlashUConfig, preset)(**overrides)
    if kernels:
        _print_kernels(model or "nano", family, config, steps, device, dtype, as_json)
        return
    step_plan = StepPlan.build(config, steps, layers, guidance)
    if as_json:
        click.echo(json.dumps(_schedule_record(step_plan, guidance), indent=1))
    else:
        click.echo(step_plan.describe(guidance))


def _print_kernels(
    model: str, family: str, config: Any, steps: int | None, device: str | None, dtype: str | None, as_json: bool
) -> None:
    import dataclasses

    import torch

    from ..models.folders import shell_of
    from ..models.showo2.config import Showo2Config
    from ..models.showo2.model import Showo2
    from ..nano.subject import subject
    from ..runtime.kernel_sets import describe

    known = {"1.5b": Showo2Config.show_o2_1_5b, "7b": Showo2Config.show_o2_7b}
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = getattr(torch, DTYPES[dtype or ("bf16" if where == "cuda" else "fp32")])
    with torch.device("meta"):
        if model == "nano":
            shell = subject(family).build()
        else:
            shell = Showo2(known[model]()) if model in known else shell_of(Path(model))
    description = describe(shell, config, device=where, dtype=weights, steps=steps)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in description.rows], indent=1))
    else:
        click.echo(str(description))


def _schedule_record(step_plan: Any, guidance: float) -> dict[str, Any]:
    import dataclasses

    return {
        "grid_points": step_plan.grid_points,
        "evaluations": len(step_plan),
        "backbone": step_plan.backbone_evaluations,
        "head": step_plan.head_evaluations,
        "encoder": step_plan.encoder_evaluations,
        "adaptive": step_plan.adaptive_evaluations,
        "dead": step_plan.dead_evaluations,
        "kinds": step_plan.counts(),
        "steps": [
            dataclasses.asdict(step)
            | {"kind": step.kind, "guidance": step_plan.config.guidance_at(step.index, guidance)}
            for step in step_plan.steps
        ],
    }


@cli.command(epilog=example("flashu-ext info", "flashu-ext info --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info(as_json: bool) -> None:
    """Print what build and machine support, and why anything is missing."""
    from . import info as module

    facts = module.collect()
    click.echo(json.dumps(facts, indent=1) if as_json else module.describe(facts))


for _command in (generate, serve, evaluate, bench, *COMMANDS):
    cli.add_command(_command)
cli.aliases["plan"] = "schedule"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `flashu-ext`; exits with a code."""
    cli.main(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="flashu-ext")
