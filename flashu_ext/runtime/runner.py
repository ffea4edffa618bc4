"""Runs one accelerated model: an engine for each task, with the same parts, kernels and graph capture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.parts import Showo2Parts
from ..models.showo2.decoding import OnToken, TokenSampler
from ..models.showo2.sampling import SampleInputs
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from .generation import AcceleratedStepper, GenerationEngine
from .graphs import GraphCapture
from .state import ImageRecord
from .understanding import UnderstandingEngine

__all__ = ["Runner"]


class Runner:
    """Created by `flashu_ext.accelerate`; reached through its handle.

    Attributes:
        fallbacks: reason -> calls that ran the model's own methods.
        last_image: the record of the image begun last.
    """

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.config = config
        self.kernels = kernels
        self.capture = GraphCapture(parts.model, parts.device, config.execution.step_graphs)
        self.generation = GenerationEngine(parts, config, kernels, self.capture)
        self.understanding = UnderstandingEngine(parts, config, kernels, self.capture)
        self.fallbacks: Counter[str] = Counter()
        self.last_image: ImageRecord | None = None

    def stepper(self, inputs: SampleInputs) -> AcceleratedStepper:
        """The steps of `flashu_ext.showo2.sample`."""
        stepper = AcceleratedStepper(self.generation, inputs)
        self.last_image = stepper.state.record
        return stepper

    @torch.no_grad()
    def answer_tokens(
        self,
        image_latents: Sequence[Tensor],
        befores: Sequence[Tensor],
        afters: Sequence[Tensor],
        max_new_tokens: int,
        eos_token: int | None,
        sampler: TokenSampler,
        on_token: OnToken | None = None,
    ) -> list[Tensor]:
        """`flashu_ext.showo2.answer_tokens_batch` on an accelerated model; one image [1, channels, H, W] per question."""
        engine = self.understanding
        images = engine.image_embeds(image_latents)
        prompts = [engine.question(*inputs) for inputs in zip(images, befores, afters, strict=True)]
        answers = engine.decode(prompts, max_new_tokens, sampler, eos_token, on_token)
        empty = torch.empty(0, dtype=torch.int64, device=self.parts.device)
        return [torch.stack(answer) if answer else empty for answer in answers]

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now besides the model's weights, by purpose."""
        held = self.generation.pool.nbytes() + self.understanding.nbytes()
        return {purpose: count for purpose, count in held.items() if count}

    def reset(self) -> None:
        """Drop images in progress and cached prompts; calls under way raise at their next step."""
        self.generation.pool.clear()
        self.understanding.reset()
