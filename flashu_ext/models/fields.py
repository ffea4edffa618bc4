"""Checks of the sizes in a model's config. A file may name any: limits keep what is built from one small until the weights
confirm it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..planning.groups import Check, expect, is_int, is_real

__all__ = ["COUNT", "EVEN", "LAYERS", "NUMBER", "SIZE", "SWITCH", "check_divides", "check_fields"]

MAX_SIZE = 2**20
MAX_LAYERS = 512

SIZE = expect(f"an integer in [1, {MAX_SIZE}]", lambda v: is_int(v) and 1 <= v <= MAX_SIZE)
EVEN = expect(f"an even integer in [2, {MAX_SIZE}]", lambda v: is_int(v) and 2 <= v <= MAX_SIZE and v % 2 == 0)
LAYERS = expect(f"an integer in [1, {MAX_LAYERS}]", lambda v: is_int(v) and 1 <= v <= MAX_LAYERS)
COUNT = expect(f"an integer in [0, {MAX_LAYERS}]", lambda v: is_int(v) and 0 <= v <= MAX_LAYERS)
NUMBER = expect("a finite number > 0", lambda v: is_real(v) and v > 0)
SWITCH = expect("True or False", lambda v: isinstance(v, bool))


def check_fields(config: Any, checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first field that its check refuses."""
    for name, check in checks.items():
        check(name, getattr(config, name))


def check_divides(name: str, whole: int, part: int) -> None:
    if whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole}, got {part}")
