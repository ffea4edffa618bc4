"""Samples from which neurons and layers are scored, and the passes that they are. Torch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration import DensePass, Noise, Sample, check_answer_length, masked, noised
from ..checks import check_tokens
from .images import check_pixels, image_span
from .sampling import TIMES, SampleInputs, check_latents

__all__ = ["GenerationSample", "UnderstandingSample", "passes"]


@dataclass(frozen=True)
class GenerationSample(Sample):
    """Images with their prompts.

    Attributes:
        latents: clean latents [B, channels, H, W], before the VAE's scaling is taken back.
        tokens: int64 [n] or [B, n]: bos, prompt and the tag of drawing, as for `sample`.
        pad_token: takes the prompt's places where there is none; never seen.
    """

    kind: ClassVar[str] = "generation"
    family: ClassVar[str | None] = "janusflow"
    latents: Tensor
    tokens: Tensor
    pad_token: int = 0


@dataclass(frozen=True)
class UnderstandingSample(Sample):
    """One image with a question and its answer.

    Attributes:
        pixel_values: [1, 3, side, side].
        tokens: int64 [1, n], a question as for `answer_tokens`, then the answer.
        answer_length: number of answer tokens among them. Layer importance is measured at the token before the answer, the
            last one of a prompt.
    """

    kind: ClassVar[str] = "understanding"
    family: ClassVar[str | None] = "janusflow"
    pixel_values: Tensor
    tokens: Tensor
    answer_length: int = 0


def passes(
    parts: Any, sample: GenerationSample | UnderstandingSample, times: Sequence[float], noise: Noise
) -> Iterator[DensePass]:
    """See `Adapter.passes`; parts: the model's adapter."""
    if isinstance(sample, UnderstandingSample):
        yield _question(parts, sample)
        return
    model = parts.model
    check_latents("latents", sample.latents, model)
    inputs = SampleInputs.build(model, sample.latents, sample.tokens, None, 1.0, sample.pad_token)
    seen = torch.tensor(inputs.seen, device=sample.latents.device)
    position = torch.arange(inputs.tokens.shape[1], device=seen.device)
    # Prompt, time and image count in both branches, padding in none: it is not seen.
    counted = (position < seen[:, None]) | (position >= inputs.length)
    for row, t in enumerate(times):
        yield DensePass(_drawing(model, inputs, seen, noised(sample.latents, t, noise), t), counted, row)


def _drawing(model: Any, inputs: SampleInputs, seen: Tensor, latents: Tensor, t: float) -> Any:
    """One evaluation of noised latents under guidance, as in `DenseStepper.step`, without the decoder of latents."""
    times = torch.full((len(latents),), t * TIMES, dtype=torch.float32, device=latents.device)
    time = model.vision_gen_enc_model.time_embed(times)
    encoded = model.vision_gen_enc_model(latents.to(time.dtype), time)
    span = model.span(encoded, time).repeat(2, 1, 1)
    return lambda: model.backbone(inputs.tokens[:, : inputs.length], seen, span)


def _question(parts: Any, sample: UnderstandingSample) -> DensePass:
    """One prefill of image, question and answer."""
    model = parts.model
    check_pixels(sample.pixel_values, 1, model)
    check_tokens("tokens", sample.tokens, 1, parts.embed_tokens)
    start, count = image_span(model, sample.tokens)
    after = sample.tokens[:, start + count :]
    if not after.shape[1]:
        raise ValueError("tokens: expected a question after the image, got none")
    answer = check_answer_length(sample.answer_length, after.shape[1] - 1)
    image = model.embed_image(sample.pixel_values.to(parts.dtype))
    question = parts.question([image], sample.tokens[:, :start], after)
    run = masked(model.language_model.model, question.embeds, question.allowed[None])
    return DensePass(run, answer=answer)
