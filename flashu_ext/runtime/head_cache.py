"""The diffusion head's cached features, on the device, and the drift signal that says when they are too old.

Only memory and device work are here; `history` records, on the host, which steps the features are from.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..ops.kernel_sets import KernelSet
from .work import HeadPrediction, HeadUpdate, WatchWork

__all__ = ["AdaptiveGate", "HeadCache"]


class HeadCache:
    """The head's last feature (the blocks' output, or what they add to their input) and its finite differences.

    One table [order + 1, rows, span, width] for each number of rows: a step with one guidance branch has half of them.
    The extrapolation order is 0 to 8.
    """

    def __init__(self, tables: Iterable[Tensor]):
        self._tables = {table.shape[1]: table for table in tables}

    def update(self, work: HeadUpdate, feature: Tensor, kernels: KernelSet) -> None:
        """Update the table with a new feature [rows, span, width]."""
        table = self._tables[work.rows]
        if work.copied_from:
            common = min(work.copied_from, work.rows)
            if common < work.rows:
                table.zero_()
            table[:, :common] = self._tables[work.copied_from][:, :common]
        if table.shape[0] == 1:
            table[0].copy_(feature)
        else:
            kernels.taylor_update_(table, feature.contiguous(), work.interval, work.count)

    def predict(self, work: HeadPrediction, rows: int, kernels: KernelSet) -> Tensor:
        """The feature predicted for a later step, [rows, span, width]: the first `rows` rows of the table."""
        table = self._tables[work.rows]
        if table.shape[0] == 1:
            return table[0, :rows]
        return kernels.taylor_predict(table, work.ahead, work.count)[:rows]

    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())


class AdaptiveGate:
    """Sums the drift of a signal since the head last ran and compares it with the budget, on the device; only the caller
    reads the decision back."""

    def __init__(self, budget: float, signal: Tensor, drift: Tensor):
        """signal: [max rows, ...], memory for the last signal. drift: fp32 [], the sum of relative L1 changes."""
        self.budget = budget
        self.signal = signal
        self.drift = drift

    def watch(self, work: WatchWork, signal: Tensor, kernels: KernelSet) -> None:
        """Add the change to a step's signal [rows, ...] from the previous one, over the rows that both have."""
        if work.compared:
            self.drift += kernels.feature_delta(signal[: work.compared], self.signal[: work.compared])[0]
        else:
            self.drift.zero_()
        self.signal[: work.rows] = signal

    def due(self) -> Tensor:
        """bool []: the head has to be computed. NaN counts as over budget."""
        return ~(self.drift < self.budget)

    def computed(self) -> None:
        """Restart the sum: the head was computed in the step watched last."""
        self.drift.zero_()

    def nbytes(self) -> int:
        return self.signal.nbytes
