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
from .cli_studies import COMMANDS

if TYPE_CHECKING:
    pass

__all__ = ["cli", "main"]

PRESETS = ("dense", "exact", "paper", "fast")
ESTIMATORS = ("wanda", "flap", "reconstruction")

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
            help="dense: the unmodified model; exact: same outputs; paper: Flash-Unified's settings; fast: tuned.",
        ),
        click.option(
            "--tuned",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder that `flashu-ext tune` wrote: its config and plan, instead of a preset.",
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
def _pipeline(
    model: str, preset: str, plan_file: Path | None, verbose: bool, tuned: Path | None = None
) -> Iterator[Any]:
    """A pipeline, accelerated as the preset or the tuned folder says while the block runs."""
    from .config import FlashUConfig
    from .plan import TaskPlan
    from .showo2 import Pipeline

    if tuned is not None and plan_file is not None:
        raise click.UsageError("--plan: expected none beside --tuned, which brings its own")
    pipe = Pipeline.from_pretrained(model)
    if tuned is not None:
        config: FlashUConfig | None = FlashUConfig.from_json((tuned / "config.json").read_text(encoding="utf-8"))
        plan: TaskPlan | None = TaskPlan.load(tuned / "plan.safetensors", model=pipe.model)
    else:
        plan = TaskPlan.load(plan_file, model=pipe.model) if plan_file is not None else None
        config, plan = pipe.preset(preset, plan)
    if config is None:
        yield pipe
        return
    with pipe.accelerate(config, plan) as handle:
        yield pipe
        if verbose:
            click.echo(str(handle.summary()), err=True)


@cli.command(
    epilog=_example('flashu-ext generate "a red circle above a blue square" --preset paper --seed 0 -o out.png')
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
    tuned: Path | None,
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
    with _pipeline(model, preset, plan_file, verbose, tuned) as pipe:
        start = time.perf_counter()
        image = pipe.generate(prompt, seed=seed, steps=steps, guidance_scale=guidance)
        seconds = time.perf_counter() - start
    image.save(output)
    click.echo(f"{output}: {image.width} x {image.height}, {seconds:.2f} s ({tuned or preset})")


@cli.command(
    epilog=_example(
        'flashu-ext answer out.png "what color is the circle?" --preset exact',
        'flashu-ext answer out.png "describe the image" --temperature 0.7 --top-p 0.9 --seed 1',
    )
)
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("question")
@_model_options
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(0), help="Longest answer.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="0: the most likely token; above: one is drawn.",
)
@click.option("--top-k", type=click.IntRange(1), help="Draw among the k most likely tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw among the likely tokens that make up this much."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the draws.")
def answer(
    image: Path,
    question: str,
    model: str,
    preset: str,
    tuned: Path | None,
    plan_file: Path | None,
    verbose: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    """Answer QUESTION about IMAGE."""
    from PIL import Image

    with Image.open(image) as file:
        picture = file.convert("RGB")
    with _pipeline(model, preset, plan_file, verbose, tuned) as pipe:
        text = pipe.answer(
            picture, question, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        click.echo(text)


@cli.command(
    epilog=_example(
        "flashu-ext calibrate nano --out plan.safetensors",
        "flashu-ext calibrate CHECKPOINT --data DIR --estimator flap --checkpoint state.safetensors --out plan.safetensors",
    )
)
@click.argument("model")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the samples; nano draws its own where none is given.",
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
    help="How neurons are scored: the paper's score, variance of a neuron, or the error of leaving it out.",
)
@click.option(
    "--ratio",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of neurons to prune.",
)
@click.option("--adaptive", is_flag=True, help="Share the kept neurons out over the layers by their scores.")
@click.option(
    "--multiple", type=click.IntRange(1), help="Kept neurons are a multiple of this (default: 64, for nano 16)."
)
@click.option(
    "--times",
    multiple=True,
    type=click.FloatRange(0, 1),
    help="Time at which drawing is seen: 0 noise, 1 image (may be repeated; default: five from 0.05 to 0.95).",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the noise.")
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to go on from after an interruption; deleted when done.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="At most so many samples of each task (default: all, for nano 40)."
)
def calibrate(
    model: str,
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
    """Find out which neurons and layers of MODEL ('nano' or a checkpoint folder) each task needs.

    DATA holds images and one file of JSON lines per task: generation.jsonl with {"image": "cat.png", "prompt": "a cat"},
    understanding.jsonl with {"image": "cat.png", "question": "what is it?", "answer": "a cat"}, and any other name with
    either.
    """
    for name, path in (("--out", out), ("--checkpoint", checkpoint)):
        if path is not None and not path.resolve().parent.is_dir():
            raise click.UsageError(f"{name}: expected a file in an existing folder, got {str(path)!r}")
    if data is None and model != "nano":
        raise click.UsageError("--data: expected a folder with samples; only nano draws its own")
    from .calibrate import DEFAULT_TIMES
    from .calibrate import calibrate as run
    from .calibration_data import folder_samples
    from .nano.calibrate import SAMPLES, samples
    from .nano.model import PRUNE_MULTIPLE
    from .showo2 import Pipeline

    pipe = Pipeline.from_pretrained(model)
    if data is not None:
        tasks: Any = folder_samples(pipe, data, limit)
    else:
        tasks = dict(zip(("generation", "understanding"), samples(limit or SAMPLES, seed), strict=True))
    plan = run(
        pipe.model,
        tasks=tasks,
        estimator=estimator,
        ratio=ratio,
        multiple=multiple or (PRUNE_MULTIPLE if model == "nano" else 64),
        times=times or DEFAULT_TIMES,
        seed=seed,
        checkpoint=checkpoint,
    )
    if adaptive:
        plan = plan.with_adaptive_ratios()
    plan.save(out)
    click.echo(f"{out}\n{plan.describe()}")


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
@click.option("--steps", type=click.IntRange(2), help="Grid points (default: the preset's; 50 where it names none).")
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
    step_plan = StepPlan.build(config, steps, layers, guidance)
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


@cli.command(epilog=_example("flashu-ext info", "flashu-ext info --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info(as_json: bool) -> None:
    """Tell what this build has, what this machine has, and why anything is missing."""
    from . import info as module

    facts = module.collect()
    click.echo(json.dumps(facts, indent=1) if as_json else module.describe(facts))


# ---- measuring


@cli.group(cls=_Group)
def bench() -> None:
    """Measure: one op (ffn) or whole images and answers (e2e)."""


@bench.command(
    epilog=_example(
        "flashu-ext bench ffn --rows 1 --rows 1460 --dtype bf16", "flashu-ext bench ffn --explain cuda --dtype bf16"
    )
)
@click.option(
    "--shape",
    default="1.5b",
    show_default=True,
    type=click.Choice(("1.5b", "7b", "bench", "head")),
    help="Whose FFN: Show-o2 1.5B or 7B, the bench model, the diffusion head.",
)
@click.option(
    "--dtype", default="fp32", show_default=True, type=click.Choice(("fp32", "bf16", "fp16")), help="Storage."
)
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 8, 16, 128, 512, 1460),
    show_default=True,
    help="Tokens (may be repeated).",
)
@click.option(
    "--keep", default=0.8, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Share of neurons kept."
)
@click.option(
    "--seconds", default=4.0, show_default=True, type=click.FloatRange(0), help="Time spent on each number of tokens."
)
@click.option("--threads", type=click.IntRange(1), help="torch threads (default: torch's own).")
@click.option(
    "--explain",
    type=click.Choice(("cpu", "cuda")),
    is_flag=False,
    flag_value="cpu",
    help="Print which kernels and tiles serve these problems (cuda: on sm_90 and sm_80, no GPU needed), and do not measure.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all figures to this file.",
)
def ffn(
    shape: str,
    dtype: str,
    rows: tuple[int, ...],
    keep: float,
    seconds: float,
    threads: int | None,
    explain: str | None,
    json_file: Path | None,
) -> None:
    """Time the gathered FFN beside torch dense, a pruned copy, and gather-then-GEMM."""
    from .bench import ffn as module

    settings = module.Settings(shape=shape, dtype=dtype, rows=rows, keep=keep, seconds=seconds, threads=threads)
    if explain is not None:
        click.echo(module.explain(settings, explain))
        return
    report = module.run(settings)
    click.echo(report.table())
    if json_file is not None:
        json_file.write_text(report.to_json(), encoding="utf-8")


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
    default=(1, 32, 64),
    show_default=True,
    help="New tokens of an answer (may be repeated).",
)
@click.option("--steps", default=50, show_default=True, type=click.IntRange(2), help="Grid points of dense and exact.")
@click.option("--paper-steps", default=35, show_default=True, type=click.IntRange(2), help="Grid points of paper.")
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


for _command in COMMANDS:
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `flashu-ext`; leaves with an exit code."""
    cli.main(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="flashu-ext")


if __name__ == "__main__":
    main()
