"""Shared by the commands: errors in one line, examples in help, model options."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..planning.config import PRESETS, FlashUConfig
from ..planning.reading import printable, read_text, refusal

__all__ = [
    "DTYPES",
    "EXPECTED_ERRORS",
    "FAMILIES",
    "FAMILY",
    "PRESETS",
    "Group",
    "check_family",
    "check_writable",
    "example",
    "model_options",
    "open_pipeline",
    "read_config",
]


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of --dtype and of torch."""

FAMILIES = ("showo2", "janusflow", "bagel")

FAMILY = click.option(
    "--family", type=click.Choice(FAMILIES), default=FAMILIES[0], show_default=True, help="Of the embedded model."
)

# Errors caused by input or machine. Others are bugs and keep their tracebacks.
EXPECTED_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError, MemoryError)


class Group(click.Group):
    """A group whose commands fail with one line and exit code 1.

    Attributes:
        aliases: earlier names of commands, which still work and are not listed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aliases: dict[str, str] = {}

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, self.aliases.get(name, name))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning  # type: ignore[assignment]
                return super().invoke(ctx)
        except click.exceptions.Exit:  # --help and --version; click derives it from RuntimeError
            raise
        except click.Abort:
            raise
        except EXPECTED_ERRORS as error:
            if ctx.find_root().params.get("traceback"):
                raise
            text = printable(" ".join(str(error).split())) or type(error).__name__
            raise click.ClickException(text) from error


def _show_warning(message: Warning | str, *_: Any) -> None:
    click.echo(f"Warning: {printable(' '.join(str(message).split()))}", err=True)


def example(*lines: str) -> str:
    """A help epilog that keeps its line breaks."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def check_family(model: str, family: str) -> None:
    """That --family is given for the embedded model alone. Raises click.UsageError."""
    if family != FAMILIES[0] and model != "nano":
        raise click.UsageError("--family: expected with 'nano' alone; a folder says of which family it is")


def check_writable(option: str, path: Path) -> None:
    """That a file can be written to this place, found out before the work for it is done. Raises click.UsageError."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise click.UsageError(f"{option}: expected a file in an existing folder, got {str(path)!r}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(
            f"{option}: expected a file in a folder that can be written to, got {str(path)!r}: {error.strerror}"
        ) from error


def model_options(command: Any) -> Any:
    """Options for model and acceleration, the arguments of `open_pipeline`."""
    for option in (
        click.option(
            "--model",
            default="nano",
            show_default=True,
            help="'nano', or a folder with a checkpoint of any family.",
        ),
        FAMILY,
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
            help="Folder written by `flashu-ext tune`; its config and plan replace the preset.",
        ),
        click.option(
            "--plan",
            "plan_file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Task plan for a pruning preset (nano has its own).",
        ),
        click.option(
            "--device",
            metavar="DEVICE",
            help="Where the model runs, as cpu or cuda.  [default: cuda where torch sees a GPU, else cpu]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(tuple(DTYPES)),
            help="Of the model's weights.  [default: bf16 on a GPU, the checkpoint's on the CPU]",
        ),
        click.option("--verbose", "-v", is_flag=True, help="Print what the accelerated model did."),
    ):
        command = option(command)
    return command


def read_config(path: Path) -> FlashUConfig:
    """A config's JSON file.

    Raises:
        ValueError: another file; it is named. OSError: it cannot be read.
    """
    try:
        return FlashUConfig.from_json(read_text(path))
    except ValueError as error:
        raise refusal(path, error) from error


@contextlib.contextmanager
def open_pipeline(
    model: str,
    preset: str,
    plan_file: Path | None,
    verbose: bool,
    tuned: Path | None = None,
    device: Any = None,
    dtype: str | None = None,
    steps: int | None = None,
    family: str = FAMILIES[0],
) -> Iterator[tuple[Any, Any]]:
    """A context with a pipeline, accelerated by preset or tuned folder, and its handle (None: dense).

    device: None: a GPU where torch sees one, else the CPU.
    dtype: a key of `DTYPES`; None: bf16 on a GPU, else the checkpoint's.
    steps: grid points of the config, if not passed for every image; None: the config's own.
    family: of the embedded model.
    """
    import torch

    from ..models.checks import check_device
    from ..models.folders import load_pipeline
    from ..planning.plan import TaskPlan
    from ..runtime.handle import accelerate

    if tuned is not None and plan_file is not None:
        raise click.UsageError("--plan: expected none with --tuned, which has its own")
    check_family(model, family)
    where = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None and where.type == "cuda":
        dtype = "bf16"
    weights = None if dtype is None else getattr(torch, DTYPES[dtype])
    pipe = load_pipeline(model, weights, where, family=family)
    if tuned is not None:
        config: FlashUConfig | None = read_config(tuned / "config.json")
        plan: TaskPlan | None = TaskPlan.load(tuned / "plan.safetensors", model=pipe.model)
    else:
        plan = TaskPlan.load(plan_file, model=pipe.model) if plan_file is not None else None
        config, plan = pipe.preset(preset, plan)
    if config is None:
        yield pipe, None
        return
    if steps is not None:
        config = config.replace(steps=steps)
    with accelerate(pipe.model, config, plan) as handle:
        yield pipe, handle
        if verbose:
            click.echo(str(handle.summary()), err=True)
