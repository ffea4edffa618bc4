"""Answers about images and texts, from a dense or an accelerated model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..accelerated import handle_of
from ..checks import check_callback, check_count, check_generator, check_generators, check_own
from ..decoding import OnToken, TokenSampler
from .layers import Experts
from .model import Bagel, Image, Text, TokenIds
from .sampling import check_inputs

__all__ = ["answer_tokens", "answer_tokens_batch", "read_images"]

Items = Sequence[Text | Image]


@torch.no_grad()
def answer_tokens(
    model: Any,
    inputs: Items,
    token_ids: TokenIds | Mapping[str, int],
    max_new_tokens: int = 64,
    stop: bool = True,
    return_logits: bool = False,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    on_token: OnToken | None = None,
) -> Any:
    """Answer to texts and images in order, greedy unless a temperature is given; the question is the last text.

    Args:
        model: a Bagel.
        inputs: see `sample`; an image is read by the image encoder (`vit_tokens`), and an accelerated model takes no latents.
        token_ids: of the markers.
        max_new_tokens: upper bound.
        stop: end after the marker of a text's end, which is part of the result.
        return_logits: also return every word's logits.
        temperature, top_k, top_p, generator: as in `flashu_ext.showo2.answer_tokens`.
        on_token: called with 0 and each token id as it comes.

    Returns:
        int64 [at most max_new_tokens], or (tokens, logits [words, vocab]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    """
    ids = check_inputs(model, inputs, token_ids)
    if generator is not None:
        check_generator("generator", generator, model.vae2llm.weight.device)
    sampler = TokenSampler(temperature, top_k, top_p, None if generator is None else [generator])
    logits: list[Tensor] = []

    def told(rows: Tensor, prompts: Sequence[int]) -> Tensor:
        logits.append(rows[0].clone())
        return sampler(rows, prompts)

    pick = told if return_logits else sampler
    (answer,) = _answers(model, [inputs], ids, max_new_tokens, stop, sampler, pick, on_token)
    return (answer, _rows(logits[: len(answer)], model)) if return_logits else answer


@torch.no_grad()
def answer_tokens_batch(
    model: Any,
    inputs: Sequence[Items],
    token_ids: TokenIds | Mapping[str, int],
    max_new_tokens: int = 64,
    stop: bool = True,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    on_token: OnToken | None = None,
) -> list[Tensor]:
    """Answers to several sequences of texts and images, each as that of `answer_tokens` alone. An accelerated model computes them
    as one batch.

    Args:
        generators: one for each sequence; None: torch's own.
        on_token: called with a sequence's index and its next token id.
        The rest is as in `answer_tokens`.
    """
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"inputs: expected a list of sequences, got {type(inputs).__name__}")
    ids: Any = token_ids
    for each in inputs:
        ids = check_inputs(model, each, token_ids)
    check_generators(generators, len(inputs), model.vae2llm.weight.device)
    sampler = TokenSampler(temperature, top_k, top_p, generators)
    return _answers(model, inputs, ids, max_new_tokens, stop, sampler, sampler, on_token)


def _answers(
    model: Any,
    sequences: Sequence[Items],
    ids: TokenIds,
    most: int,
    stop: bool,
    sampler: TokenSampler,
    pick: Any,
    on_token: OnToken | None,
) -> list[Tensor]:
    """pick: the sampler, or a function that calls it."""
    check_count("max_new_tokens", most)
    check_callback("on_token", on_token)
    handle = handle_of(model)
    if handle is None:
        check_own(model, Bagel)
        return [_dense(model, each, row, ids, most, stop, pick, on_token) for row, each in enumerate(sequences)]
    images = [read_images(each) for each in sequences]
    end = ids.eos_token_id if stop else None
    answers: list[Tensor] = handle.runner.answer_tokens(
        images, sequences, [ids] * len(sequences), most, end, pick, on_token
    )
    return answers


def _dense(
    model: Any, inputs: Items, row: int, ids: TokenIds, most: int, stop: bool, pick: Any, on_token: OnToken | None
) -> Tensor:
    run, device = model.language_model.model, model.vae2llm.weight.device
    context = model.context(inputs, ids)
    token = torch.tensor([ids.bos_token_id], device=device)
    words: list[Tensor] = []
    while len(words) < most and not (stop and words and int(words[-1]) == ids.eos_token_id):
        hidden, context = run(run.embed_tokens(token), Experts(), context, causal=True, step=1)
        token = pick(model.language_model.lm_head(run.norm(hidden)), [row])[0]
        words.append(token[0])
        if on_token is not None:
            on_token(row, int(token))
    return torch.stack(words) if words else torch.empty(0, dtype=torch.int64, device=device)


def read_images(inputs: Items) -> list[Tensor]:
    """The images of a sequence as an accelerated model reads them."""
    from .adapter import with_places

    for index, item in enumerate(inputs):
        if isinstance(item, Image) and item.latents is not None:
            raise ValueError(
                f"inputs[{index}].latents: expected None, an accelerated model's answers read images by vit_tokens, got latents"
            )
    return [with_places(item) for item in inputs if isinstance(item, Image)]


def _rows(logits: Sequence[Tensor], model: Any) -> Tensor:
    """Of every word [vocab] -> [words, vocab]."""
    table = model.language_model.model.embed_tokens.weight
    return torch.stack(list(logits)) if logits else table.new_empty(0, len(table))
