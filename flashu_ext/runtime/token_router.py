"""Which image tokens every layer of the language model computes: importance as it was measured, or extrapolated, and cut to
a fixed number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.kernel_sets import KernelSet
from .work import Routing

__all__ = ["TokenRouter"]


class TokenRouter:
    """Measured importance of tokens, on the device; the number of active tokens is fixed, so shapes never depend on it.

    Attributes:
        skipped: image tokens of a row that a layer leaves out.
    """

    def __init__(self, skipped: int, has_time_token: bool, measured: Tensor):
        """measured: fp32 [measurements, layers, rows, span], memory for what is measured."""
        self.skipped = skipped
        self.has_time_token = has_time_token
        self._measured = measured

    def store(self, slot: int, importance: list[Tensor]) -> None:
        """Keep a measurement: per layer, fp32 [measured rows, span]."""
        stacked = torch.stack(importance)
        self._measured[slot, :, : stacked.shape[1]] = stacked

    def active(self, work: Routing, rows: int, kernels: KernelSet) -> Tensor:
        """The tokens that a step computes: int64 [layers, rows, active], ascending in every row.

        Args:
            rows: the first so many of the rows that were measured.
        """
        importance = self._measured[work.newest, :, :rows]
        if work.earlier is not None:
            importance = importance + (importance - self._measured[work.earlier, :, :rows]) * work.slope
        if self.has_time_token:
            # The time token tells every other one what time it is; it is one token, and always computed.
            importance = importance.clone()
            importance[:, :, 0] = float("inf")
        chosen, _ = kernels.select_topk(importance.contiguous(), importance.shape[-1] - self.skipped)
        return chosen

    def nbytes(self) -> int:
        return self._measured.nbytes
