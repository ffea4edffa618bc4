"""Room: runtime. What one image keeps of the diffusion head between steps, and when that is still good enough."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel_sets import KernelSet

__all__ = ["AdaptiveGate", "HeadCache"]


class HeadCache:
    """The head's kept feature (its output, or what it added to its input) and its finite differences.

    Attributes:
        table: [order + 1, rows, span, width], or None before anything was kept.
        kept_at: steps that the differences in the table are made from, the newest last.
    """

    def __init__(self, order: int, restarts: bool):
        """order: of the extrapolation, 0 to 2. restarts: differences begin anew where rows are added (see `keep`)."""
        self.order = order
        self.restarts = restarts
        self.table: Tensor | None = None
        self.kept_at: list[int] = []

    def keep(self, feature: Tensor, index: int, kernels: KernelSet) -> None:
        """Take in the feature [rows, span, width] of step `index`.

        Its rows may be fewer than the last one's (a step with one branch of guidance), or more. Where they are more, the
        differences of the new rows are meaningless until `order` more features were kept: a fixed step plan does not use
        them before that, and where steps are decided while running they begin anew.
        """
        if self.order == 0:
            self.table = feature[None]
        else:
            self.table = self._table_for(feature)
            interval = float(index - self.kept_at[-1]) if self.kept_at else 1.0
            kernels.taylor_update_(self.table, feature.contiguous(), interval, len(self.kept_at))
        self.kept_at.append(index)

    def _table_for(self, feature: Tensor) -> Tensor:
        """The table with as many rows as the feature."""
        old, rows = self.table, feature.shape[0]
        if old is not None and old.shape[1] == rows:
            return old
        if old is not None and old.shape[1] > rows:
            return old[:, :rows].contiguous()
        table = feature.new_zeros(self.order + 1, *feature.shape)
        if old is not None and self.restarts:
            self.kept_at.clear()
        elif old is not None:
            table[:, : old.shape[1]] = old
        return table

    def carry(self, index: int, rows: int, kernels: KernelSet) -> Tensor:
        """The feature as of step `index` [rows, span, width], for the first `rows` rows of what was kept."""
        assert self.table is not None and self.table.shape[1] >= rows, (
            "a cached step follows one that kept its head state for at least as many rows"
        )
        if self.order == 0:
            return self.table[0, :rows]
        ahead = float(index - self.kept_at[-1])
        return kernels.taylor_predict(self.table, ahead, len(self.kept_at))[:rows]

    def release(self) -> None:
        self.table = None

    def nbytes(self) -> int:
        return self.table.nbytes if self.table is not None else 0


class AdaptiveGate:
    """Sums how far a signal moved since the head last ran, and says when that is too far. All of it on the device: only
    whoever picks the kernels to launch reads the answer."""

    def __init__(self, budget: float):
        self.budget = budget
        self.signal: Tensor | None = None
        self.moved: Tensor | None = None  # fp32 [], the sum of relative L1 changes

    def watch(self, signal: Tensor, kernels: KernelSet) -> None:
        """Take in a step's signal [rows, ...]; of two unequal numbers of rows the rows that both have are compared."""
        if self.signal is not None and self.moved is not None:
            rows = min(self.signal.shape[0], signal.shape[0])
            self.moved = self.moved + kernels.feature_delta(signal[:rows], self.signal[:rows])[0]
        else:
            self.moved = torch.zeros((), dtype=torch.float32, device=signal.device)
        self.signal = signal

    def due(self) -> Tensor:
        """bool []: the head has to be computed. A sum that is not a number counts as too far."""
        assert self.moved is not None, "a step that is decided follows one that was watched"
        return ~(self.moved < self.budget)

    def computed(self) -> None:
        """The head was computed in the step that was watched last."""
        if self.moved is not None:
            self.moved = torch.zeros_like(self.moved)

    def release(self) -> None:
        self.signal = None

    def nbytes(self) -> int:
        return self.signal.nbytes if self.signal is not None else 0
