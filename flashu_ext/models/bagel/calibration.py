"""Samples from which neurons and layers are scored, and the passes that they are. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration import DensePass, Noise, Sample, TokenSample, noised
from ..checks import check_tokens
from .config import config_of
from .layers import Context, Experts
from .model import Image, Text, TokenIds
from .sampling import MARKERS, branch_inputs, check_inputs, check_size

__all__ = ["GenerationSample", "PromptSample", "UnderstandingSample", "passes"]


@dataclass(frozen=True)
class GenerationSample(Sample):
    """An image with what it is drawn or edited from.

    Attributes:
        latents: clean latent tokens [n, numbers of a token] (`Bagel.packed`).
        inputs: texts and images in order, as for `sample`; the prompt is the last text.
        size: (height, width) in pixels.
        token_ids: of the markers, `TokenIds` or a mapping with its names.
    """

    kind: ClassVar[str] = "generation"
    family: ClassVar[str | None] = "bagel"
    latents: Tensor
    inputs: Sequence[Text | Image]
    size: tuple[int, int]
    token_ids: TokenIds | Mapping[str, int]

    def prompt(self) -> PromptSample:
        return PromptSample(self)


@dataclass(frozen=True)
class UnderstandingSample(Sample):
    """A question with its answer.

    Attributes:
        inputs: texts and images in order, as for `answer_tokens`; images are read by the image encoder.
        answer: its token ids, without markers. Layer importance is measured at the marker before them.
        token_ids: of the markers, `TokenIds` or a mapping with its names.
    """

    kind: ClassVar[str] = "understanding"
    family: ClassVar[str | None] = "bagel"
    inputs: Sequence[Text | Image]
    answer: tuple[int, ...]
    token_ids: TokenIds | Mapping[str, int]


@dataclass(frozen=True)
class PromptSample(Sample):
    """What the text expert computes of a drawing, at every time: texts, images that the image encoder has read, and all markers.
    Layer importance is over all tokens, the patches too, and at the last marker."""

    kind: ClassVar[str] = "understanding"
    family: ClassVar[str | None] = "bagel"
    drawing: GenerationSample


def passes(
    parts: Any, sample: GenerationSample | UnderstandingSample | TokenSample, times: Sequence[float], noise: Noise
) -> Iterator[DensePass]:
    """See `Adapter.passes`; parts: the model's adapter."""
    model = parts.model
    if isinstance(sample, TokenSample):
        sample.check()
        check_tokens("tokens", sample.tokens, 1, parts.embed_tokens)
        yield DensePass(lambda: _text(model, sample.tokens[0], Context()), answer=sample.answer_length)
    elif isinstance(sample, UnderstandingSample):
        yield _question(model, sample)
    elif isinstance(sample, PromptSample):
        runs = list(_drawing(model, sample.drawing, times, noise))
        yield DensePass(lambda: [run(_contexts(model, sample.drawing)) for run in runs])
    else:
        runs = list(_drawing(model, sample, times, noise))
        counted = torch.ones(1, len(sample.latents) + MARKERS, dtype=torch.bool, device=sample.latents.device)
        counted[:, [0, -1]] = False
        # Images of the sequence are computed once for all evaluations of a drawing, and do not count.
        contexts = _contexts(model, sample)
        for row, run in enumerate(runs):
            yield DensePass(partial(run, contexts), counted, row)


def _drawing(
    model: Any, sample: GenerationSample, times: Sequence[float], noise: Noise
) -> Iterator[Callable[[Sequence[Context]], object]]:
    """For each time an evaluation of the noised latent tokens after given contexts."""
    ids = check_inputs(model, sample.inputs, sample.token_ids)
    grid = check_size(model, sample.latents, sample.size, "latents")
    for t in times:
        tokens = noised(sample.latents, t, noise)
        # The model's own time is 1 for noise.
        time = torch.full((1,), 1 - t, dtype=torch.float32, device=tokens.device)
        yield partial(_evaluate, model, tokens, time, grid, ids)


def _evaluate(
    model: Any, tokens: Tensor, time: Tensor, grid: tuple[int, int], ids: TokenIds, contexts: Sequence[Context]
) -> object:
    return [model.hidden(tokens, time, grid, context, ids) for context in contexts]


def _contexts(model: Any, sample: GenerationSample) -> list[Context]:
    """Of the branches that guidance by text has: with the text at the end and without."""
    ids = check_inputs(model, sample.inputs, sample.token_ids)
    full, without_text, _ = branch_inputs(sample.inputs)
    before = model.context(without_text, ids)
    return [before] if len(full) == len(without_text) else [model.append(before, full[-1], ids), before]


def _question(model: Any, sample: UnderstandingSample) -> DensePass:
    """Question, then the marker and the answer."""
    ids = check_inputs(model, sample.inputs, sample.token_ids)
    for index, item in enumerate(sample.inputs):
        if isinstance(item, Image) and item.latents is not None:
            raise ValueError(f"inputs[{index}].latents: expected None, answers read images by vit_tokens, got latents")
    answer, vocabulary = sample.answer, config_of(model).vocab
    if not isinstance(answer, (list, tuple)):
        raise TypeError(f"answer: expected a tuple of token ids, got {type(answer).__name__}")
    for place, token in enumerate(answer):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise IndexError(f"answer[{place}]: expected a token id in [0, {vocabulary}), got {token!r}")
    words = torch.tensor([ids.bos_token_id, *answer], device=model.vae2llm.weight.device)
    return DensePass(lambda: _text(model, words, model.context(sample.inputs, ids)), answer=len(answer))


def _text(model: Any, tokens: Tensor, context: Context) -> object:
    run = model.language_model.model
    return run(run.embed_tokens(tokens), Experts(), context, causal=True, step=1)
