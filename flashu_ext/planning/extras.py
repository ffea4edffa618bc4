"""Optional packages, imported where they are first used. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that an extra of flashu_ext installs ("showo2", "vae", "report").

    Raises:
        ImportError: such a package is missing; the message names it and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is needed and not installed: pip install 'flashu_ext[{name}]'") from error
