"""Models' configs: checks of their sizes, and JSON. A file may name any size: limits keep what is built from one small until the
weights confirm it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from ..planning.groups import Check, expect, is_int, is_real
from ..planning.reading import refusal, shown, strict_json

__all__ = [
    "COUNT",
    "EVEN",
    "JsonConfig",
    "LAYERS",
    "NUMBER",
    "SIZE",
    "SWITCH",
    "check_divides",
    "check_fields",
]

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


def check_heads(hidden: int, heads: int) -> None:
    """That heads share the width, and can be rotated."""
    check_divides("heads", hidden, heads)
    if hidden // heads % 2:
        raise ValueError(f"heads: expected an even width of each, got {hidden} / {heads} = {hidden // heads}")


class JsonConfig:
    """What dataclasses of plain values have in common that are written as JSON objects."""

    FORMAT: ClassVar[str]
    """The field `format` of the object."""

    def with_tied_head(self, tied: bool) -> Self:
        """The config of a model whose output head is the token embedding, or is not."""
        config: Any = self
        changed: Self = dataclasses.replace(config, tie_word_embeddings=tied)
        return changed

    def to_json(self) -> str:
        """The config as a JSON object, readable by `from_json`."""
        config: Any = self
        return json.dumps({"format": self.FORMAT, **dataclasses.asdict(config)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str | None = None) -> Self:
        """Read what `to_json` wrote.

        Args:
            name: at the beginning of errors; the class's by default.

        Raises:
            ValueError: another format, an unknown or repeated field, one without a default is missing, NaN or Infinity, or a
                value that the class refuses.
        """
        name = name or cls.__name__
        return cls.from_fields(strict_json(text, name), name)

    @classmethod
    def from_fields(cls, data: Any, name: str | None = None) -> Self:
        """The same from parsed JSON."""
        name = name or cls.__name__
        if not isinstance(data, dict) or data.get("format") != cls.FORMAT:
            raise refusal(name, f"expected a JSON object with format {cls.FORMAT!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - set(known) - {"format"})
        if unknown:
            raise refusal(name, f"unknown field {shown(unknown[0])}")
        for field in known.values():
            if field.default is field.default_factory is dataclasses.MISSING and field.name not in data:
                raise refusal(name, f"missing field {field.name!r}")
        return cls(**{key: value for key, value in data.items() if key in known})
