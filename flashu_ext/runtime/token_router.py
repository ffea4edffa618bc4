"""Chooses the image tokens that each layer of the language model computes: a fixed number, by measured or extrapolated
importance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.kernel_sets import KernelSet
from .work import Routing

__all__ = ["TokenRouter"]


class TokenRouter:
    """Measured token importance, on the device. The number of active tokens is fixed, so shapes never depend on it.

    Attributes:
        skipped: image tokens per row that a layer skips.
    """

    def __init__(self, skipped: int, lead: int, measured: Tensor):
        """lead: tokens of a span before the patches. measured: fp32 [measurements, layers, rows, span], memory for them."""
        self.skipped = skipped
        self.lead = lead
        self._measured = measured

    def store(self, slot: int, importance: Sequence[Tensor]) -> None:
        """Store a measurement: fp32 [measured rows, span] per layer."""
        stacked = torch.stack(list(importance))
        self._measured[slot, :, : stacked.shape[1]] = stacked

    def active(self, work: Routing, rows: int, kernels: KernelSet) -> Tensor:
        """The tokens that a step computes: int64 [layers, rows, active], ascending in every row.

        Args:
            rows: of the step, the first of the measured ones.
        """
        importance = self._measured[work.newest, :, :rows]
        if work.earlier is not None:
            importance = importance + (importance - self._measured[work.earlier, :, :rows]) * work.slope
        if self.lead:
            # Always computed: all other tokens read the time from them.
            importance = importance.clone()
            importance[:, :, : self.lead] = float("inf")
        chosen, _ = kernels.select_topk(importance.contiguous(), importance.shape[-1] - self.skipped)
        return chosen

    def nbytes(self) -> int:
        return self._measured.nbytes
