"""Compares models of all families with outputs of the unmodified upstream programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..models.comparison import Comparison, Fixture
from ..planning.decoders import FAMILIES
from ..planning.tables import text_table

__all__ = ["compare", "main"]


def compare(folder: Path) -> Iterator[tuple[str, Comparison]]:
    """Every comparison of a folder with how the model ran: 'dense', and 'exact' where the family can be accelerated.

    Raises:
        FileNotFoundError, ValueError: the folder has no such outputs, or of a family that is not known.
    """
    from ..runtime.handle import accelerate

    fixture = Fixture.read(folder)
    name = f"flashu_ext.models.{fixture.family}.conformance"
    if not fixture.family.isidentifier() or find_spec(name.rpartition(".")[0]) is None:
        raise ValueError(f"{folder}: expected outputs of a known family, got {fixture.family!r:.60}")
    comparisons = import_module(name).comparisons
    for one in comparisons(fixture, _unchanged, True):
        yield "dense", one
    for one in comparisons(fixture, accelerate, False) if fixture.family in FAMILIES else ():
        yield "exact", one


@contextlib.contextmanager
def _unchanged(model: Any, *_: Any) -> Iterator[Any]:
    yield model


@click.command(epilog="Example: python -m flashu_ext.bench conformance outputs/janusflow outputs/bagel")
@click.argument("folders", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    """Compare models with the outputs of the unmodified upstream programs in FOLDERS, of any family.

    Prints every comparison: relative L2 distance, or the share of words that differ. Exit 1 where one is beyond its limit, 2
    where a folder cannot be read.
    """
    missed = 0
    for folder in folders:
        rows = [["", "compared", "error", "limit", ""]]
        try:
            for how, one in compare(folder):
                missed += not one.holds
                rows.append([how, one.name, f"{one.error:.1e}", f"{one.limit:.0e}", "" if one.holds else "MISSED"])
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise click.UsageError(f"{folder}: {error}") from error
        click.echo(f"{folder}\n{text_table(rows, rule=True)}\n")
    click.echo("every comparison holds" if not missed else f"{missed} comparisons missed")
    sys.exit(1 if missed else 0)
