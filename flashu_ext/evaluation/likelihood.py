"""Likelihoods of given answers, token by token, on a dense or an accelerated model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.accelerated import handle_of
from ..models.showo2 import Showo2
from ..models.showo2.decoding import decode_dense
from ..models.showo2.understanding import prompt_embeds

__all__ = ["Likelihood", "answer_likelihood"]


@dataclass(frozen=True)
class Likelihood:
    """Of an answer: the sum of its tokens' log-probabilities, how many they are, and whether each is the most likely one."""

    logprob: float
    tokens: int
    greedy: bool


class _Forced:
    """Chooses the given tokens, and adds up what the model thought of them."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = tokens
        self.logprobs: list[Tensor] = []
        self.greedy: list[Tensor] = []

    def __call__(self, logits: Tensor, prompts: Sequence[int]) -> Tensor:
        token = self.tokens[len(self.logprobs)]
        self.logprobs.append(torch.log_softmax(logits[0].float(), dim=-1)[token])
        self.greedy.append(logits[0].argmax() == token)
        return torch.full((1, 1), token, dtype=torch.int64, device=logits.device)


@torch.no_grad()
def answer_likelihood(pipe: Any, images: Any, question: str, answer: str) -> Likelihood:
    """How likely a pipeline finds an answer to a question about one or more images, without its end token.

    Args:
        pipe: of any family if its model is accelerated, of Show-o2 if it is dense.
        images: PIL image, or a list of them.

    Raises:
        TypeError, ValueError: an argument is wrong, the answer has no tokens, or the model is dense and of another family.
    """
    handle = handle_of(pipe.model)
    if handle is None and not isinstance(pipe.model, Showo2):
        raise TypeError(
            "pipe: expected an accelerated model, as by the preset exact, where the family is not Show-o2, got a dense "
            f"{type(pipe.model).__name__}"
        )
    latents, before, after = pipe.question_inputs(images, question)
    tokens = pipe.layout.encode(answer)
    if not tokens:
        raise ValueError(f"answer: expected at least one token, got {answer!r:.80}")
    forced = _Forced(tokens)
    if handle is not None:
        handle.runner.answer_tokens([latents], [before], [after], len(tokens), None, forced)
    else:
        decode_dense(pipe.model, *prompt_embeds(pipe.model, latents, before, after), len(tokens), forced, None)
    logprob, greedy = torch.stack(forced.logprobs).sum(), torch.stack(forced.greedy).all()
    return Likelihood(float(logprob), len(tokens), bool(greedy))
