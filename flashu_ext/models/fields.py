"""Checks of the sizes in a model's config. A file may name any: limits keep what is built from one small until the weights
confirm it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from ..planning.groups import Check, expect, is_int, is_real
from ..planning.reading import refusal, shown

__all__ = [
    "COUNT",
    "EVEN",
    "LAYERS",
    "NUMBER",
    "SIZE",
    "SWITCH",
    "check_divides",
    "check_fields",
    "from_fields",
    "to_json",
]

MAX_SIZE = 2**20
MAX_LAYERS = 512

SIZE = expect(f"an integer in [1, {MAX_SIZE}]", lambda v: is_int(v) and 1 <= v <= MAX_SIZE)
EVEN = expect(f"an even integer in [2, {MAX_SIZE}]", lambda v: is_int(v) and 2 <= v <= MAX_SIZE and v % 2 == 0)
LAYERS = expect(f"an integer in [1, {MAX_LAYERS}]", lambda v: is_int(v) and 1 <= v <= MAX_LAYERS)
COUNT = expect(f"an integer in [0, {MAX_LAYERS}]", lambda v: is_int(v) and 0 <= v <= MAX_LAYERS)
NUMBER = expect("a finite number > 0", lambda v: is_real(v) and v > 0)
SWITCH = expect("True or False", lambda v: isinstance(v, bool))

C = TypeVar("C")


def check_fields(config: Any, checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first field that its check refuses."""
    for name, check in checks.items():
        check(name, getattr(config, name))


def check_divides(name: str, whole: int, part: int) -> None:
    if whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole}, got {part}")


def to_json(config: Any, form: str) -> str:
    """A dataclass of plain values as a JSON object with `form` as its format."""
    return json.dumps({"format": form, **dataclasses.asdict(config)}, indent=1, allow_nan=False)


def from_fields(build: type[C], form: str, data: Any, name: str) -> C:
    """The dataclass `build` from what `to_json` wrote, parsed.

    Raises:
        ValueError: another format, an unknown field, or one without a default is missing; begins with `name`.
    """
    if not isinstance(data, dict) or data.get("format") != form:
        raise refusal(name, f"expected a JSON object with format {form!r}")
    known = {f.name: f for f in dataclasses.fields(build)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known) - {"format"})
    if unknown:
        raise refusal(name, f"unknown field {shown(unknown[0])}")
    for field in known.values():
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in data:
            raise refusal(name, f"missing field {field.name!r}")
    return build(**{key: value for key, value in data.items() if key in known})
