"""Answers about images, from a dense or an accelerated model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..accelerated import handle_of
from ..checks import check_callback, check_count, check_eos, check_generators, check_own, check_tokens
from ..decoding import OnToken, TokenSampler
from .adapter import adapter
from .images import check_pixels, image_span
from .model import JanusFlow

__all__ = ["answer_tokens", "answer_tokens_batch", "around_image"]


@torch.no_grad()
def answer_tokens(
    model: Any,
    pixel_values: Tensor,
    tokens: Tensor,
    max_new_tokens: int = 64,
    eos_token: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    on_token: OnToken | None = None,
) -> Tensor:
    """Answer to a question about one image, greedy unless a temperature is given.

    Args:
        model: a JanusFlow, accelerated or not.
        pixel_values: [1, 3, side, side], see `pixel_values`.
        tokens: int64 [1, n]: bos, system prompt and role, begin_of_image, the placeholders, end_of_image, question and role.
        max_new_tokens: upper bound.
        eos_token: stop after this token, which is part of the result.
        temperature, top_k, top_p, generator: as in `flashu_ext.showo2.answer_tokens`.
        on_token: called with 0 and each token id as it comes; with a dense model all at the end.

    Returns:
        int64 [at most max_new_tokens].

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    """
    (answer,) = answer_tokens_batch(
        model,
        pixel_values,
        [tokens],
        max_new_tokens,
        eos_token,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generators=None if generator is None else [generator],
        on_token=on_token,
    )
    return answer


@torch.no_grad()
def answer_tokens_batch(
    model: Any,
    pixel_values: Tensor,
    tokens: Sequence[Tensor],
    max_new_tokens: int = 64,
    eos_token: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    on_token: OnToken | None = None,
) -> list[Tensor]:
    """Answers to several questions, each about its own image: pixel_values [questions, 3, side, side], tokens int64 [1, n] each,
    without padding, and generators for each. The rest is as in `answer_tokens`."""
    embed = model.language_model.model.embed_tokens
    if not isinstance(tokens, (list, tuple)):
        raise TypeError(f"tokens: expected a list, got {type(tokens).__name__}")
    check_pixels(pixel_values, len(tokens), model)
    check_count("max_new_tokens", max_new_tokens)
    check_eos(eos_token)
    check_callback("on_token", on_token)
    check_generators(generators, len(tokens), embed.weight.device)
    sampler = TokenSampler(temperature, top_k, top_p, generators)
    befores, afters = [], []
    for row, own in enumerate(tokens):
        check_tokens(f"tokens[{row}]" if len(tokens) > 1 else "tokens", own, 1, embed)
        before, after = around_image(model, own)
        befores.append(before)
        afters.append(after)
    images = [[each] for each in pixel_values.split(1)]
    handle = handle_of(model)
    if handle is not None:
        answers: list[Tensor] = handle.runner.answer_tokens(
            images, befores, afters, max_new_tokens, eos_token, sampler, on_token
        )
        return answers
    check_own(model, JanusFlow)
    own = adapter(model)
    dense = []
    for row, (image, before, after) in enumerate(zip(images, befores, afters, strict=True)):
        embeds = own.question([model.embed_image(image[0].to(embed.weight.dtype))], before, after).embeds
        dense.append(_decode(model, embeds, row, max_new_tokens, sampler, eos_token))
        for token in dense[-1].tolist() if on_token is not None else ():
            on_token(row, token)  # type: ignore[misc]
    return dense


def around_image(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A question's tokens int64 [1, n] before its image and after. Raises ValueError where there are none of either."""
    start, count = image_span(model, tokens)
    after = tokens[:, start + count :]
    if not after.shape[1]:
        raise ValueError("tokens: expected a question after the image, got none")
    return tokens[:, :start], after


def _decode(model: Any, embeds: Tensor, row: int, most: int, sampler: TokenSampler, eos_token: int | None) -> Tensor:
    """As transformers' `generate`: a prefill, then a token at a time over cached keys and values."""
    from transformers import DynamicCache

    llm = model.language_model.model
    # The argument has another name in later versions.
    name = "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"
    cache: dict[str, Any] = {name: DynamicCache()}
    words: list[Tensor] = []
    while len(words) < most and not (words and int(words[-1]) == eos_token):
        out = llm(inputs_embeds=embeds, use_cache=True, **cache)
        cache = {name: out.past_key_values}  # up to 4.38 another than the given one
        token = sampler(model.language_model.lm_head(out.last_hidden_state[:, -1]), [row])
        words.append(token[0, 0])
        embeds = llm.embed_tokens(token)
    return torch.stack(words) if words else torch.empty(0, dtype=torch.int64, device=embeds.device)
