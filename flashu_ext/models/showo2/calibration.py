"""Samples from which neurons and layers are scored, and the passes that they are. Torch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration import DensePass, Noise, Sample, check_answer_length, masked, noised
from ..masks import omni_allowed
from . import validate

__all__ = ["GenerationSample", "UnderstandingSample", "passes"]


@dataclass(frozen=True)
class GenerationSample(Sample):
    """Images with their prompts.

    Attributes:
        latents: clean latents [B, channels, H, W].
        text_tokens, text_tokens_null: int64 [B, length].
        modality_positions, modality_positions_null: int64 [B, 1, 2].
    """

    kind: ClassVar[str] = "generation"
    family: ClassVar[str | None] = "showo2"
    latents: Tensor
    text_tokens: Tensor
    text_tokens_null: Tensor
    modality_positions: Tensor
    modality_positions_null: Tensor


@dataclass(frozen=True)
class UnderstandingSample(Sample):
    """One image with a question and its answer.

    Attributes:
        image_latents: [1, channels, H, W].
        tokens_before_image: int64 [1, n].
        tokens_after_boi: int64 [1, m]: boi, eoi, question and answer.
        answer_length: number of answer tokens among them. Layer importance is measured at the token before the answer, the
            last one of a prompt.
    """

    kind: ClassVar[str] = "understanding"
    family: ClassVar[str | None] = "showo2"
    image_latents: Tensor
    tokens_before_image: Tensor
    tokens_after_boi: Tensor
    answer_length: int = 0


def passes(
    parts: Any, sample: GenerationSample | UnderstandingSample, times: Sequence[float], noise: Noise
) -> Iterator[DensePass]:
    """See `Adapter.passes`; parts: the model's adapter."""
    if isinstance(sample, UnderstandingSample):
        yield _question(parts, sample)
        return
    for row, t in enumerate(times):
        yield _drawing(parts, sample, t, row, noise)


def _drawing(parts: Any, sample: GenerationSample, t: float, row: int, noise: Noise) -> DensePass:
    """One evaluation of noised latents under guidance; both branches count up to the end of their spans."""
    tokens = torch.cat([sample.text_tokens, sample.text_tokens_null])
    positions = torch.cat([sample.modality_positions, sample.modality_positions_null])
    latents = noised(sample.latents, t, noise)
    time = torch.full((tokens.shape[0],), t, dtype=torch.float32, device=tokens.device)
    validate.check_t2i_inputs(parts.model, latents.repeat(2, 1, 1, 1), time, tokens, positions, True)
    span = parts.with_time(parts.embed_image(latents).repeat(2, 1, 1), parts.time_token(parts.embed_time(time)))
    # No counted token attends past the longest row's span, so the rest is not computed.
    end = positions[:, 0].sum(dim=-1)
    length = int(end.max())
    embeds = parts.embed_tokens(tokens[:, :length])
    for i, offset in enumerate(positions[:, 0, 0].tolist()):
        embeds[i, offset : offset + span.shape[1]] = span[i]
    counted = torch.arange(length, device=tokens.device) < end[:, None]
    run = masked(parts.model.showo.model, embeds, omni_allowed(positions, length))
    return DensePass(run, counted, row)


def _question(parts: Any, sample: UnderstandingSample) -> DensePass:
    """One prefill of image, question and answer."""
    before, after = sample.tokens_before_image, sample.tokens_after_boi
    validate.check_answer_inputs(parts.model, [sample.image_latents], before, after, 0)
    answer = check_answer_length(sample.answer_length, after.shape[1] - 2)
    question = parts.question([parts.embed_image(sample.image_latents)], before, after)
    # Without lm_head, which does not affect the language model's activations.
    return DensePass(masked(parts.model.showo.model, question.embeds, question.allowed[None]), answer=answer)
