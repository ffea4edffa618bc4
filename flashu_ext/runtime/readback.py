"""Asynchronous copies of a few numbers from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .memory import outside_inference_mode

__all__ = ["Readback"]


class Readback:
    """A copy that is posted first and waited for later.

    It is queued behind the work that computes the numbers. Work launched between `post` and `wait` keeps the device busy while
    the host waits.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._values: Tensor | None = None
        self._event: Any = None

    def post(self, values: Tensor) -> None:
        """Queue a copy of values (contiguous, exact in fp64), which later work may overwrite."""
        if values.device.type != "cuda":
            self._values, self._event = values.clone(), None
            return
        if self._values is None or self._values.shape != values.shape:
            with outside_inference_mode():
                self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._event = torch.cuda.Event()
        self._values.copy_(values, non_blocking=True)
        self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """Wait for the last copy; its numbers, flat."""
        assert self._values is not None, "`post` comes first"
        self.waits += 1
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.numpy().ravel()]
