"""The command `flashu-ext serve`. Imports only click and limits until it runs."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..server.limits import Limits
from .support import check_family, example, model_options, open_pipeline

__all__ = ["serve"]

KEY_VARIABLE = "FLASHU_API_KEY"

LIMITS = {
    "at_once": "Images, and answers, in progress together.",
    "waiting": "Images, and answers, that may wait; further ones are refused by 429.",
    "body_bytes": "Longest body.",
    "bodies_bytes": "All bodies that are held at a time; more is refused by 429.",
    "image_bytes": "Longest file of an image that is sent.",
    "image_pixels": "Pixels of a question's images together.",
    "images": "Images of a question.",
    "prompt_characters": "Longest prompt or question.",
    "n": "Images of one request.",
    "side": "Longest side of an image that is drawn, in pixels.",
    "steps": "Grid points of an image.",
    "tokens": "Longest answer.",
    "request_seconds": "For a result, from the whole request on; then 504.",
    "read_seconds": "For a client to send a head, and then a body; then 408 or the end of the connection.",
    "refusal_seconds": "That the reply to a wrong request is held back at most, where many come.",
    "write_seconds": "For a client to take what waits for it; then the end of the connection.",
    "connections": "Open connections; a request on a further one is refused by 503.",
}
"""Help of the options; they are the fields of `Limits`."""


def _option(name: str) -> str:
    """The option of a limit, or of the key."""
    return "--" + ("max-" if name in ("n", "side", "steps", "tokens") else "") + name.replace("_", "-")


def _limits(command: Any) -> Any:
    for field in reversed(fields(Limits)):
        least = 0 if field.name == "waiting" else 1
        number = click.FloatRange(0, min_open=True) if field.name.endswith("_seconds") else click.IntRange(least)
        command = click.option(
            _option(field.name),
            f"limit_{field.name}",
            default=field.default,
            show_default=True,
            type=number,
            help=LIMITS[field.name],
        )(command)
    return command


@click.command(
    epilog=example(
        "flashu-ext serve --port 8000 &",
        "curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\",
        """    -d '{"prompt": "a red circle above a blue square", "seed": 1}'""",
        "flashu-ext serve --adapter drawings=DIR --adapter photos=DIR  # a request's model: nano, drawings or photos",
        "FLASHU_API_KEY=$(cat key) flashu-ext serve --model DIR --preset paper --host 0.0.0.0",
    )
)
@model_options
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="LoRA adapter of peft that requests may name as their model; may be repeated. The model itself has none.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: every one.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option(
    "--api-key",
    envvar=KEY_VARIABLE,
    help=f"Key that clients must send. {KEY_VARIABLE}, unlike an option, is not seen by other users of the machine.",
)
@click.option(
    "--grace",
    default=30,
    show_default=True,
    type=click.IntRange(0),
    help="Seconds that requests in progress have when the server is told to stop.",
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(("critical", "error", "warning", "info", "debug")),
    help="Of what goes to stderr; info has a line for each request.",
)
@_limits
def serve(
    family: str,
    model: str,
    preset: str,
    tuned: Path | None,
    plan_file: Path | None,
    device: str | None,
    dtype: str | None,
    verbose: bool,
    adapters: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    grace: int,
    log_level: str,
    **options: Any,
) -> None:
    """Serve images and answers over HTTP as OpenAI's API does (docs/serving.md).

    Prints its address when it is ready. SIGINT or SIGTERM stops it: exit code 0 if every request was answered, 1 if some were
    given up after --grace.
    """
    from ..batch.ranks import wait_for
    from ..server.app import application
    from ..server.gate import check_key
    from ..server.run import Server, listen

    if api_key is None and KEY_VARIABLE in os.environ:  # as a command that failed leaves it
        raise click.UsageError(f"{KEY_VARIABLE}: expected a key, got an empty one")
    try:
        check_key(api_key)
        limits = Limits(**{name.removeprefix("limit_"): value for name, value in options.items()})
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        raise click.UsageError(f"{_option(name)}: {rest}") from error

    check_family(model, family)
    folders = _adapters(adapters, model, preset if tuned is None else None)
    with listen(host, port) as listener:  # before the model is loaded, which takes long
        opened = open_pipeline(model, preset, plan_file, verbose, tuned, device, dtype, family=family)
        with contextlib.ExitStack() as stack:

            def loaded() -> Any:
                pipe, handle = stack.enter_context(opened)
                for name, folder in folders.items():
                    pipe.load_adapter(name, folder)
                    handle.runner.check_adapter(name)
                return pipe

            # On a thread that ends: OpenMP's threads of loading must not stay beside those of the model's (`ModelThread`).
            pipe = wait_for(loaded, math.inf)
            app = application(pipe, limits, api_key)
            bound_host, bound_port = listener.getsockname()[:2]
            shown_host = f"[{bound_host}]" if ":" in bound_host else bound_host
            if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
                click.echo(
                    f"Warning: {host} can be reached from other machines, and no --api-key is asked for", err=True
                )
            server = Server(app, limits, grace, log_level, lambda: click.echo(f"http://{shown_host}:{bound_port}"))
            server.serve_on(listener)
            given_up = app.state.service.metrics.unanswered
    if given_up:
        raise click.ClickException(f"{given_up} requests were given up: they had not ended {grace} s after the signal")


def _adapters(told: tuple[str, ...], model: str, preset: str | None) -> dict[str, Path]:
    """Name -> folder of the adapters, whose files have been read once.

    Raises:
        click.UsageError: a name is not one, or is the model's or another adapter's, or the model is dense.
        ValueError, OSError: a folder holds no plain LoRA adapter.
    """
    if told and preset == "dense":
        raise click.UsageError("--adapter: expected none with --preset dense, which adds none to some requests only")
    folders: dict[str, Path] = {}
    for each in told:
        from ..models.lora_files import check_adapter_name, read_adapter

        name, _, folder = each.partition("=")
        try:
            if not folder:
                raise ValueError("expected NAME=FOLDER")
            check_adapter_name(name)
            if name in folders or name == Path(model).name:
                raise ValueError(f"name: expected each once, and none that is the model's, got {name!r}")
        except ValueError as error:
            raise click.UsageError(f"--adapter {each}: {error}") from error
        read_adapter(folder)
        folders[name] = Path(folder)
    return folders
