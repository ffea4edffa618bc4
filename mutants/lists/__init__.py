"""The lists of mutants: MUTANTS of each module, under the module's name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..mutant import Mutant


def load() -> dict[str, list[Mutant]]:
    """All lists by name."""
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: import_module(f".{name}", __name__).MUTANTS for name in names}
