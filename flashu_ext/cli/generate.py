"""The command `flashu-ext generate`: one image, or a list on one rank or several. Imports only click until it runs."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..planning.extras import extra
from .support import EXPECTED_ERRORS, check_writable, example, model_options, open_pipeline

if TYPE_CHECKING:
    import torch

    from ..batch import Heartbeat, Ranks
    from ..batch.lock import FolderLock
    from ..batch.prompts import Job

__all__ = ["generate"]

SHOWN_MISSING = 5


def _size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """(height, width) from what --size was given."""
    if text is None:
        return None
    sides = text.split("x") if "x" in text else [text, text]
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and len(side) < 8 for side in sides):
        raise click.BadParameter(f"expected pixels as 512 or height x width as 512x1024, got {text[:80]!r}")
    return int(sides[0]), int(sides[1])


@click.command(
    epilog=example(
        'flashu-ext generate "a red circle above a blue square" --preset paper --seed 0 -o out.png',
        "flashu-ext generate --prompts prompts.txt --out images --batch 4 --seed 0",
        "torchrun --nproc-per-node 2 -m flashu_ext.cli generate --prompts prompts.txt --out images",
        "torchrun --nproc-per-node 2 -m flashu_ext.cli generate --prompts prompts.txt --out images --parallel guidance",
    )
)
@click.argument("prompt", required=False)
@model_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Image file to write, for PROMPT.  [default: out.png]",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with one prompt per line (# begins a comment), or .jsonl with prompt and optionally seed, name.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the images of --prompts.")
@click.option("--batch", type=click.IntRange(1), help="Images generated together, for --prompts.  [default: 1]")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier run left in --out and generate all images.")
@click.option(
    "--parallel",
    default="data",
    show_default=True,
    type=click.Choice(("data", "guidance")),
    help="How torchrun ranks split the work: the list, or (two ranks) the branches of guidance.",
)
@click.option(
    "--patience",
    default=30.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds of silence after which another rank counts as gone.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the (first) image's noise.")
@click.option(
    "--steps",
    type=click.IntRange(2),
    help="Grid points of the sampler, for JanusFlow its evaluations (default: the preset's, or the family's own).",
)
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale (default: the model's).")
@click.option(
    "--size",
    callback=_size,
    metavar="PIXELS",
    help="Side of the images, or height x width as in 512x1024 (default: the model's).",
)
def generate(
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
    out: Path | None,
    batch: int | None,
    overwrite: bool,
    parallel: str,
    patience: float,
    **settings: Any,
) -> None:
    """Generate PROMPT, or the list in --prompts.

    Image i of a list has the seed S + i. Interrupted runs can be resumed: the same command generates the missing images; other
    settings in the same folder are an error. Under torchrun the ranks split the list. If a rank dies, its unfinished images are
    missing, and the same command generates them.
    """
    if (prompt is None) == (prompts is None):
        raise click.UsageError("PROMPT, --prompts: expected one of them")
    if prompts is None:
        for name, given in (("--out", out), ("--batch", batch), ("--overwrite", overwrite)):
            if given:
                raise click.UsageError(f"{name}: expected --prompts with it, got PROMPT (see -o)")
    elif output is not None or out is None:
        raise click.UsageError("--out: expected a folder with --prompts" + (", got -o" if output is not None else ""))
    # When a rank dies, torch logs a page of C++ frames; the rank is reported in one line below instead.
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..batch import Ranks

    try:
        ranks = Ranks.from_environment()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if parallel == "guidance" and ranks.world != 2:
        raise click.UsageError(
            f"--parallel guidance: expected 2 ranks (torchrun --nproc-per-node 2), got {ranks.world}"
        )
    if prompts is None and parallel == "data" and ranks.world > 1:
        raise click.UsageError(
            f"PROMPT: expected --prompts or --parallel guidance on {ranks.world} ranks, got one image"
        )
    apart = parallel == "guidance"
    if prompt is not None:
        _generate_one(prompt, output or Path("out.png"), ranks, apart, patience, **settings)
    else:
        assert prompts is not None and out is not None, "checked above"
        _generate_list(prompts, out, ranks, apart, patience, batch or 1, overwrite, **settings)


@contextlib.contextmanager
def _opened(
    heartbeat: Heartbeat, apart: bool, settings: dict[str, Any], device: Any
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Pipeline, handle, and the arguments of `generate_batch` besides prompts and seeds."""
    from ..batch import guidance_group, sample_guided

    steps = settings["steps"]
    names = ("model", "preset", "plan_file", "verbose", "tuned", "dtype", "family")
    with contextlib.ExitStack() as stack:
        sampling: dict[str, Any] = {
            "steps": steps,
            "guidance_scale": settings["guidance"],
            "size": settings["size"],
            "sampler": None,
        }
        if apart:
            group = stack.enter_context(guidance_group(heartbeat, device))
            sampling["sampler"] = functools.partial(sample_guided, group=group, stop=heartbeat.stop)
        pipe, handle = stack.enter_context(
            open_pipeline(**{name: settings[name] for name in names}, device=device, steps=steps if apart else None)
        )
        yield pipe, handle, sampling


def _device(ranks: Ranks, settings: dict[str, Any]) -> torch.device:
    """Of this rank: --device, or the GPU with its local number where that is left out or only says cuda."""
    from ..models.checks import check_device

    asked = settings["device"]
    device = None if asked is None else check_device(asked)
    if device is not None and device.type == "cuda" and device.index is not None and ranks.world > 1:
        raise click.UsageError(f"--device: expected cuda or cpu on {ranks.world} ranks, got {asked!r}")
    return ranks.device() if device is None or (device.type == "cuda" and device.index is None) else device


def _generate_one(prompt: str, output: Path, ranks: Ranks, apart: bool, patience: float, **settings: Any) -> None:
    check_writable("--output", output)
    with extra("showo2"):
        from PIL import Image

    from ..batch import Heartbeat
    from ..planning.safe_files import atomic_path

    if output.suffix.lower() not in Image.registered_extensions():
        raise click.UsageError(f"--output: expected a name that ends as images' do, as in .png, got {str(output)!r}")
    with (
        Heartbeat.join(ranks, patience) as heartbeat,
        _opened(heartbeat, apart, settings, _device(ranks, settings)) as (pipe, _, sampling),
    ):
        start = time.perf_counter()
        image = pipe.generate_batch([prompt], [settings["seed"]], **sampling)[0]
        seconds = time.perf_counter() - start
        if ranks.rank == 0:
            with atomic_path(output) as temporary:
                image.save(temporary)
            name = settings["tuned"] or settings["preset"]
            click.echo(f"{output}: {image.width} x {image.height}, {seconds:.2f} s ({name})")


def _generate_list(
    prompts: Path, out: Path, ranks: Ranks, apart: bool, patience: float, batch: int, overwrite: bool, **settings: Any
) -> None:
    from ..batch import Heartbeat, shard
    from ..batch import folder as folder
    from ..batch.lock import FolderLock
    from ..batch.prompts import read_prompts

    jobs = read_prompts(prompts, settings["seed"])
    start = time.perf_counter()
    try:
        with (
            _stop_on_sigterm() as stop,
            FolderLock(out) as lock,
            Heartbeat.join(ranks, patience, stop=stop) as heartbeat,
        ):
            with _opened(heartbeat, apart, settings, _device(ranks, settings)) as (pipe, handle, sampling):
                record = folder.settings_record(
                    pipe,
                    handle and handle.config,
                    handle and handle.plan,
                    preset="tuned" if settings["tuned"] else settings["preset"],
                    steps=sampling["steps"],
                    guidance_scale=sampling["guidance_scale"],
                    size=sampling["size"],
                    batch=batch,
                    branches_apart=apart,
                )
                # When a launcher restarts the ranks, they resume from the images of the first attempt.
                discard = overwrite and ranks.attempt == 0
                run, todo = heartbeat.share("todo", functools.partial(_begin, lock, out, record, jobs, discard))
                lock.join(run)
                batches = sorted({index // batch for index in todo})
                mine = batches if apart else shard(batches, ranks.rank, ranks.world)
                keeps = not apart or ranks.rank == 0
                bar = None if ranks.rank == 0 else False
                try:
                    folder.generate(
                        pipe, jobs, mine, out, batch=batch, write=keeps, stop=stop, progress=bar, **sampling
                    )
                except EXPECTED_ERRORS as error:
                    absent = [jobs[index].name for index in folder.missing(out, jobs)]
                    raise RuntimeError(f"{error}; {out}: {_missing(absent, len(jobs))}") from error
            lost = heartbeat.finish("stopped by SIGTERM" if stop() else "")
    except KeyboardInterrupt:
        left = len(folder.missing(out, jobs))
        click.echo(
            f"{out}: {len(jobs) - left} of {len(jobs)} images are there; the same command generates the rest", err=True
        )
        raise
    absent = [jobs[index].name for index in folder.missing(out, jobs)]
    reasons = [f"rank {rank} {why}" for rank, why in sorted(lost.items())]
    if stop():
        reasons.insert(0, f"rank {ranks.rank} was stopped by SIGTERM")
    if (absent or reasons) and not heartbeat.reporter and not stop():
        raise click.exceptions.Exit(1)  # another rank reports the reason
    if absent or reasons:
        raise click.ClickException("; ".join([*reasons, f"{out}: {_missing(absent, len(jobs))}"]))
    if heartbeat.reporter:
        seconds, name = time.perf_counter() - start, settings["tuned"] or settings["preset"]
        click.echo(f"{out}: {len(jobs)} images, {len(todo)} of them generated now, {seconds:.2f} s ({name})")


def _begin(
    lock: FolderLock, out: Path, record: dict[str, Any], jobs: list[Job], overwrite: bool
) -> tuple[str, list[int]]:
    """The run's name and the images that the folder misses, on the one rank that makes the folder ready."""
    from ..batch.folder import open_folder

    run = lock.begin()
    todo = open_folder(out, record, jobs, overwrite=overwrite, lock=lock)
    lock.share()
    return run, todo


def _missing(names: list[str], total: int) -> str:
    if not names:
        return "no image is missing"
    shown, more = ", ".join(names[:SHOWN_MISSING]), len(names) - SHOWN_MISSING
    some = f"{shown} and {more} more" if more > 0 else shown
    return f"{len(names)} of {total} images are missing ({some}); the same command generates them"


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """On SIGTERM, sent by schedulers and torchrun, finish the current batch; a second one exits at once."""
    asked = False

    def handler(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.SIG_DFL)

    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # handlers can only be set in the main thread
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)
