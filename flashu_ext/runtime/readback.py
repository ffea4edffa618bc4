"""Numbers on their way from the device to the host, which waits only when it needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .memory import outside_inference_mode

__all__ = ["Readback"]


class Readback:
    """A few numbers that are read some time after they were sent.

    The copy is queued behind the work that makes the numbers; whatever is launched between `post` and `wait` keeps the device
    busy while the host waits.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._values: Tensor | None = None
        self._event: Any = None

    def post(self, values: Tensor) -> None:
        """Send values, of any shape, contiguous, exact in fp64. They may be overwritten on the device from here on."""
        if values.device.type != "cuda":
            self._values, self._event = values.clone(), None
            return
        if self._values is None or self._values.shape != values.shape:
            with outside_inference_mode():
                self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._event = torch.cuda.Event()
        self._values.copy_(values, non_blocking=True)
        self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """The numbers sent last, flat."""
        assert self._values is not None, "`post` comes first"
        self.waits += 1
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.numpy().ravel()]
