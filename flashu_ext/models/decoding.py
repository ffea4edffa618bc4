"""Chooses the next token of an answer from logits, greedily or by sampling. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_sampling

__all__ = ["OnToken", "TokenSampler"]

OnToken = Callable[[int, int], None]
"""Called with a question's index and its next token id."""


@dataclass(frozen=True)
class TokenSampler:
    """Chooses tokens as upstream does: temperature, then top-k, then top-p, then one draw.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, and ties with the k-th; None: all.
        top_p: keep a token if the more likely ones have a total probability of at most p; None: all.
        generators: one for each prompt, so that its draws do not depend on the others; None: torch's own.

    Raises:
        ValueError: a number is none that these can be.

    Source: Show-o2 `mmu_generate` (temperature, top_k) and `lm_generate` (top_p, which there indexes the wrong axis).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generators: Sequence[torch.Generator] | None = None

    def __post_init__(self) -> None:
        checked = check_sampling(self.temperature, self.top_k, self.top_p)
        for name, value in zip(("temperature", "top_k", "top_p"), checked, strict=True):
            object.__setattr__(self, name, value)

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocab] at this temperature (> 0), -inf for excluded tokens."""
        logits = self._divided(logits)
        if self.top_k is not None:
            least = torch.topk(logits, min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            # fp32: a sum over the vocabulary in bf16 stalls far below 1.
            total = torch.softmax(ordered.float(), dim=-1).cumsum(-1)
            beyond = (total > self.top_p).roll(1, dims=-1)
            beyond[:, 0] = False
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
        return logits

    def _divided(self, logits: Tensor) -> Tensor:
        """Logits by the temperature. Where a row's largest is then beyond the dtype, its distances from it: they have the same
        softmax."""
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)  # torch divides by a float
        largest = logits.amax(-1, keepdim=True)
        return (logits - torch.where((largest / temperature).isfinite(), 0, largest)) / temperature

    def __call__(self, logits: Tensor, prompts: Sequence[int]) -> Tensor:
        """Token ids int64 [rows, 1] from logits [rows, vocab] of the prompts with these indices."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        weights = torch.softmax(self.filtered(logits), dim=-1)
        if self.generators is None:
            return _draw(weights, None)
        drawn = [_draw(row, self.generators[prompt]) for row, prompt in zip(weights, prompts, strict=True)]
        return torch.stack(drawn)


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index for each row of weights [..., n] -> int64 [..., 1]: the same draws from the same generator as
    `torch.multinomial`, without its check of the weights, which would make the host wait for a GPU."""
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1, keepdim=True)
