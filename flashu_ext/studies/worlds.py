"""What an analysis draws, asks and judges: a world of its model's own, as the embedded models have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..models.adapter import adapter_of
from ..nano.calibrate import samples
from ..nano.evaluate import GUIDANCE, SHIFT, Proportion
from ..nano.probe import Probe

__all__ = ["Advance", "Showo2World", "World"]

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


class Showo2World:
    """Of the embedded Show-o2: held-out scenes."""

    def __init__(self, drawings: int, questions: int, seed: int = 0):
        self.drawings, self.questions = drawings, questions
        self._probe = Probe.build(drawings, questions, seed)

    def samples(self, count: int, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
        return samples(count, seed)

    def draw(self, model: Any, advance: Advance) -> Proportion:
        probe = dataclasses.replace(self._probe, asked=[])
        return probe.adherence(probe.perform(model, advance, steps=STEPS))

    def answer(self, model: Any, advance: Advance) -> Proportion:
        probe = dataclasses.replace(self._probe, scenes=[], prompts=[], noise=self._probe.noise[:0])
        return probe.accuracy(probe.perform(model, advance))

    def states(self, model: Any, count: int) -> Sequence[Sequence[Tensor]]:
        """The last block's output over the image span."""
        from ..models.showo2.sampling import sample
        from ..nano.tokenizer import layout

        probe, found = self._probe, []
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).detach().float().clone())

        hook = adapter_of(model).blocks[-1].register_forward_hook(keep)
        try:
            for number in range(count):
                inputs = layout().generation([probe.prompts[number]])
                first, length = inputs.modality_positions[0, 0].tolist()
                outputs.clear()
                noise = probe.noise[number : number + 1]
                sample(model, noise, **vars(inputs), steps=STEPS, guidance_scale=GUIDANCE, time_shifting_factor=SHIFT)
                found.append([output[0, first : first + length].contiguous() for output in outputs])
        finally:
            hook.remove()
        return found
