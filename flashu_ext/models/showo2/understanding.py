"""Answers about an image in upstream's layout, from a dense or an accelerated model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..accelerated import handle_of
from ..embedding import embed_image, embed_time, with_time_token
from ..masks import additive, omni_allowed
from ..parts import Showo2Parts
from . import validate
from .decoding import OnToken, TokenSampler, decode_dense

__all__ = ["answer_tokens", "answer_tokens_batch", "prompt_embeds"]


def prompt_embeds(
    model: Any, image_latents: Tensor, tokens_before_image: Tensor, tokens_after_boi: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings [1, length, hidden] and visibility bool [length, length] of a question about an image.

    Layout: tokens_before_image, boi, time token (t = 1), image, eoi, question. The bidirectional span starts one token late:
    it covers the image tokens and eoi, not the time token, as in upstream's evaluation (inference_mmu.py).
    """
    parts = Showo2Parts.from_model(model)
    return span_embeds(parts, embed_image(parts, image_latents), tokens_before_image, tokens_after_boi)


def span_embeds(parts: Showo2Parts, image: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """`prompt_embeds` from an encoded image [1, patches, hidden]."""
    embed = parts.embed_tokens
    _, token = embed_time(parts, torch.ones(1, dtype=torch.float32, device=image.device))
    span = with_time_token(parts, image, token)
    embeds = torch.cat([embed(before), embed(after[:, :1]), span, embed(after[:, 1:])], dim=1)
    late = 1 if parts.has_time_token else 0
    bidirectional = torch.tensor([[[before.shape[1] + 1 + late, image.shape[1] + late]]], device=image.device)
    return embeds, omni_allowed(bidirectional, embeds.shape[1])[0]


@torch.no_grad()
def answer_tokens(
    model: Any,
    image_latents: Tensor,
    tokens_before_image: Tensor,
    tokens_after_boi: Tensor,
    max_new_tokens: int = 64,
    eos_token: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    on_token: OnToken | None = None,
) -> Tensor:
    """Answer to a question about an image, greedy unless a temperature is given.

    Args:
        model: a Showo2 (or upstream Showo2Qwen2_5) model, accelerated or not.
        image_latents: [1, channels, H, W].
        tokens_before_image: int64 [1, n], everything before boi.
        tokens_after_boi: int64 [1, m]: boi, eoi, question.
        max_new_tokens: upper bound.
        eos_token: stop after this token, which is part of the result.
        temperature: 0 takes the most likely token; above 0 tokens are sampled.
        top_k, top_p: limit the sampled tokens (`TokenSampler`).
        generator: for sampling, on the model's device; None: torch's own.
        on_token: called with 0 and each token id as it comes; with a dense model all at the end.

    Returns:
        int64 [at most max_new_tokens].

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    """
    validate.check_answer_inputs(model, image_latents, tokens_before_image, tokens_after_boi, max_new_tokens, eos_token)
    validate.check_sampling(temperature, top_k, top_p)
    if generator is not None:
        validate.check_generator("generator", generator, image_latents.device)
    sampler = TokenSampler(temperature, top_k, top_p, None if generator is None else [generator])
    inputs = ([image_latents], [tokens_before_image], [tokens_after_boi])
    return _answer(model, *inputs, max_new_tokens, eos_token, sampler, on_token)[0]


@torch.no_grad()
def answer_tokens_batch(
    model: Any,
    image_latents: Tensor | Sequence[Tensor],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
    max_new_tokens: int = 64,
    eos_token: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    on_token: OnToken | None = None,
) -> list[Tensor]:
    """Answers to several questions, of any lengths; each equals that of `answer_tokens` alone.

    An accelerated model computes them as one batch, and shared images and prefixes once; a dense one answers one after the
    other, as upstream.

    Args:
        image_latents: [B, channels, H, W], or a list of [1, channels, H, W], whose sizes may differ if the model allows it;
            a single image serves all questions.
        befores, afters: as `tokens_before_image` and `tokens_after_boi` of `answer_tokens`, one for each question.
        generators: one for each question; None: torch's own, whose draws an accelerated model uses in another order.
        on_token: called with a question's index and its next token id, for every token as it comes.
        The rest is as in `answer_tokens`.

    Returns:
        One int64 [at most max_new_tokens] for each question.

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    """
    for name, values in (("befores", befores), ("afters", afters), ("generators", generators)):
        if not isinstance(values, (list, tuple)) and (name != "generators" or values is not None):
            raise TypeError(f"{name}: expected a list, got {type(values).__name__}")
        if values is not None and len(values) != len(befores):
            raise ValueError(f"{name}: expected one for each of {len(befores)} questions, got {len(values)}")
    images: list[Tensor]
    if isinstance(image_latents, Tensor):
        images = list(image_latents.split(1)) if image_latents.dim() == 4 else [image_latents]
    elif isinstance(image_latents, (list, tuple)):
        images = list(image_latents)
    else:
        raise TypeError(f"image_latents: expected a tensor or a list, got {type(image_latents).__name__}")
    if len(images) == 1:
        images *= len(befores)
    if len(images) != len(befores):
        raise ValueError(
            f"image_latents: expected one image, or one for each of {len(befores)} questions, got {len(images)}"
        )
    for row, inputs in enumerate(zip(images, befores, afters, strict=True)):
        validate.check_answer_inputs(model, *inputs, max_new_tokens, eos_token, f"[{row}]")
    validate.check_sampling(temperature, top_k, top_p)
    for row, generator in enumerate(generators or ()):
        validate.check_generator(f"generators[{row}]", generator, images[row].device)
    sampler = TokenSampler(temperature, top_k, top_p, generators)
    return _answer(model, images, befores, afters, max_new_tokens, eos_token, sampler, on_token)


def _answer(
    model: Any,
    images: Sequence[Tensor],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
    max_new_tokens: int,
    eos_token: int | None,
    sampler: TokenSampler,
    on_token: OnToken | None,
) -> list[Tensor]:
    handle = handle_of(model)
    if handle is not None:
        return handle.runner.answer_tokens(images, befores, afters, max_new_tokens, eos_token, sampler, on_token)
    answers = []
    for row, inputs in enumerate(zip(images, befores, afters, strict=True)):
        answers.append(_answer_dense(model, prompt_embeds(model, *inputs), row, max_new_tokens, eos_token, sampler))
        for token in answers[-1].tolist() if on_token is not None else ():
            on_token(row, token)  # type: ignore[misc]
    return answers


def _answer_dense(
    model: Any,
    prompt: tuple[Tensor, Tensor],
    row: int,
    max_new_tokens: int,
    eos_token: int | None,
    sampler: TokenSampler,
) -> Tensor:
    """Answer by the model's own `mmu_generate` where it supports the sampler; upstream's has neither top-p nor generators."""
    embeds, allowed = prompt
    mask = additive(allowed, embeds.dtype)
    greedy = sampler.temperature == 0
    if greedy or (sampler.top_p is None and sampler.generators is None):
        generate: Any = model.mmu_generate
        tokens = generate(
            input_embeds=embeds,
            attention_mask=mask[None, None],
            max_new_tokens=max_new_tokens,
            temperature=1.0 if greedy else sampler.temperature,
            top_k=1 if greedy else sampler.top_k,
            eos_token=eos_token,
        )
    else:
        tokens = decode_dense(
            model, embeds, allowed, max_new_tokens, lambda logits, _: sampler(logits, [row]), eos_token
        )
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64, device=embeds.device)
