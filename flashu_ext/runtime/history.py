"""What an image in progress has kept and measured so far, on the host: the steps, from which the next work's numbers follow."""

from __future__ import annotations

from dataclasses import dataclass, field

from .work import HeadPrediction, HeadUpdate, Routing

__all__ = ["MEASUREMENTS", "HeadHistory", "TokenHistory"]

MEASUREMENTS = 2
"""Measurements of tokens that are kept: as many as a linear extrapolation needs."""


@dataclass
class HeadHistory:
    """Which steps' features the head's table is made from.

    Attributes:
        order: of the extrapolation. restarts: differences begin anew where rows are added. Those of the new rows are
            meaningless until `order` more features were taken in: a fixed step plan does not use them before that, but where
            steps are decided while running they might be.
        steps: the newest last. rows: of the last one.
    """

    order: int
    restarts: bool
    steps: list[int] = field(default_factory=list)
    rows: int = 0

    def update(self, step: int, rows: int) -> HeadUpdate:
        """Step `step` takes a feature of so many rows in."""
        if self.restarts and rows > self.rows:
            self.steps.clear()
        carried_from = self.rows if self.steps and rows != self.rows else 0
        interval = float(step - self.steps[-1]) if self.order and self.steps else 1.0
        work = HeadUpdate(rows, carried_from, interval, min(len(self.steps), self.order))
        self.steps.append(step)
        self.rows = rows
        return work

    def predict(self, step: int, rows: int) -> HeadPrediction:
        """Step `step` uses what was taken in, of at least so many rows."""
        assert self.steps and rows <= self.rows, (
            "a cached step follows one that kept as many rows of its head's feature"
        )
        ahead = float(step - self.steps[-1]) if self.order else 0.0
        return HeadPrediction(self.rows, ahead, min(len(self.steps), self.order + 1))


@dataclass
class TokenHistory:
    """Which steps measured the importance of tokens."""

    steps: list[int] = field(default_factory=list)

    def measure(self, step: int) -> int:
        """The slot for the measurement of step `step`."""
        self.steps.append(step)
        return self._slot(step)

    def routing(self, sources: tuple[int, ...], step: int) -> Routing:
        """What chooses the tokens of step `step`.

        Args:
            sources: steps whose measurements count, the newest first. One: importance stays as it was; two: it is
                extrapolated linearly.
        """
        newest, *earlier = sources
        if not earlier:
            return Routing(self._slot(newest))
        return Routing(self._slot(newest), self._slot(earlier[0]), (step - newest) / (newest - earlier[0]))

    def _slot(self, step: int) -> int:
        return self.steps.index(step) % MEASUREMENTS
