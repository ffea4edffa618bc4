"""Answers about images in upstream's layout, from a dense or an accelerated model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..accelerated import handle_of
from ..checks import check_callback, check_generator
from ..decoding import OnToken, TokenSampler
from ..masks import additive
from . import validate
from .adapter import adapter
from .decoding import decode_dense

__all__ = ["answer_tokens", "answer_tokens_batch", "prompt_embeds"]


Images = Tensor | Sequence[Tensor]
"""The images of a question: latents [1, channels, H, W], or a list of them, whose sizes may differ."""


def prompt_embeds(
    model: Any, image_latents: Images, tokens_before_image: Tensor, tokens_after_boi: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings [1, length, hidden] and visibility bool [length, length] of a question about one or more images.

    Layout: tokens_before_image, for every image boi, time token (t = 1), image, eoi, then the question. An image's
    bidirectional span starts one token late: it covers the image tokens and eoi, not the time token, as in upstream's
    evaluation (inference_mmu.py), which takes one image. Later images see earlier ones, not the other way round.
    """
    own = adapter(model)
    images = [own.embed_image(latents) for latents in images_of(image_latents)]
    question = own.question(images, tokens_before_image, tokens_after_boi)
    return question.embeds, question.allowed


def images_of(image_latents: Any, row: str = "") -> list[Any]:
    """The images of a question as a list. row: its index in a batch, as '[3]', for messages. Raises ValueError for none."""
    images = list(image_latents) if isinstance(image_latents, (list, tuple)) else [image_latents]
    if not images:
        raise ValueError(f"image_latents{row}: expected at least one image, got an empty list")
    return images


@torch.no_grad()
def answer_tokens(
    model: Any,
    image_latents: Images,
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
    """Answer to a question about one or more images, greedy unless a temperature is given.

    Args:
        model: a Showo2 (or upstream Showo2Qwen2_5) model, accelerated or not.
        image_latents: [1, channels, H, W], or a list of them in the order of their spans (`prompt_embeds`); their sizes may
            differ if the model allows it.
        tokens_before_image: int64 [1, n], everything before the first boi.
        tokens_after_boi: int64 [1, m]: boi, eoi, question. Every image has a boi and an eoi of its own.
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
    images = images_of(image_latents)
    validate.check_answer_inputs(model, images, tokens_before_image, tokens_after_boi, max_new_tokens, eos_token)
    check_callback("on_token", on_token)
    if generator is not None:
        check_generator("generator", generator, images[0].device)
    sampler = TokenSampler(temperature, top_k, top_p, None if generator is None else [generator])
    inputs = ([images], [tokens_before_image], [tokens_after_boi])
    return _answer(model, *inputs, max_new_tokens, eos_token, sampler, on_token)[0]


@torch.no_grad()
def answer_tokens_batch(
    model: Any,
    image_latents: Tensor | Sequence[Images],
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
        image_latents: [B, channels, H, W], or a list with an image [1, channels, H, W] or a list of images for each question,
            whose sizes may differ if the model allows it; a single entry serves all questions.
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
    entries: Sequence[Any]
    if isinstance(image_latents, Tensor):
        entries = image_latents.split(1) if image_latents.dim() == 4 else [image_latents]
    elif isinstance(image_latents, (list, tuple)):
        entries = image_latents
    else:
        raise TypeError(f"image_latents: expected a tensor or a list, got {type(image_latents).__name__}")
    images = [images_of(entry, f"[{row}]") for row, entry in enumerate(entries)]
    if len(images) == 1:
        images *= len(befores)
    if len(images) != len(befores):
        raise ValueError(
            f"image_latents: expected one image, or one for each of {len(befores)} questions, got {len(images)}; several images "
            "of one question are a list of their own"
        )
    for row, inputs in enumerate(zip(images, befores, afters, strict=True)):
        validate.check_answer_inputs(model, *inputs, max_new_tokens, eos_token, f"[{row}]")
    check_callback("on_token", on_token)
    for row, generator in enumerate(generators or ()):
        check_generator(f"generators[{row}]", generator, images[row][0].device)
    sampler = TokenSampler(temperature, top_k, top_p, generators)
    return _answer(model, images, befores, afters, max_new_tokens, eos_token, sampler, on_token)


def _answer(
    model: Any,
    images: Sequence[Sequence[Tensor]],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
    max_new_tokens: int,
    eos_token: int | None,
    sampler: TokenSampler,
    on_token: OnToken | None,
) -> list[Tensor]:
    """images: of each question."""
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
