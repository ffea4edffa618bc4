"""Answers to questions about images, greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..accelerated import handle_of
from ..checks import check_count, check_own
from ..decoding import TokenSampler
from .layers import Experts
from .model import Bagel, Image, Text, TokenIds
from .sampling import check_inputs

__all__ = ["answer_tokens"]


@torch.no_grad()
def answer_tokens(
    model: Any,
    inputs: Sequence[Text | Image],
    token_ids: TokenIds | Mapping[str, int],
    max_new_tokens: int = 64,
    stop: bool = True,
    return_logits: bool = False,
) -> Any:
    """Answer to texts and images in order; the question is the last text.

    Args:
        model: a Bagel.
        inputs: see `sample`; an image is read by the image encoder (`vit_tokens`), and an accelerated model takes no latents.
        token_ids: of the markers.
        max_new_tokens: upper bound.
        stop: end after the marker of a text's end, which is part of the result.
        return_logits: also return every word's logits.

    Returns:
        int64 [at most max_new_tokens], or (tokens, logits [words, vocab]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    """
    ids = check_inputs(model, inputs, token_ids)
    check_count("max_new_tokens", max_new_tokens)
    if (handle := handle_of(model)) is not None:
        return _answered(model, handle, inputs, ids, max_new_tokens, stop, return_logits)
    check_own(model, Bagel)
    run, device = model.language_model.model, model.vae2llm.weight.device
    context = model.context(inputs, ids)
    token = torch.tensor([ids.bos_token_id], device=device)
    words: list[Tensor] = []
    logits = []
    while len(words) < max_new_tokens and not (stop and words and int(words[-1]) == ids.eos_token_id):
        hidden, context = run(run.embed_tokens(token), Experts(), context, causal=True, step=1)
        logits.append(model.language_model.lm_head(run.norm(hidden))[0])
        token = logits[-1].argmax()[None]
        words.append(token[0])
    answer = torch.stack(words) if words else torch.empty(0, dtype=torch.int64, device=device)
    return (answer, _rows(logits, model)) if return_logits else answer


def _rows(logits: Sequence[Tensor], model: Any) -> Tensor:
    """Of every word [vocab] -> [words, vocab]."""
    table = model.language_model.model.embed_tokens.weight
    return torch.stack(list(logits)) if logits else table.new_empty(0, len(table))


def _answered(
    model: Any,
    handle: Any,
    inputs: Sequence[Text | Image],
    ids: TokenIds,
    most: int,
    stop: bool,
    return_logits: bool,
) -> Any:
    """`answer_tokens` of an accelerated model."""
    from .adapter import with_places

    for index, item in enumerate(inputs):
        if isinstance(item, Image) and item.latents is not None:
            raise ValueError(
                f"inputs[{index}].latents: expected None, an accelerated model's answers read images by vit_tokens, got latents"
            )
    greedy, logits = TokenSampler(), []

    def told(rows: Tensor, prompts: Sequence[int]) -> Tensor:
        logits.append(rows[0].clone())
        return greedy(rows, prompts)

    images = [with_places(item) for item in inputs if isinstance(item, Image)]
    end = ids.eos_token_id if stop else None
    (answer,) = handle.runner.answer_tokens([images], [inputs], [ids], most, end, told if return_logits else greedy)
    return (answer, _rows(logits[: len(answer)], model)) if return_logits else answer
