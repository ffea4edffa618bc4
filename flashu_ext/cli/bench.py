"""The commands `flashu-ext bench ffn`, `linear`, `arrivals`, `serve` and `e2e`. Imports only click until one runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .support import FAMILIES, Group, example

if TYPE_CHECKING:
    from ..bench.e2e_gpu import Settings

__all__ = ["bench"]


@click.group(cls=Group)
def bench() -> None:
    """Benchmark one op (ffn, linear) or whole images and answers (e2e)."""


@bench.command(
    epilog=example(
        "flashu-ext bench ffn --rows 1 --rows 1460 --dtype bf16",
        "flashu-ext bench ffn --explain cuda --dtype bf16",
        "flashu-ext bench ffn --counters --rows 64 --dtype bf16",
    )
)
@click.option(
    "--shape",
    default="1.5b",
    show_default=True,
    type=click.Choice(("1.5b", "7b", "bench", "head")),
    help="The FFN of Show-o2 1.5B or 7B, the bench model, the diffusion head.",
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
    "--keep",
    default=0.8,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Fraction of neurons kept.",
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
    "--counters",
    is_flag=True,
    help="Count what the CUDA kernels execute and move, and do not measure (bf16; no GPU, a source checkout with its C++ tests).",
)
@click.option("--int8", is_flag=True, help="Also with int8 weights, as torchao stores them (on the CPU).")
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
    counters: bool,
    int8: bool,
    json_file: Path | None,
) -> None:
    """Compare the gathered FFN with torch dense, a pruned copy, and gather-then-GEMM."""
    from ..bench import ffn as module
    from ..planning.safe_files import write_text

    settings = module.Settings(
        shape=shape, dtype=dtype, rows=rows, keep=keep, seconds=seconds, threads=threads, int8=int8
    )
    if explain is not None:
        click.echo(module.explain(settings, explain))
        return
    if counters:
        from ..bench import counters as counting
        from ..bench import predict as predicting
        from ..planning.tables import text_table

        if dtype != "bf16":
            raise click.UsageError(f"--counters: expected --dtype bf16, got {dtype}")
        counted = counting.count(counting.ffn_cases(shape, rows, keep))
        click.echo(f"{text_table(counting.rows_of(counted))}\n\n{counting.LEGEND}")
        click.echo(f"\n{text_table(predicting.launch_rows(counted))}\n\n{predicting.NOTES}\n\n{predicting.LIMITS}")
        if json_file is not None:
            write_text(json_file, counting.to_json(counted))
        return
    report = module.run(settings)
    click.echo(report.table())
    if json_file is not None:
        write_text(json_file, report.to_json())


@bench.command(
    epilog=example(
        "flashu-ext bench linear --rows 1 --rows 1460 --dtype bf16",
        "flashu-ext bench linear --shape q --epilogue gelu --json linear.json",
    )
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=("q", "kv", "head q"),
    show_default=True,
    type=click.Choice(("q", "kv", "head q", "7b q", "7b kv")),
    help="Projections of Show-o2 1.5B, its head, and 7B (may be repeated).",
)
@click.option(
    "--dtype", default="fp32", show_default=True, type=click.Choice(("fp32", "bf16", "fp16")), help="Storage."
)
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 16, 128, 512, 1460),
    show_default=True,
    help="Tokens (may be repeated).",
)
@click.option(
    "--epilogue",
    default="none",
    show_default=True,
    type=click.Choice(("none", "gelu", "gelu_tanh", "silu")),
    help="Activation; torch applies it by an operator of its own.",
)
@click.option(
    "--seconds", default=2.0, show_default=True, type=click.FloatRange(0), help="Time spent on each shape and rows."
)
@click.option("--threads", type=click.IntRange(1), help="torch threads (default: torch's own).")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all figures to this file.",
)
def linear(json_file: Path | None, **options: Any) -> None:
    """Compare the linear layer with torch.nn.functional.linear, on the CPU."""
    from ..bench import linear as module
    from ..planning.safe_files import write_text

    report = module.run(module.Settings(**options))
    click.echo(report.table())
    if json_file is not None:
        write_text(json_file, report.to_json())


def _arrival_options(loads: tuple[float, ...], models: str) -> Callable[[Any], Any]:
    """Options of `arrivals.Settings`, and --json.

    Args:
        loads: default of --load.
        models: help of --model.
    """
    options = (
        click.option(
            "--task",
            default="images",
            show_default=True,
            type=click.Choice(("images", "answers")),
            help="What is asked for.",
        ),
        click.option("--model", default="nano", show_default=True, help=models),
        click.option(
            "--preset",
            default="exact",
            show_default=True,
            type=click.Choice(("exact", "paper", "fast")),
            help="Of the model.",
        ),
        click.option(
            "--load",
            "loads",
            multiple=True,
            type=click.FloatRange(0, min_open=True),
            default=loads,
            show_default=True,
            help="Rate of arrival, as a share of what one by one can serve (may be repeated).",
        ),
        click.option("--requests", default=24, show_default=True, type=click.IntRange(1), help="Requests of a run."),
        click.option("--steps", default=20, show_default=True, type=click.IntRange(2), help="Grid points of an image."),
        click.option(
            "--tokens", default=16, show_default=True, type=click.IntRange(1), help="New tokens of an answer, at most."
        ),
        click.option(
            "--at-once", default=8, show_default=True, type=click.IntRange(1), help="Under way together, at most."
        ),
        click.option(
            "--rounds", default=1, show_default=True, type=click.IntRange(1), help="Runs of each way, interleaved."
        ),
        click.option("--threads", type=click.IntRange(1), help="torch threads (default: torch's own)."),
        click.option(
            "--json",
            "json_file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Also write all figures to this file.",
        ),
    )
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


@bench.command(
    epilog=example(
        "flashu-ext bench arrivals",
        "flashu-ext bench arrivals --task answers --preset paper --load 0.9 --load 2 --json arrivals.json",
    )
)
@_arrival_options((0.5, 0.9), "'nano', 'bench' (random weights), or a folder with a Show-o2 checkpoint.")
def arrivals(json_file: Path | None, **options: Any) -> None:
    """Compare serving requests together as they come with whole batches and with one by one, under Poisson arrivals."""
    from ..bench import arrivals as module
    from ..planning.safe_files import write_text

    report = module.run(module.Settings(**options), lambda text: click.echo(text, err=True))
    click.echo(report.table())
    if json_file is not None:
        write_text(json_file, report.to_json())


@bench.command(
    epilog=example(
        "flashu-ext bench serve",
        "flashu-ext bench serve --task answers --load 0.9 --load 2 --json serve.json",
    )
)
@_arrival_options((0.7, 1.5), "'nano', or a folder with a checkpoint of any family.")
@click.option(
    "--budget",
    default=300.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds after which no further run begins.",
)
def serve(json_file: Path | None, budget: float, **options: Any) -> None:
    """Ask a server on this machine: together, one by one, and beside slow, vanishing and hostile clients, those under the first
    --load."""
    from ..bench import arrivals, serving
    from ..planning.safe_files import write_text

    report = serving.run(arrivals.Settings(**options), budget, lambda text: click.echo(text, err=True))
    click.echo(report.table())
    if json_file is not None:
        write_text(json_file, report.to_json())


@bench.command(
    epilog=example(
        "flashu-ext bench e2e --model bench --repeats 3 --json e2e.json",
        "flashu-ext bench e2e --family bagel --repeats 1",
        "flashu-ext bench e2e --upstream path/to/Show-o/show-o2",
        "flashu-ext bench e2e --gpu --json e2e_gpu.json --plot e2e_gpu.png",
    )
)
@click.option(
    "--gpu",
    is_flag=True,
    help="The published 1.5B and 7B shapes in bf16 on a GPU, with launches, syncs, memory and a step's time by kind of work.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(("bench", "tiny", "1.5b", "7b")),
    help="Shape of the random-weight model (default: bench; with --gpu 1.5b and 7b); tiny only shows that everything runs.",
)
@click.option(
    "--family",
    default="showo2",
    show_default=True,
    type=click.Choice(FAMILIES),
    help="Which model.",
)
@click.option(
    "--drawing",
    type=click.Choice(("api", "text", "plain", "taylorseer")),
    help="How BAGEL draws: guided by text and image as its API does (default), by the text alone, not guided, or as its API "
    "with TaylorSeer.",
)
@click.option(
    "--upstream",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkout of the family's program: its unmodified classes are the baseline (with --gpu also from SHOWO2_UPSTREAM).",
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="With --gpu: images at once [1, 4].")
@click.option("--variant", "variants", multiple=True, help="With --gpu: only this program (may be repeated).")
@click.option(
    "--budget", default=540.0, show_default=True, type=click.FloatRange(1), help="With --gpu: seconds for everything."
)
@click.option("--device", default="cuda", hidden=True, type=click.Choice(("cuda", "cpu")))
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="With --gpu: PNG to write.")
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
    help="New tokens of an answer (may be repeated; default 1, 32 and 64; with --gpu one number, 64).",
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
    gpu: bool,
    models: tuple[str, ...],
    family: str,
    drawing: str | None,
    upstream: Path | None,
    batches: tuple[int, ...],
    variants: tuple[str, ...],
    budget: float,
    device: str,
    plot_file: Path | None,
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
    if gpu and family != "showo2":
        raise click.UsageError(f"--family: expected showo2 with --gpu, got {family}")
    if drawing is not None and family != "bagel":
        raise click.UsageError(f"--drawing: expected with --family bagel only, got {family}")
    if gpu:
        if len(tokens) > 1:
            raise click.UsageError(f"--tokens: expected one number with --gpu, got {len(tokens)}")
        from ..bench import e2e_gpu

        named = {"models": models, "batches": batches, "variants": variants, "tasks": tasks}
        given: dict[str, Any] = {name: value for name, value in named.items() if value}
        given |= {"tokens": tokens[0]} if tokens else {}
        checkout = upstream or (Path(os.environ["SHOWO2_UPSTREAM"]) if os.environ.get("SHOWO2_UPSTREAM") else None)
        given |= {"upstream": checkout, "device": device, "budget": budget, "steps": steps, "paper_steps": paper_steps}
        _e2e_gpu(e2e_gpu.Settings(**given, repeats=repeats, seed=seed, threads=threads), json_file, plot_file)
        return
    for name, value in (("--batch", batches), ("--variant", variants), ("--plot", plot_file)):
        if value:
            raise click.UsageError(f"{name}: expected with --gpu only")
    if len(models) > 1 or models[:1] in (("1.5b",), ("7b",)):
        raise click.UsageError("--model: expected bench or tiny without --gpu, and one of them")
    from ..bench import e2e as module
    from ..planning.safe_files import write_text

    settings = module.Settings(
        model=models[0] if models else "bench",
        family=family,
        drawing=drawing or "api",
        upstream=upstream,
        tasks=tasks or ("generation", "understanding"),
        tokens=tokens or (1, 32, 64),
        steps=steps,
        paper_steps=paper_steps,
        repeats=repeats,
        threads=threads,
        seed=seed,
    )
    report = module.run(settings)
    click.echo(report.table())
    if json_file is not None:
        write_text(json_file, report.to_json())
    if not report.agrees:
        raise RuntimeError(report.disagreement())


def _e2e_gpu(settings: Settings, json_file: Path | None, plot_file: Path | None) -> None:
    from ..bench import e2e_gpu

    report = e2e_gpu.run(settings, lambda text: click.echo(text, err=True))
    click.echo(report.table())
    if json_file is not None:
        report.save(json_file)
    if plot_file is not None:
        from ..bench.step_plot import plot

        plot(report.record(), plot_file)
