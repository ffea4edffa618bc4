"""What commands share: failures in one line, examples in their help, and the model they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..planning.config import PRESETS, FlashUConfig
from ..planning.reading import printable, read_text, refusal

__all__ = ["EXPECTED_ERRORS", "PRESETS", "Group", "example", "model_options", "open_pipeline", "read_config"]


# What a command may run into because of its input or the machine. The rest are bugs: their tracebacks stay.
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


def example(*lines: str) -> str:
    """A help epilog that keeps its line breaks."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def model_options(command: Any) -> Any:
    """Which model runs, and accelerated how; what `open_pipeline` takes."""
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
    device: Any = "cpu",
    steps: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """A pipeline, accelerated as the preset or the tuned folder says while the block runs, and its handle (None: dense).

    steps: grid points that the config is made for, where the caller does not hand them to every image; None: its own.
    """
    from ..models.showo2 import Pipeline
    from ..planning.plan import TaskPlan
    from ..runtime.handle import accelerate

    if tuned is not None and plan_file is not None:
        raise click.UsageError("--plan: expected none beside --tuned, which brings its own")
    pipe = Pipeline.from_pretrained(model, device=device)
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
