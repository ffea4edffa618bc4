"""Which image tokens every layer of the language model computes: importance measured now and then, kept or
predicted, and cut to a fixed number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.kernel_sets import KernelSet
from .graphs import lasting

__all__ = ["TokenRouter"]

KEPT_MEASUREMENTS = 2
"""As many as a linear extrapolation needs."""


class TokenRouter:
    """Token importance of one image, on the device; the number of active tokens is fixed, so shapes never depend on it.

    Memory stays where it is from image to image; `store` and `active` run on the device and change no plain number here,
    as in `head_cache`.

    Attributes:
        carried: image tokens of a row that are carried past a layer.
    """

    def __init__(self, carried: int, has_time_token: bool):
        self.carried = carried
        self.has_time_token = has_time_token
        self._measured_at: list[int] = []
        self._buffer: Tensor | None = None

    def slot(self, index: int | None = None) -> int:
        """Where the measurement of step `index` lies; None: where the next one goes."""
        at = len(self._measured_at) if index is None else self._measured_at.index(index)
        return at % KEPT_MEASUREMENTS

    def store(self, importance: list[Tensor], rows: int) -> None:
        """Take in a measurement: per layer, fp32 [measured rows, span]. `measured` is told afterwards.

        Args:
            rows: the most that are ever measured.
        """
        stacked = torch.stack(importance)
        if self._buffer is None:
            with lasting():
                self._buffer = stacked.new_zeros(KEPT_MEASUREMENTS, stacked.shape[0], rows, stacked.shape[2])
        self._buffer[self.slot(), :, : stacked.shape[1]] = stacked

    def measured(self, index: int) -> None:
        """Step `index` was taken in."""
        self._measured_at.append(index)

    def reads(self, sources: tuple[int, ...], index: int) -> tuple[float, ...]:
        """The numbers that `active` depends on beside what was measured: equal numbers, equal work."""
        if len(sources) == 1:
            return (self.slot(sources[0]),)
        return (self.slot(sources[0]), self.slot(sources[1]), (index - sources[0]) / (sources[0] - sources[1]))

    def active(self, sources: tuple[int, ...], index: int, rows: int, kernels: KernelSet) -> Tensor:
        """The tokens that step `index` computes: int64 [layers, rows, active], ascending in every row.

        Args:
            sources: steps whose measurements count, the newest first. One: importance stays as it was; two: it is
                extrapolated linearly.
            rows: the first so many of the rows that were measured.
        """
        assert self._buffer is not None, "tokens are chosen after they were measured"
        slot, *rest = self.reads(sources, index)
        importance = self._buffer[int(slot), :, :rows]
        if rest:
            importance = importance + (importance - self._buffer[int(rest[0]), :, :rows]) * rest[1]
        if self.has_time_token:
            # The time token tells every other one what time it is; it is one token, and always computed.
            importance = importance.clone()
            importance[:, :, 0] = float("inf")
        chosen, _ = kernels.select_topk(importance.contiguous(), importance.shape[-1] - self.carried)
        return chosen

    def reset(self) -> None:
        """Another image begins."""
        self._measured_at.clear()

    def nbytes(self) -> int:
        return self._buffer.nbytes if self._buffer is not None else 0
