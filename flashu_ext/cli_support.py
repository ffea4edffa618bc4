"""Room: command line. What all commands share: failures in one line, and examples in their help."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["Group", "example"]

# What a command may run into because of its input or the machine. The rest are bugs: their tracebacks stay.
_EXPECTED_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError, MemoryError)


class Group(click.Group):
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


def example(*lines: str) -> str:
    """A help epilog that keeps its line breaks."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
