"""Seeds that callers give."""

from __future__ import annotations

from typing import Any

from ..planning.groups import whole
from ..planning.reading import shown

__all__ = ["seeds_of"]


def seeds_of(seeds: Any, count: int | None, what: str) -> list[int]:
    """Seeds as integers of Python, `count` of them. Raises TypeError or ValueError."""
    try:
        given = None if isinstance(seeds, (str, bytes)) else list(seeds)
    except TypeError:
        given = None
    if given is None:
        raise TypeError(f"seeds: expected a list of integers, got {type(seeds).__name__}")
    if count is not None and len(given) != count:
        raise ValueError(f"seeds: expected one for each of {count} {what}, got {len(given)}")
    numbers = []
    for seed in given:
        number = whole(seed)
        if number is None or not 0 <= number < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {shown(seed)}")
        numbers.append(number)
    return numbers
