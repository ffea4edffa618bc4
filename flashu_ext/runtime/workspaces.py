"""Room: runtime. Who draws in which memory: hands out workspaces, and keeps them for the next image where that pays."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import FlashUConfig
from ..structure import Showo2Parts
from .counting import Counts
from .graphs import Pieces, addresses, capture_on, lasting
from .workspace import Shape, Workspace

__all__ = ["Workspaces"]

KEPT_IDLE = 2
"""Workspaces kept between images: for the batch size in use, and for the smaller last batch of a list."""


@dataclass
class _Taken:
    """A workspace, what runs there, where the weights lay when it was made, and the end of its last image's work."""

    workspace: Workspace
    pieces: Pieces
    weights: int
    done: Any = None


class Workspaces:
    """The workspaces of one accelerated model.

    Where work is captured, a finished image's workspace is kept with its graphs, and the next image of a shape that it
    holds is drawn in it. Else it is dropped: there is nothing to save by keeping it.

    Attributes:
        capture: makes the capture of a new workspace, or None. why_not: why there is none. failure: why a capture failed.
        counts: of every piece of work seen, what it asks of the device.
    """

    def __init__(self, parts: Showo2Parts, config: FlashUConfig):
        self.parts = parts
        self.config = config
        self.capture, self.why_not = capture_on(parts.device, config.step_graphs)
        self.failure: str | None = None
        self.counts: dict[Hashable, Counts] = {}
        self._weights = 0
        self._idle: list[_Taken] = []
        self._taken: list[_Taken] = []

    def take(self, shape: Shape) -> tuple[Workspace, Pieces]:
        """A workspace that holds images of a shape, and what runs there; it is the caller's until `give_back`."""
        if self.capture is not None and (weights := addresses(self.parts.model)) != self._weights:
            self._weights = weights
            self._idle.clear()
        for kept in self._idle:
            if kept.workspace.shape.holds(shape):
                self._idle.remove(kept)
                self._taken.append(kept)
                if kept.done is not None:
                    torch.cuda.current_stream(kept.workspace.hidden.device).wait_event(kept.done)
                return kept.workspace, kept.pieces
        fixed = self.capture is not None
        with lasting():
            workspace = Workspace(self.parts, self.config, shape.rounded() if fixed else shape, fixed)
        pieces = Pieces(self.capture() if self.capture else None, self.why_not, self.counts, self._failed)
        self._taken.append(_Taken(workspace, pieces, self._weights))
        return workspace, pieces

    def _failed(self, why: str) -> None:
        """What failed once is not tried again in the next workspace."""
        self.capture, self.failure = None, why

    def give_back(self, workspace: Workspace) -> None:
        """The image is done with it. The next one may run on another stream; it waits for this one's work."""
        for taken in self._taken:
            if taken.workspace is workspace:
                self._taken.remove(taken)
                if self.capture is None or taken.weights != self._weights:
                    return
                if workspace.hidden.device.type == "cuda":
                    taken.done = torch.cuda.current_stream(workspace.hidden.device).record_event()
                self._idle = [*self._idle, taken][-KEPT_IDLE:]
                return

    def lent(self, workspace: Workspace) -> bool:
        """Whether a workspace is still its image's: not after `clear`."""
        return any(taken.workspace is workspace for taken in self._taken)

    def moved(self) -> bool:
        """Whether the weights no longer lie where captured work reads them."""
        return self.capture is not None and addresses(self.parts.model) != self._weights

    def clear(self) -> None:
        """Drop what is kept, and forget what is out."""
        self._idle.clear()
        self._taken.clear()

    def nbytes(self) -> dict[str, int]:
        """Bytes of all workspaces, idle or in use, by purpose."""
        total: dict[str, int] = {}
        for each in (*self._idle, *self._taken):
            for purpose, count in each.workspace.nbytes().items():
                total[purpose] = total.get(purpose, 0) + count
        return total

    def pieces(self) -> list[Pieces]:
        """What runs in all workspaces, idle or in use."""
        return [each.pieces for each in (*self._idle, *self._taken)]
