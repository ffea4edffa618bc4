"""Room: runtime. What is true of one running image: its geometry, caches, step and the sets in force. Owned by a runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..modules.attention import KeyValue, RowGeometry, SpanPass
from ..schedule import StepPlan

__all__ = ["ImageState", "PrefixCache", "Variant"]

Variant = tuple[str | None, tuple[int, ...]]
"""A network variant: the task whose neuron set is in force (None: all neurons) and the layers skipped."""

Rope = tuple[Tensor, Tensor]


@dataclass
class PrefixCache:
    """Keys and values of the text before the image, for one network variant; right-aligned, None for skipped layers."""

    llm: list[KeyValue | None]
    head: list[KeyValue | None]

    def nbytes(self) -> int:
        return sum(pair[0].nbytes + pair[1].nbytes for pair in (*self.llm, *self.head) if pair is not None)


@dataclass
class ImageState:
    """One image (or batch of images) being drawn.

    Attributes:
        text_tokens: [rows, length]; rows are the conditional ones, then, under guidance, the unconditional ones.
        modality_positions: [rows, 1, 2], (offset, length) of the image span.
        guided: rows come in two halves that share one latent.
        step: evaluations done. last_time: t of the last one.
        skipped: the layers chosen by the last measurement, or None before the first.
        head_state: finite differences of the head's kept states [order + 1, rows, span, width], or None.
        kept_at: steps at which a head state was kept.
    """

    plan: StepPlan
    text_tokens: Tensor
    modality_positions: Tensor
    geometry: RowGeometry
    guided: bool
    llm_pass: SpanPass
    head_pass: SpanPass
    llm_rope: Rope
    head_rope: Rope
    positions: Tensor
    grid: tuple[int, int]
    step: int = 0
    last_time: float = float("-inf")
    skipped: tuple[int, ...] | None = None
    head_state: Tensor | None = None
    kept_at: list[int] = field(default_factory=list)
    prefixes: dict[Variant, PrefixCache] = field(default_factory=dict)
    choices: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.geometry.prefix)

    @property
    def images(self) -> int:
        return self.rows // 2 if self.guided else self.rows

    def matches(self, text_tokens: Tensor, modality_positions: Tensor, guided: bool, grid: tuple[int, int]) -> bool:
        """Whether a call with this conditioning goes on with this image."""
        return (
            self.guided == guided
            and self.grid == grid
            and _same(self.text_tokens, text_tokens)
            and _same(self.modality_positions, modality_positions)
        )

    def release(self) -> None:
        """Drop the caches of a finished image; what a summary reads stays."""
        self.llm_pass.buffers.clear()
        self.head_pass.buffers.clear()
        self.prefixes.clear()
        self.head_state = None

    def nbytes(self) -> int:
        """Bytes of all caches of this image."""
        total = self.llm_pass.nbytes() + self.head_pass.nbytes() + sum(p.nbytes() for p in self.prefixes.values())
        return total + (self.head_state.nbytes if self.head_state is not None else 0)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
