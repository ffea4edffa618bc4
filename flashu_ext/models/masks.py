"""Which tokens may look at which, as bool and as additive masks. Torch only: the runtime uses it on upstream models too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["additive", "causal", "omni_allowed", "slot_mask"]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask of any shape as what is added to attention scores: 0 where True, the dtype's lowest number elsewhere.

    The lowest number, as upstream's masks have it, and not -inf: a row that may look at nothing then averages what it must
    not see, which nobody reads, where -inf would make it NaN, which spreads. Everywhere else the two give the same bits,
    since the exponential of either is 0.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def causal(length: int, device: torch.device) -> Tensor:
    """Bool [length, length]: a token looks at itself and at what is before it."""
    position = torch.arange(length, device=device)
    return position[:, None] >= position


def omni_allowed(spans: Tensor, length: int) -> Tensor:
    """Visibility under Show-o2's omni attention: bool [rows, length, length], True where a row's query may look.

    Causal, except that every span (offset, length) of `spans` [rows, spans, 2] sees itself whole.
    """
    position = torch.arange(length, device=spans.device)
    start = spans[..., :1]
    inside = (position >= start) & (position < start + spans[..., 1:])
    return causal(length, spans.device) | (inside[..., :, None] & inside[..., None, :]).any(dim=1)


def slot_mask(seen: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Additive [rows, 1, 1, slots]: row i looks at its first seen[i] slots."""
    return additive((torch.arange(slots, device=seen.device) < seen[:, None])[:, None, None], dtype)
