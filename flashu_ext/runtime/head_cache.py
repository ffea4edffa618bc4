"""The diffusion head's features that later steps use again, on the device; and the signal that says when they are too old.

Which steps they are from is the image's to know (`history`); here is only memory, and what runs on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..ops.kernel_sets import KernelSet
from .work import HeadPrediction, HeadUpdate, WatchWork

__all__ = ["AdaptiveGate", "HeadCache"]


class HeadCache:
    """The head's last feature (the blocks' output, or what they add to their input) and its finite differences.

    One table [order + 1, rows, span, width] for each number of rows: a step with one branch of guidance has half of them.
    The order of the extrapolation is 0 to 2.
    """

    def __init__(self, tables: Iterable[Tensor]):
        self._tables = {table.shape[1]: table for table in tables}

    def update(self, work: HeadUpdate, feature: Tensor, kernels: KernelSet) -> None:
        """Take in a feature [rows, span, width]."""
        table = self._tables[work.rows]
        if work.carried_from:
            common = min(work.carried_from, work.rows)
            if common < work.rows:
                table.zero_()
            table[:, :common] = self._tables[work.carried_from][:, :common]
        if table.shape[0] == 1:
            table[0].copy_(feature)
        else:
            kernels.taylor_update_(table, feature.contiguous(), work.interval, work.count)

    def predict(self, work: HeadPrediction, rows: int, kernels: KernelSet) -> Tensor:
        """The feature as of a later step [rows, span, width], of the first `rows` rows of the table."""
        table = self._tables[work.rows]
        if table.shape[0] == 1:
            return table[0, :rows]
        return kernels.taylor_predict(table, work.ahead, work.count)[:rows]

    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())


class AdaptiveGate:
    """Sums how far a signal moved since the head last ran, and says when that is too far. All of it on the device: only
    whoever picks the kernels to launch reads the answer."""

    def __init__(self, budget: float, signal: Tensor, moved: Tensor):
        """signal: [most rows, ...], memory for the last one. moved: fp32 [], the sum of relative L1 changes."""
        self.budget = budget
        self.signal = signal
        self.moved = moved

    def watch(self, work: WatchWork, signal: Tensor, kernels: KernelSet) -> None:
        """Take in a step's signal [rows, ...]; the rows that the signal before it has too are compared."""
        if work.compared:
            self.moved += kernels.feature_delta(signal[: work.compared], self.signal[: work.compared])[0]
        else:
            self.moved.zero_()
        self.signal[: work.rows] = signal

    def due(self) -> Tensor:
        """bool []: the head has to be computed. A sum that is not a number counts as too far."""
        return ~(self.moved < self.budget)

    def computed(self) -> None:
        """The head was computed in the step that was watched last."""
        self.moved.zero_()

    def nbytes(self) -> int:
        return self.signal.nbytes
