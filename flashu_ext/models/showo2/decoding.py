"""Continues a prompt as upstream does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..masks import additive

__all__ = ["decode_dense"]


def decode_dense(
    model: Any,
    embeds: Tensor,
    allowed: Tensor,
    max_new_tokens: int,
    pick: Callable[[Tensor, Sequence[int]], Tensor],
    eos_token: int | None,
) -> list[Tensor]:
    """Continue one prompt as upstream does: the whole sequence again for every token, no cache.

    Args:
        embeds: [1, length, hidden] in the model's dtype.
        allowed: bool [length, length], True where a row may attend to a column.
        pick: chooses a token from logits [1, vocab] of prompt 0.
        eos_token: ends the answer and is part of it.
    """
    llm = model.showo.model
    result: list[Tensor] = []
    for _ in range(max_new_tokens):
        mask = additive(allowed, embeds.dtype)[None, None]
        hidden = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        token = pick(model.showo.lm_head(hidden[:, -1]), [0])
        result.append(token[0, 0])
        if eos_token is not None and int(token) == eos_token:
            break
        embeds = torch.cat([embeds, llm.embed_tokens(token)], dim=1)
        allowed = torch.nn.functional.pad(allowed, (0, 1, 0, 1))
        allowed[-1] = torch.nn.functional.pad(allowed[-2, :-1], (0, 1), value=True)
    return result
