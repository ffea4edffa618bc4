"""What an analysis draws, asks and judges: a world of its model's own, as the embedded models have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..models.adapter import adapter_of
from ..nano.calibrate import samples
from ..nano.evaluate import Proportion
from ..nano.probe import Probe
from ..nano.subject import subject

__all__ = ["Advance", "EmbeddedWorld", "World"]

STEPS = 30
"""Grid points of a drawing."""

Advance = Callable[[int], Any]
"""Told how many outputs more there are."""


class World(Protocol):
    """Samples to score neurons from, and drawings and answers that are judged: the same at every call."""

    drawings: int
    """Of a measurement."""
    questions: int
    """Of a measurement."""

    def samples(self, count: int, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """`count` calibration samples of each task, of the model's family."""

    def draw(self, model: Any, advance: Advance) -> Proportion:
        """Right drawings."""

    def answer(self, model: Any, advance: Advance) -> Proportion:
        """Right answers."""

    def states(self, model: Any, count: int) -> Sequence[Sequence[Tensor]]:
        """For each of the first `count` drawings what the head's cache would keep of every evaluation, fp32 [tokens, width];
        empty where that is not measured. The model is not accelerated."""


class EmbeddedWorld:
    """Of the embedded models of a family: held-out scenes."""

    def __init__(self, family: str, drawings: int, questions: int, seed: int = 0):
        self.family, self.drawings, self.questions = family, drawings, questions
        self._probe = Probe.build(drawings, questions, seed)

    def samples(self, count: int, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
        return samples(count, seed, self.family)

    def draw(self, model: Any, advance: Advance) -> Proportion:
        probe = dataclasses.replace(self._probe, asked=[])
        return probe.adherence(probe.perform(model, advance, steps=STEPS))

    def answer(self, model: Any, advance: Advance) -> Proportion:
        probe = dataclasses.replace(self._probe, scenes=[], prompts=[], noise=self._probe.noise[:0])
        return probe.accuracy(probe.perform(model, advance))

    def states(self, model: Any, count: int) -> Sequence[Sequence[Tensor]]:
        """Of a head of blocks: the last one's output over the image span."""
        blocks, probe, found = adapter_of(model).blocks, self._probe, []
        if not len(blocks):
            return ()
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).detach().float().clone())

        hook = blocks[-1].register_forward_hook(keep)
        try:
            for number in range(count):
                outputs.clear()
                probe.generate(model, [number], STEPS)
                place = subject(self.family).geometry(probe.prompts[number])
                found.append([each[0, place.prefix : place.prefix + place.span].contiguous() for each in outputs])
        finally:
            hook.remove()
        return found
