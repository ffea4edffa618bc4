"""Room: command line. `flashu-ext bench`: one op, or whole images and answers. Imports click only, until a command runs."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_support import Group, example

__all__ = ["bench"]


@click.group(cls=Group)
def bench() -> None:
    """Measure: one op (ffn) or whole images and answers (e2e)."""


@bench.command(
    epilog=example(
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
    epilog=example(
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
