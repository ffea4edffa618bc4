"""A fixed set of prompts with noise and pictures with questions for the embedded model, and its outputs.

Demo, fidelity report and tuning run the same set under each setting, so that only the settings differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import codec
from .evaluate import Proportion, answer, generate, make_noise
from .judge import Verdict, judge
from .world import Question, Scene, captions, questions, render, scenes

__all__ = ["Outputs", "Probe", "Split"]

BATCH = 24

Split = str
"""'held-out' (scenes that training never saw), or 'training'."""

Advance = Callable[[int], Any]


def _nothing(count: int) -> None:
    pass


@dataclass
class Outputs:
    """A model's outputs for a probe.

    Attributes:
        latents: fp32 [images, 16, 72, 2].
        images: uint8 [images, 48, 48, 3].
        answers: text per question.
        tokens: token ids per question.
    """

    latents: Tensor
    images: np.ndarray
    answers: list[str]
    tokens: list[list[int]]


@dataclass
class Probe:
    """Prompts and questions. Made by `Probe.build`.

    Attributes:
        scenes, prompts, noise: one of each per image; noise is fp32 [images, 16, 72, 2].
        pictures: uint8 [48, 48, 3] each. picture_latents: [1, 16, 72, 2] each.
        asked: (picture, question).
    """

    scenes: list[Scene]
    prompts: list[str]
    noise: Tensor
    pictures: list[np.ndarray]
    picture_latents: list[Tensor]
    asked: list[tuple[int, Question]]

    @classmethod
    def build(cls, drawings: int, asked: int, seed: int = 0, split: Split = "held-out") -> Probe:
        """`drawings` prompts, half of one object and half of two, and `asked` questions about fresh pictures.

        Raises:
            ValueError: an unknown split.
        """
        if split not in ("held-out", "training"):
            raise ValueError(f"split: expected 'held-out' or 'training', got {split!r}")
        rng = random.Random(seed)
        held_out = split == "held-out"
        one, two = (rng.sample(pool, len(pool)) for pool in (scenes(held_out, 1), scenes(held_out, 2)))
        chosen = [(two if i % 2 else one)[i // 2 % len(two if i % 2 else one)] for i in range(drawings)]
        pictures: list[np.ndarray] = []
        latents: list[Tensor] = []
        queue: list[tuple[int, Question]] = []
        while len(queue) < asked:
            pool = two if len(pictures) % 3 else one
            scene = pool[len(pictures) % len(pool)]
            picture = render(scene, rng)
            latents.append(codec.encode(codec.to_unit(picture[None])))
            queue += [(len(pictures), question) for question in questions(scene, rng)]
            pictures.append(picture)
        return cls(
            scenes=chosen,
            prompts=[rng.choice(captions(scene)) for scene in chosen],
            noise=make_noise(drawings, seed),
            pictures=pictures,
            picture_latents=latents,
            asked=queue[:asked],
        )

    # ---- one at a time

    def generate(
        self,
        model: Any,
        chosen: Sequence[int],
        steps: int | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Final latents of the images with these numbers, in one batch.

        Args:
            steps: grid points if the config has none.
            callback: as for `showo2.sample`.
        """
        return generate(model, [self.prompts[i] for i in chosen], self.noise[list(chosen)], steps, callback)

    def ask(self, model: Any, number: int) -> tuple[str, list[int]]:
        """The answer to one question, as text and as tokens."""
        picture, question = self.asked[number]
        return answer(model, self.picture_latents[picture], question)

    # ---- all of it

    def perform(self, model: Any, advance: Advance = _nothing, steps: int | None = None) -> Outputs:
        """Generate all images and answers; `advance(n)` is called after every n of them."""
        drawn = [torch.empty(0, *codec.LATENT_SHAPE, dtype=torch.float32, device="cpu")]
        for start in range(0, len(self.prompts), BATCH):
            chosen = range(start, min(start + BATCH, len(self.prompts)))
            drawn.append(self.generate(model, chosen, steps).cpu())
            advance(len(chosen))
        answers, tokens = [], []
        for number in range(len(self.asked)):
            text, ids = self.ask(model, number)
            answers.append(text)
            tokens.append(ids)
            advance(1)
        latents = torch.cat(drawn)
        return Outputs(latents, codec.pictures(latents), answers, tokens)

    def verdicts(self, outputs: Outputs) -> list[Verdict]:
        """Whether each image is correct, and why not."""
        return [judge(image, scene) for image, scene in zip(outputs.images, self.scenes, strict=True)]

    def adherence(self, outputs: Outputs) -> Proportion:
        verdicts = self.verdicts(outputs)
        return Proportion(sum(verdict.right for verdict in verdicts), len(verdicts))

    def accuracy(self, outputs: Outputs) -> Proportion:
        right = [text == question.answer for text, (_, question) in zip(outputs.answers, self.asked, strict=True)]
        return Proportion(sum(right), len(right))
