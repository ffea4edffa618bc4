"""Memory that cannot be written to: an array or tensor may lie in a file that is mapped for reading only."""

from __future__ import annotations

__all__ = ["read_only_ranges"]


def read_only_ranges() -> list[tuple[int, int]]:
    """(first address, end) of what this process has mapped for reading only; empty where the system does not tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            fields = [line.split(maxsplit=2)[:2] for line in lines]
    except OSError:
        return []
    spans = [span.split("-") for span, access in fields if access[1] != "w"]
    return [(int(start, 16), int(end, 16)) for start, end in spans]
