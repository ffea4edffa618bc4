"""Room: runtime. Which image tokens every layer computes: importance as measured, predicted, and cut to a fixed number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel_sets import KernelSet

__all__ = ["TokenRouter"]

KEPT_MEASUREMENTS = 2
"""As many as a linear extrapolation needs."""


class TokenRouter:
    """Token importance of one image, on the device; the number of active tokens is fixed, so shapes never depend on it.

    Attributes:
        carried: image tokens of a row that are carried past a layer.
    """

    def __init__(self, carried: int, has_time_token: bool):
        self.carried = carried
        self.has_time_token = has_time_token
        self._measured: dict[int, Tensor] = {}
        self._chosen: tuple[tuple[int, ...], Tensor] | None = None

    def measured(self, index: int, importance: list[Tensor]) -> None:
        """Take in what step `index` measured: per layer, fp32 [rows, span]."""
        self._measured[index] = torch.stack(importance)
        while len(self._measured) > KEPT_MEASUREMENTS:
            del self._measured[min(self._measured)]
        self._chosen = None

    def active(self, sources: tuple[int, ...], index: int, rows: int, kernels: KernelSet) -> Tensor:
        """The tokens that step `index` computes: int64 [layers, rows, active], ascending in every row.

        Args:
            sources: steps whose measurements count, the newest first. One: importance stays as it was; two: it is
                extrapolated linearly.
            rows: the first so many of the rows that were measured.
        """
        steady = len(sources) == 1
        if steady and self._chosen is not None and self._chosen[0] == sources and self._chosen[1].shape[1] >= rows:
            return self._chosen[1][:, :rows]
        newest = self._measured[sources[0]]
        importance = newest if steady else newest[:, :rows]
        if not steady:
            slope = (importance - self._measured[sources[1]][:, :rows]) / (sources[0] - sources[1])
            importance = importance + slope * (index - sources[0])
        if self.has_time_token:
            # The time token tells every other one what time it is; it is one token, and always computed.
            importance = importance.clone()
            importance[:, :, 0] = float("inf")
        chosen, _ = kernels.select_topk(importance.contiguous(), importance.shape[-1] - self.carried)
        if steady:
            self._chosen = (sources, chosen)
        return chosen[:, :rows]

    def release(self) -> None:
        self._measured.clear()
        self._chosen = None

    def nbytes(self) -> int:
        chosen = self._chosen[1].nbytes if self._chosen is not None else 0
        return chosen + sum(importance.nbytes for importance in self._measured.values())
