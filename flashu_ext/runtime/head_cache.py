"""What one image keeps of the diffusion head between steps, and when that is still good enough.

Memory stays where it is from image to image. What runs on the device (`keep`, `carry`, `watch`) reads plain numbers of
this object and changes none, so that it can be captured and replayed wherever those numbers are the same (`keeps`,
`carries`, `watches`); the rest is bookkeeping of the host, done around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.kernel_sets import KernelSet
from .graphs import lasting

__all__ = ["AdaptiveGate", "HeadCache"]


class HeadCache:
    """The head's kept feature (its output, or what it added to its input) and its finite differences.

    Attributes:
        table: [order + 1, rows, span, width], or None before anything was kept.
        kept_at: steps that the differences in the table are made from, the newest last.
    """

    def __init__(self, order: int, restarts: bool):
        """order: of the extrapolation, 0 to 2. restarts: differences begin anew where rows are added (see `resize`)."""
        self.order = order
        self.restarts = restarts
        self.table: Tensor | None = None
        self.kept_at: list[int] = []
        self._tables: dict[int, Tensor] = {}

    def resize(self, rows: int, like: Tensor) -> None:
        """Give the table `rows` rows; like: [any rows, span, width].

        They may be fewer than before (a step with one branch of guidance), or more. Where they are more, the differences of
        the new rows are meaningless until `order` more features were kept: a fixed step plan does not use them before that,
        and where steps are decided while running they begin anew.
        """
        old = self.table if self.kept_at else None
        if rows not in self._tables:
            with lasting():
                self._tables[rows] = like.new_zeros(self.order + 1, rows, *like.shape[1:])
        self.table = table = self._tables[rows]
        if old is None or old is table:
            return
        if old.shape[1] > rows:
            table.copy_(old[:, :rows])
            return
        table.zero_()
        if self.restarts:
            self.kept_at.clear()
        else:
            table[:, : old.shape[1]] = old

    def keeps(self, index: int) -> tuple[float, int]:
        """(steps since the last feature, features that count) of a feature of step `index`."""
        interval = float(index - self.kept_at[-1]) if self.order and self.kept_at else 1.0
        return interval, min(len(self.kept_at), self.order)

    def keep(self, feature: Tensor, index: int, kernels: KernelSet) -> None:
        """Take in the feature [rows, span, width] of step `index`; `kept` is told afterwards."""
        assert self.table is not None, "`resize` comes first"
        if self.order == 0:
            self.table[0].copy_(feature)
        else:
            kernels.taylor_update_(self.table, feature.contiguous(), *self.keeps(index))

    def kept(self, index: int) -> None:
        """The feature of step `index` was taken in."""
        self.kept_at.append(index)

    def carries(self, index: int) -> tuple[float, int, int]:
        """(steps since the last feature, features that count, rows of the table) of a step that carries forward."""
        assert self.table is not None
        ahead = float(index - self.kept_at[-1]) if self.order else 0.0
        return ahead, min(len(self.kept_at), self.order + 1), self.table.shape[1]

    def carry(self, index: int, rows: int, kernels: KernelSet) -> Tensor:
        """The feature as of step `index` [rows, span, width], for the first `rows` rows of what was kept."""
        assert self.table is not None and self.table.shape[1] >= rows, (
            "a cached step follows one that kept its head state for at least as many rows"
        )
        if self.order == 0:
            return self.table[0, :rows]
        ahead, count, _ = self.carries(index)
        return kernels.taylor_predict(self.table, ahead, count)[:rows]

    def reset(self) -> None:
        """Another image begins."""
        self.kept_at.clear()

    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())


class AdaptiveGate:
    """Sums how far a signal moved since the head last ran, and says when that is too far. All of it on the device: only
    whoever picks the kernels to launch reads the answer."""

    def __init__(self, budget: float, rows: int):
        """rows: the most that a signal has."""
        self.budget = budget
        self.rows = rows
        self.watched_rows = 0
        self.signal: Tensor | None = None
        self.moved: Tensor | None = None  # fp32 [], the sum of relative L1 changes

    def watches(self, rows: int) -> tuple[int, int]:
        """(rows of the last signal, rows of this one)."""
        return self.watched_rows, rows

    def watch(self, signal: Tensor, kernels: KernelSet) -> None:
        """Take in a step's signal [rows, ...]; of two unequal numbers of rows the rows that both have are compared.
        `watched` is told afterwards."""
        if self.signal is None or self.moved is None:
            with lasting():
                self.signal = signal.new_zeros(self.rows, *signal.shape[1:])
                self.moved = torch.zeros((), dtype=torch.float32, device=signal.device)
        rows = min(signal.shape[0], self.watched_rows)
        if rows:
            self.moved += kernels.feature_delta(signal[:rows], self.signal[:rows])[0]
        else:
            self.moved.zero_()
        self.signal[: signal.shape[0]] = signal

    def watched(self, rows: int) -> None:
        """A signal of so many rows was taken in."""
        self.watched_rows = rows

    def due(self) -> Tensor:
        """bool []: the head has to be computed. A sum that is not a number counts as too far."""
        assert self.moved is not None, "a step that is decided follows one that was watched"
        return ~(self.moved < self.budget)

    def computed(self) -> None:
        """The head was computed in the step that was watched last."""
        if self.moved is not None:
            self.moved.zero_()

    def reset(self) -> None:
        """Another image begins."""
        self.watched_rows = 0

    def nbytes(self) -> int:
        return self.signal.nbytes if self.signal is not None else 0
