"""Room: runtime. Answers questions: one prefill, then a decode over cached keys and values; images are read once.

What a new call shares with the last one, token for token, is not computed again: a further question about an image
starts behind the image. Sharing stops at a position that nothing before it looks past, so the bidirectional image span
is reused whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernel_sets import KernelSet
from ..modules.attention import attend
from ..modules.decoder_layer import decoder_layer
from ..showo2.understanding import span_embeds
from ..structure import Showo2Parts, norm_eps, position_table
from .encoder import embed_image

__all__ = ["TASK", "UnderstandingEngine"]

TASK = "understanding"

Pick = Callable[[Tensor], Tensor]
"""Logits [1, vocab] -> token id [1, 1]."""


@dataclass
class _Sequence:
    """Keys and values of a prompt and its answer so far. `embeds` and `allowed` describe the prompt part."""

    keys: list[Tensor]
    values: list[Tensor]
    embeds: Tensor
    allowed: Tensor

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.embeds, self.allowed))


class _CachedPass:
    """Appends each layer's keys and values at `start` and attends to everything up to there."""

    def __init__(self, sequence: _Sequence, start: int, mask: Tensor | None):
        """mask: additive [1, 1, n, start + n], or None: all of it is visible."""
        self.sequence = sequence
        self.start = start
        self.mask = mask

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        end = self.start + query.shape[1]
        keys, values = self.sequence.keys[layer], self.sequence.values[layer]
        keys[:, :, self.start : end] = key.transpose(1, 2)
        values[:, :, self.start : end] = value.transpose(1, 2)
        return attend(query, keys[:, :, :end], values[:, :, :end], self.mask)


class UnderstandingEngine:
    """Decodes answers for one prompt at a time and keeps the last prompt's cache for the next question."""

    def __init__(self, parts: Showo2Parts, kernels: KernelSet):
        self.parts = parts
        self.kernels = kernels
        self.prefilled = 0
        self.reused = 0
        self._sequence: _Sequence | None = None
        self._image: tuple[Tensor, Tensor] | None = None

    def reset(self) -> None:
        """Forget the last prompt and image."""
        self._sequence = None
        self._image = None

    def nbytes(self) -> int:
        """Bytes of the caches kept for the next question."""
        image = sum(tensor.nbytes for tensor in self._image) if self._image else 0
        return image + (self._sequence.nbytes() if self._sequence else 0)

    # ---- inputs

    def image_embeds(self, latents: Tensor) -> Tensor:
        """[1, channels, H, W] -> [1, patches, hidden]; an unchanged image is not encoded again."""
        if self._image is not None and self._image[0].shape == latents.shape and torch.equal(self._image[0], latents):
            return self._image[1]
        patch = self.parts.patch_size
        positions = position_table(self.parts, latents.shape[2] // patch, latents.shape[3] // patch)
        embeds = embed_image(self.parts, latents, positions)
        self._image = (latents.clone(), embeds)
        return embeds

    def prompt(self, latents: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [1, length, hidden] and visibility (bool [length, length]) of a question about an image.

        Args:
            before: int64 [1, n]. after: int64 [1, m], boi first, eoi second.
        """
        return span_embeds(self.parts, self.image_embeds(latents), before, after)

    # ---- decoding

    def decode(
        self, embeds: Tensor, allowed: Tensor, max_new_tokens: int, pick: Pick, eos_token: int | None
    ) -> list[Tensor]:
        """Continue a prompt.

        Args:
            embeds: [1, length, hidden]. allowed: bool [length, length], True where a row may look.
            pick: chooses a token from logits. eos_token: stops after this token, which is part of the result.

        Returns:
            Token ids, 0-d int64 tensors, at most `max_new_tokens`.
        """
        if max_new_tokens == 0:
            return []
        length = embeds.shape[1]
        shared = self._shared(embeds, allowed)
        sequence = self._sequence_for(embeds, allowed, shared, length + max_new_tokens - 1)
        mask = _additive(allowed[shared:], embeds.dtype)
        hidden = self._forward(embeds[:, shared:], _CachedPass(sequence, shared, mask), shared)
        self.prefilled += length - shared
        self.reused += shared
        # A new token sees what the prompt's last token sees, and every new token.
        last = allowed[-1:]
        every = bool(last.all())
        result: list[Tensor] = []
        for count in range(max_new_tokens):
            token = pick(self.parts.lm_head(hidden[:, -1]))
            result.append(token[0, 0])
            if len(result) == max_new_tokens or (eos_token is not None and int(token) == eos_token):
                break
            position = length + count
            row = None
            if not every:
                row = _additive(torch.cat([last, last.new_ones(1, count + 1)], dim=1), embeds.dtype)
            x = self.parts.embed_tokens(token).to(embeds.dtype)
            hidden = self._forward(x, _CachedPass(sequence, position, row), position)
        self._sequence = sequence
        return result

    def _forward(self, x: Tensor, attention: _CachedPass, start: int) -> Tensor:
        parts, kernels = self.parts, self.kernels
        position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
        cos, sin = parts.llm_rope(x, position_ids)
        rope = (cos[:, :, None], sin[:, :, None])
        x = x.clone(memory_format=torch.contiguous_format)  # layers write into their input; this one is the caller's
        for index, layer in enumerate(parts.layers):
            x = decoder_layer(layer, index, x, rope, attention, parts.llm_attention, kernels, TASK)
        return kernels.rms_norm(x[:, -1:].contiguous(), parts.final_norm.weight, norm_eps(parts.final_norm))

    def _shared(self, embeds: Tensor, allowed: Tensor) -> int:
        """How many leading tokens the cached prompt has in common with this one and can lend."""
        cached = self._sequence
        if cached is None or cached.embeds.dtype != embeds.dtype or cached.embeds.device != embeds.device:
            return 0
        limit = min(cached.embeds.shape[1], embeds.shape[1] - 1)
        same = (cached.embeds[0, :limit] == embeds[0, :limit]).all(dim=-1)
        same &= (cached.allowed[:limit, :limit] == allowed[:limit, :limit]).all(dim=-1)
        limit = int(same.long().cumprod(0).sum())
        if limit == 0:
            return 0
        # Closed positions: nothing before them looks at them or past them, in either prompt.
        reach = torch.maximum(_reach(cached.allowed[:limit]), _reach(allowed[:limit])).cummax(0).values
        closed = torch.nonzero(reach < torch.arange(1, limit + 1, device=embeds.device)).flatten()
        return int(closed[-1]) + 1 if closed.numel() else 0

    def _sequence_for(self, embeds: Tensor, allowed: Tensor, shared: int, capacity: int) -> _Sequence:
        shape = self.parts.llm_attention
        old = self._sequence
        self._sequence = None  # a failure below must not leave a half-written cache behind
        if old is not None and old.capacity >= capacity and old.keys[0].dtype == embeds.dtype:
            keys, values = old.keys, old.values
        else:
            size = (1, shape.kv_heads, capacity, shape.head_dim)
            keys = [embeds.new_zeros(size) for _ in self.parts.layers]
            values = [embeds.new_zeros(size) for _ in self.parts.layers]
            if old is not None and shared:
                for new, kept in zip((*keys, *values), (*old.keys, *old.values), strict=True):
                    new[:, :, :shared] = kept[:, :, :shared]
        return _Sequence(keys, values, embeds.clone(), allowed.clone())


def _reach(allowed: Tensor) -> Tensor:
    """The last position each row of `allowed` (bool [n, m]) looks at; -1 for none."""
    position = torch.arange(1, allowed.shape[1] + 1, device=allowed.device)
    return (allowed * position).amax(dim=1) - 1


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [n, m] -> additive [1, 1, n, m]."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf"))[None, None]
