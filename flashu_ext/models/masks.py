"""Attention masks, bool and additive. Torch only: the runtime uses them on upstream models too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["additive", "causal", "omni_allowed", "seen_slots", "sequence_allowed"]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask of any shape as a term added to attention scores: 0 where True, the dtype's lowest number elsewhere.

    Not -inf, which would make a fully masked row NaN, and NaN spreads. With the lowest number, as in upstream's masks, such a
    row is an average that is never used. All other rows get the same bits either way: the exponential is 0.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def causal(length: int, device: torch.device) -> Tensor:
    """Bool [length, length]: a token attends to itself and to earlier ones."""
    position = torch.arange(length, device=device)
    return position[:, None] >= position


def omni_allowed(spans: Tensor, length: int) -> Tensor:
    """Show-o2's omni attention: bool [rows, length, length], True where a query may attend.

    Causal, but bidirectional within every span (offset, length) of `spans` [rows, spans, 2].
    """
    position = torch.arange(length, device=spans.device)
    start = spans[..., :1]
    end = start + spans[..., 1:]
    inside = (position >= start) & (position < end)
    # What a token may attend to ends with itself, or with a span that it is in: no [rows, spans, length, length] is needed.
    ends = torch.where(inside, end, position + 1).amax(dim=1)
    return position < ends[..., None]


def sequence_allowed(spans: Tensor, seen: Tensor, length: int, image_causal: bool) -> Tensor:
    """Bool [rows, length, length] of sequences with one image span (offset, length) of `spans` [rows, 1, 2] each: seen whole, or
    token by token where image_causal. Of the tokens before it a row's first `seen` [rows] are seen."""
    allowed = causal(length, spans.device)[None] if image_causal else omni_allowed(spans, length)
    position = torch.arange(length, device=spans.device)
    hidden = (position >= seen[:, None]) & (position < spans[:, 0, :1])
    return allowed & ~hidden[:, None]


def seen_slots(seen: Tensor, slots: int) -> Tensor:
    """Bool [rows, 1, 1, slots]: row i attends to its first seen[i] slots."""
    return (torch.arange(slots, device=seen.device) < seen[:, None])[:, None, None]
