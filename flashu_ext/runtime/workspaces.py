"""Room: runtime. Who draws in which memory: hands out workspaces, and keeps them for the next image where that pays."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ..config import FlashUConfig
from ..structure import Showo2Parts
from .counting import Counts
from .graphs import Capture, CudaCapture, Pieces
from .workspace import Shape, Workspace

__all__ = ["Workspaces"]

KEPT_IDLE = 2
"""Workspaces kept between images: for the batch size in use, and for the smaller last batch of a list."""


class Workspaces:
    """The workspaces of one accelerated model.

    Where work is captured, a finished image's workspace is kept with its graphs, and the next image of a shape that it
    holds is drawn in it. Else it is dropped: there is nothing to save by keeping it.

    Attributes:
        capture: makes the capture of a new workspace, or None. why_not: why there is none.
        counts: of every piece of work seen, what it asks of the device.
    """

    def __init__(self, parts: Showo2Parts, config: FlashUConfig):
        self.parts = parts
        self.config = config
        self.capture: Callable[[], Capture] | None = None
        self.why_not: str | None = None
        if not config.step_graphs:
            self.why_not = "FlashUConfig.step_graphs is False"
        elif parts.device.type != "cuda":
            self.why_not = f"CUDA graphs need a CUDA device, the model is on {parts.device.type}"
        else:
            self.capture = CudaCapture
        self.counts: dict[Hashable, Counts] = {}
        self._idle: list[tuple[Workspace, Pieces]] = []
        self._taken: list[tuple[Workspace, Pieces]] = []

    def take(self, shape: Shape) -> tuple[Workspace, Pieces]:
        """A workspace that holds images of a shape, and what runs there; it is the caller's until `give_back`."""
        for pair in self._idle:
            if pair[0].shape.holds(shape):
                self._idle.remove(pair)
                self._taken.append(pair)
                return pair
        fixed = self.capture is not None
        workspace = Workspace(self.parts, self.config, shape.rounded() if fixed else shape, fixed)
        pair = (workspace, Pieces(self.capture() if self.capture else None, self.why_not, self.counts))
        self._taken.append(pair)
        return pair

    def give_back(self, workspace: Workspace) -> None:
        for pair in self._taken:
            if pair[0] is workspace:
                self._taken.remove(pair)
                if self.capture is not None:
                    self._idle = [*self._idle, pair][-KEPT_IDLE:]
                return

    def clear(self) -> None:
        """Drop what is kept, and forget what is out."""
        self._idle.clear()
        self._taken.clear()

    def nbytes(self) -> dict[str, int]:
        """Bytes of all workspaces, idle or in use, by purpose."""
        total: dict[str, int] = {}
        for workspace, _ in (*self._idle, *self._taken):
            for purpose, count in workspace.nbytes().items():
                total[purpose] = total.get(purpose, 0) + count
        return total

    def pieces(self) -> list[Pieces]:
        """What runs in all workspaces, idle or in use."""
        return [pieces for _, pieces in (*self._idle, *self._taken)]
