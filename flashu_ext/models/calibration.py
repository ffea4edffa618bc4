"""What calibration runs for a sample: passes of the dense model, which a family's adapter makes (`Adapter.passes`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .masks import additive

__all__ = ["DensePass", "Noise", "Sample", "TokenSample", "check_answer_length", "masked", "noised", "text_passes"]

Noise = Callable[[float, Tensor], Tensor]
"""(time, latents) -> noise like them: always the same for a sample and a time."""


@dataclass(frozen=True)
class DensePass:
    """A run of the dense model, whose layers' activations are added to the sums of the sample's task.

    Its neurons are those of `Adapter.experts` where the sample is of a drawing and the model has such experts, and all of what
    they compute counts; else those of `Adapter.layers`.
    """

    run: Callable[[], object]
    """Calls the layers, once or several times, each on tokens [rows, n, hidden]."""
    counted: Tensor | None = None
    """bool [rows, n], of every call: the tokens that count; None: all. No output may depend on the others."""
    row: int = 0
    """Number of its time, of a drawing."""
    answer: int = 0
    """Of a question: answer tokens at the end. Layer importance is measured at the token before them."""


class Sample:
    """Of a task: a frozen dataclass of tensors, numbers, lists and dataclasses of them."""

    kind: ClassVar[str]
    """'generation' (a drawing) or 'understanding'."""
    family: ClassVar[str | None] = None
    """The adapters' that take it; None: any model."""

    def prompt(self) -> Sample:
        """Of a drawing, where the model draws with experts (`Adapter.experts`): a sample of all that they do not compute."""
        raise NotImplementedError


@dataclass(frozen=True)
class TokenSample(Sample):
    """A text, for a decoder of any kind.

    Attributes:
        tokens: int64 [1, n].
        answer_length: number of answer tokens at its end. Layer importance is measured at the token before the answer, the
            last one of a prompt.
    """

    kind: ClassVar[str] = "understanding"
    tokens: Tensor
    answer_length: int = 0

    def check(self) -> None:
        """Raise ValueError for tokens or a length that mean nothing."""
        tokens = self.tokens
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
            raise ValueError(f"tokens: expected int64 [1, n], n > 0, got {tokens.dtype} {list(tokens.shape)}")
        answer = self.answer_length
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < tokens.shape[1]:
            raise ValueError(f"answer_length: expected an integer in [0, {tokens.shape[1]}), got {answer!r}")


def text_passes(stack: Any, sample: TokenSample) -> Iterator[DensePass]:
    """Of a decoder of transformers, without its head. Raises ValueError for a sample that means nothing."""
    sample.check()
    yield DensePass(lambda: stack(input_ids=sample.tokens, use_cache=False), answer=sample.answer_length)


def masked(stack: Any, embeds: Tensor, allowed: Tensor) -> Callable[[], object]:
    """A run of a decoder of transformers on embeddings [rows, n, hidden]; allowed: who sees whom, bool [rows, n, n]."""
    mask = additive(allowed, embeds.dtype)[:, None]
    return lambda: stack(inputs_embeds=embeds, attention_mask=mask, use_cache=False)


def noised(latents: Tensor, t: float, noise: Noise) -> Tensor:
    """Latents at a time: 0 is noise, 1 the image."""
    return t * latents + (1 - t) * noise(t, latents)


def check_answer_length(value: Any, most: int) -> int:
    """Raise ValueError where `value` is no number of answer tokens, at most `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"answer_length: expected an integer in [0, {most}], got {value!r}")
    return value
