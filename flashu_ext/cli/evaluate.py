"""The commands `flashu-ext evaluate geneval`, `dpg`, `understanding` and `page`. Imports only click until one runs."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .generate import generate_list, list_options, own_ranks
from .support import Group, example, model_options, open_pipeline

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


# ---- understanding


@evaluate.command(
    epilog=example(
        "flashu-ext evaluate understanding --tasks mme,mmstar,mmbench_en_dev --model DIR --preset exact",
        "flashu-ext evaluate understanding --tasks my_task.yaml --model DIR --preset paper --plan plan.safetensors",
    )
)
@click.option(
    "--tasks",
    required=True,
    help="Tasks of lmms-eval separated by commas, or .yaml files of tasks of your own.",
)
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with more tasks in lmms-eval's YAML format.",
)
@_OUT
@model_options
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Questions answered together.")
@click.option("--limit", type=click.IntRange(1), help="Only the first questions of each task, to try it out.")
@click.option(
    "--max-new-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Longest answer, where a task names none.",
)
@click.option("--overwrite", is_flag=True, help="Run tasks again whose results are there.")
def understanding(
    tasks: str,
    include: Path | None,
    out: Path,
    batch: int,
    limit: int | None,
    max_new_tokens: int,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Ask lmms-eval's tasks and keep their results in OUT/PRESET/understanding.

    lmms-eval fetches the data of its own tasks from the Hugging Face hub. A task whose results are there, of the same
    settings, is not run again; results of other settings are an error. Under torchrun the ranks share the questions.
    """
    from ..evaluation import understanding as module
    from ..evaluation.scores import question_scores

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--tasks: expected at least one, got none")
    ranks = own_ranks("data")
    preset = "tuned" if settings["tuned"] else settings["preset"]
    folder = out / preset / "understanding"
    known, manager, digests = module.find_tasks(names, include)
    if ranks.world > 1 and settings["device"] is None:
        settings["device"] = str(ranks.device())
    start = time.perf_counter()
    with open_pipeline(**settings) as (pipe, handle):
        record = module.settings_of(pipe, handle, preset, batch, limit, max_new_tokens)
        todo = [name for name in known if overwrite or not module.is_there(folder, name, record, digests.get(name))]
        ran = module.run(pipe, record, todo, manager, digests, folder) if todo else []
    if ranks.rank == 0:
        for name in ran:
            result = module.read_results(module.results_path(folder, name))
            figures = ", ".join(
                f"{score.name} {score.value:g}" for score in question_scores(result["results"], result["samples"])
            )
            click.echo(f"{name}: {figures} ({len(result['samples'])} of {result['questions']} questions)")
        seconds = time.perf_counter() - start
        click.echo(f"{folder}: {len(known)} tasks, {len(todo)} of them run now, {seconds:.2f} s ({preset})")


# ---- the page


@evaluate.command(epilog=example("flashu-ext evaluate page --out flashu_evaluation"))
@_OUT
def page(out: Path) -> None:
    """Gather what was scored into OUT/evaluation.html and OUT/evaluation.json, beside the paper's published figures.

    What is missing is shown as missing. A results file that does not belong to the images drawn is an error.
    """
    from ..planning.safe_files import write_text
    from ..report.evaluation import gather
    from ..report.render import render_evaluation, write

    result = gather(out)
    path = write(render_evaluation(result), out / "evaluation.html")
    write_text(out / "evaluation.json", result.to_json())
    click.echo(result.table())
    for line in result.missing:
        click.echo(f"missing: {line}")
    click.echo(f"wrote {path} and {out / 'evaluation.json'}")
