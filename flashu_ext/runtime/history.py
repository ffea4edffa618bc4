"""Host bookkeeping of an image in progress: which steps updated the head cache and which measured tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from .work import HeadPrediction, HeadUpdate, Routing

__all__ = ["MEASUREMENTS", "HeadHistory", "TokenHistory"]

MEASUREMENTS = 2
"""Token measurements stored: a linear extrapolation needs two."""


@dataclass
class HeadHistory:
    """The steps whose features are in the head's table."""

    order: int
    """Of the extrapolation."""
    restarts: bool
    """Forget the history when a step has more rows than the last: the new rows lack the earlier features that extrapolation
    needs. A fixed step plan waits until they have them, an adaptive one might not."""
    upto: int = 0
    """Up to this step every update forgets the earlier ones: they are too far from the rest to be extrapolated from."""
    steps: list[int] = field(default_factory=list)
    """Newest last."""
    rows: int = 0
    """Rows of the newest."""

    def update(self, step: int, rows: int) -> HeadUpdate:
        """Record that `step` updates the table with a feature of `rows` rows."""
        if (self.restarts and rows > self.rows) or step <= self.upto:
            self.steps.clear()
        copied_from = self.rows if self.steps and rows != self.rows else 0
        interval = float(step - self.steps[-1]) if self.order and self.steps else 1.0
        work = HeadUpdate(rows, copied_from, interval, min(len(self.steps), self.order))
        self.steps.append(step)
        self.rows = rows
        return work

    def predict(self, step: int, rows: int) -> HeadPrediction:
        """The prediction for `step`, of `rows` rows."""
        assert self.steps and rows <= self.rows, "a cached step needs an earlier update of at least as many rows"
        ahead = float(step - self.steps[-1]) if self.order else 0.0
        return HeadPrediction(self.rows, ahead, min(len(self.steps), self.order + 1))


@dataclass
class TokenHistory:
    """The steps that measured token importance."""

    steps: list[int] = field(default_factory=list)

    def measure(self, step: int) -> int:
        """The slot for the measurement of step `step`."""
        self.steps.append(step)
        return self._slot(step)

    def routing(self, sources: tuple[int, ...], step: int) -> Routing:
        """How the tokens of `step` are chosen.

        Args:
            sources: the steps whose measurements are used, newest first. One: importance as measured; two: extrapolated
                linearly.
        """
        newest, *earlier = sources
        if not earlier:
            return Routing(self._slot(newest))
        return Routing(self._slot(newest), self._slot(earlier[0]), (step - newest) / (newest - earlier[0]))

    def _slot(self, step: int) -> int:
        return self.steps.index(step) % MEASUREMENTS
