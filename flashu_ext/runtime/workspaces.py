"""Who draws in which memory: hands out workspaces, and keeps them for the next image where that pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..models.structure import Showo2Parts
from ..planning.config import FlashUConfig
from .graphs import Captures, Pieces, lasting
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
        captures: what captures their work.
    """

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, captures: Captures):
        self.parts = parts
        self.config = config
        self.captures = captures
        self._weights = 0
        self._idle: list[_Taken] = []
        self._taken: list[_Taken] = []

    def take(self, shape: Shape) -> tuple[Workspace, Pieces]:
        """A workspace that holds images of a shape, and what runs there; it is the caller's until `give_back`."""
        fixed = self.captures.make is not None
        if fixed and (weights := self.captures.addresses()) != self._weights:
            self._weights = weights
            self._idle.clear()
        for kept in self._idle:
            if kept.workspace.shape.holds(shape):
                self._idle.remove(kept)
                self._taken.append(kept)
                if kept.done is not None:
                    torch.cuda.current_stream(kept.workspace.hidden.device).wait_event(kept.done)
                return kept.workspace, kept.pieces
        with lasting():
            workspace = Workspace(self.parts, self.config, shape.rounded() if fixed else shape, fixed)
        pieces = self.captures.pieces()
        self._taken.append(_Taken(workspace, pieces, self._weights))
        return workspace, pieces

    def give_back(self, workspace: Workspace) -> None:
        """The image is done with it. The next one may run on another stream; it waits for this one's work."""
        for taken in self._taken:
            if taken.workspace is workspace:
                self._taken.remove(taken)
                if self.captures.make is None or taken.weights != self._weights:
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
        return self.captures.make is not None and self.captures.addresses() != self._weights

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
