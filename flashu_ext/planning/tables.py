"""Tables of cells, for terminals and for pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table", "text_table"]


def text_table(rows: Iterable[Sequence[str]], rule: bool = False) -> str:
    """Columns of equal width, two spaces apart. rule: a line of dashes under the first row."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """The first row is the header."""
    header, *others = rows
    lines = ["| " + " | ".join(row) + " |" for row in (header, *others)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)
