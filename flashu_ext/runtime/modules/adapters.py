"""Whose rows a call has: each row's LoRA adapter, told by whoever joins rows to the layers that add what adapters give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AdapterRows", "RowAdapters"]


@dataclass(frozen=True)
class AdapterRows:
    """The rows of one adapter in a call.

    Slices, not a list of indices: that would be a tensor, which a captured step cannot bring to the device.
    """

    adapter: str | None
    """As a request names it: `BASE` is none, None what is active."""
    runs: tuple[slice, ...] | None = None
    """Of dim 0; None: all rows."""

    def take(self, x: Tensor) -> Tensor:
        """x [all rows, ...] -> these rows; all of them are not copied."""
        if self.runs is None:
            return x
        own = [x[run] for run in self.runs]
        return own[0] if len(own) == 1 else torch.cat(own)

    def put(self, own: Tensor, into: Tensor) -> Tensor:
        """`into` [all rows, ...], which may be written to, with `own` in place of these rows."""
        if self.runs is None:
            return own
        parts = own.split([run.stop - run.start for run in self.runs])
        for run, part in zip(self.runs, parts, strict=True):
            into[run] = part
        return into


class RowAdapters:
    """The adapters of the rows that are computed now; the layers of a network share one. Outside `of` all rows are of what is
    active."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._groups: tuple[AdapterRows, ...] = (AdapterRows(None),)

    @contextlib.contextmanager
    def of(self, *rows: tuple[str | None, int]) -> Iterator[None]:
        """Inside, dim 0 of every layer's input is these rows.

        Args:
            rows: (adapter, how many) in the order of the rows. Where all are of one adapter, inputs may have any number.
        """
        before = self._count, self._groups
        self._count, self._groups = _grouped(rows)
        try:
            yield
        finally:
            self._count, self._groups = before

    def groups(self, x: Tensor) -> tuple[AdapterRows, ...]:
        """The rows of each adapter in x [rows, ...]."""
        if self._count is not None and x.shape[0] != self._count:
            raise RuntimeError(f"adapters: expected {self._count} rows, got an input of {list(x.shape)}")
        return self._groups

    def each(
        self, compute: Callable[[str | None, Tensor, Tensor | None], Tensor], x: Tensor, y: Tensor | None
    ) -> Tensor:
        """`compute(adapter, x, y)` of each adapter's rows of x and y, in one tensor."""
        groups = self.groups(x)
        if len(groups) == 1:
            return compute(groups[0].adapter, x, y)
        own = [compute(rows.adapter, rows.take(x), None if y is None else rows.take(y)) for rows in groups]
        out = own[0].new_empty(x.shape[0], *own[0].shape[1:])
        for rows, part in zip(groups, own, strict=True):
            rows.put(part, out)
        return out


def _grouped(rows: tuple[tuple[str | None, int], ...]) -> tuple[int | None, tuple[AdapterRows, ...]]:
    """Number of rows, and those of each adapter; neighbours are one run."""
    runs: dict[str | None, list[slice]] = {}
    at = 0
    for adapter, count in rows:
        own = runs.setdefault(adapter, [])
        if own and own[-1].stop == at:
            own[-1] = slice(own[-1].start, at + count)
        else:
            own.append(slice(at, at + count))
        at += count
    if len(runs) == 1:
        return None, tuple(map(AdapterRows, runs))
    return at, tuple(AdapterRows(adapter, tuple(own)) for adapter, own in runs.items())
