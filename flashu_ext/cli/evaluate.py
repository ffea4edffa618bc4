"""The commands `flashu-ext evaluate geneval`, `dpg`, `understanding` and `page`. Imports only click until one runs."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .generate import generate_list, list_options, own_ranks
from .support import Group, example, model_options

if TYPE_CHECKING:
    from ..evaluation.lists import PromptList

__all__ = ["evaluate"]

_OUT = click.option(
    "--out",
    default="flashu_evaluation",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the evaluation; each preset and benchmark has its own within.",
)


@click.group(cls=Group)
def evaluate() -> None:
    """Measure presets as the paper's tables do: GenEval, DPG-Bench, and questions by lmms-eval.

    Images are drawn here and scored by the benchmarks' own tools; `page` gathers what they wrote.
    """


# ---- drawing


@evaluate.command(
    epilog=example(
        "flashu-ext evaluate geneval --prompts evaluation_metadata.jsonl --model DIR --preset paper --plan plan.safetensors",
        "torchrun --nproc-per-node 8 -m flashu_ext.cli evaluate geneval --prompts evaluation_metadata.jsonl --model DIR",
    )
)
@click.option(
    "--prompts",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GenEval's prompts/evaluation_metadata.jsonl.",
)
@_OUT
@click.option("--samples", default=4, show_default=True, type=click.IntRange(1, 10_000), help="Images of each prompt.")
@model_options
@list_options
def geneval(prompts: Path, samples: int, **options: Any) -> None:
    """Draw GenEval's prompts into OUT/PRESET/geneval/images, as its evaluate_images.py reads them.

    Image i of the list has the seed S + i. The same command draws what an interrupted one left; torchrun's ranks share the list.
    """
    from ..evaluation.lists import read_geneval

    _draw(read_geneval(prompts, options["seed"], samples), **options)


@evaluate.command(
    epilog=example(
        "flashu-ext evaluate dpg --prompts ELLA/dpg_bench/prompts --model DIR --preset exact",
        "flashu-ext evaluate dpg --prompts ELLA/dpg_bench/prompts --model DIR --preset paper --plan plan.safetensors",
    )
)
@click.option(
    "--prompts",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="DPG-Bench's folder of .txt prompts, or a .jsonl file with prompt and name.",
)
@_OUT
@model_options
@list_options
def dpg(prompts: Path, **options: Any) -> None:
    """Draw DPG-Bench's prompts into OUT/PRESET/dpg/images, four images to a picture, as compute_dpg_bench.py reads them.

    Image i of the list has the seed S + i. The same command draws what an interrupted one left; torchrun's ranks share the list.
    """
    from ..evaluation.lists import read_dpg

    size = options["size"]
    if size is not None and size[0] != size[1]:
        raise click.UsageError(f"--size: expected a square, four of which fill a picture, got {size[0]}x{size[1]}")
    _draw(read_dpg(prompts, options["seed"]), **options)


def _draw(
    prompts: PromptList,
    out: Path,
    batch: int | None,
    overwrite: bool,
    parallel: str,
    patience: float,
    **settings: Any,
) -> None:
    from ..evaluation import drawing

    ranks = own_ranks(parallel)
    name = "tuned" if settings["tuned"] else settings["preset"]
    folder = out / name / prompts.benchmark
    if not overwrite:
        drawing.check_leftovers(prompts, folder)
    start = time.perf_counter()

    def begun(missing: int) -> None:
        drawing.write_record(prompts, folder, settings["seed"], missing)

    drawn = generate_list(
        prompts.jobs,
        folder / drawing.DRAWN,
        ranks,
        parallel == "guidance",
        patience,
        batch or 1,
        overwrite,
        begun,
        **settings,
    )
    if drawn is None:  # another rank lays out and reports
        return
    drawing.lay_out(prompts, folder)
    seconds = time.perf_counter() - start
    images = folder / drawing.IMAGES
    click.echo(f"{images}: {len(prompts.jobs)} images, {drawn} of them drawn now, {seconds:.2f} s ({name})")
    click.echo(f"next: {_scoring(prompts, folder)}")


def _scoring(prompts: PromptList, folder: Path) -> str:
    """The command of the benchmark's own tool that scores a folder."""
    from ..evaluation.drawing import IMAGES, resolution, results_file

    images, results = str((folder / IMAGES).resolve()), str(results_file(folder, prompts.benchmark).resolve())
    if prompts.benchmark == "geneval":
        return shlex.join(
            ["python", "evaluation/evaluate_images.py", images, "--outfile", results, "--model-path", "DETECTOR"]
        )
    side = resolution(prompts, folder)[0]
    arguments = ["--image-root-path", images, "--resolution", str(side), "--pic-num", "4", "--res-path", results]
    return shlex.join(["accelerate", "launch", "dpg_bench/compute_dpg_bench.py", *arguments, "--vqa-model", "mplug"])
