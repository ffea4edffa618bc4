"""Room: runtime. What is true of one running image: its geometry, caches, step and the sets in force. Owned by a runner."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..modules.attention import KeyValue, Rope, RowGeometry, SpanPass
from ..schedule import Step, StepPlan
from .head_cache import AdaptiveGate, HeadCache
from .token_router import TokenRouter

__all__ = ["ImageState", "PrefixCache", "Rows", "Variant"]

Variant = tuple[str | None, tuple[int, ...]]
"""A network variant: the task whose neuron set is in force (None: all neurons) and the layers skipped."""


@dataclass
class PrefixCache:
    """Keys and values of the text before the image, for one network variant; right-aligned, None for skipped layers.

    Attributes:
        geometry: of the rows it was computed for.
        llm, head: of the language model's layers, and of the head's blocks; the latter None until a head runs.
        hidden: the text's final hidden states [rows, prefix, hidden], until `head` is made from them.
    """

    geometry: RowGeometry
    llm: list[KeyValue | None]
    head: list[KeyValue | None] | None
    hidden: Tensor | None

    def nbytes(self) -> int:
        pairs = [pair for pair in (*self.llm, *(self.head or ())) if pair is not None]
        return sum(keys.nbytes + values.nbytes for keys, values in pairs) + (
            self.hidden.nbytes if self.hidden is not None else 0
        )


@dataclass
class Rows:
    """The rows that an evaluation runs: all of an image's, or those of the conditional branch, which share their buffers.

    Attributes:
        text_tokens: [rows, length].
        llm_rope, head_rope: cos and sin of the span's positions.
    """

    text_tokens: Tensor
    geometry: RowGeometry
    llm_pass: SpanPass
    head_pass: SpanPass
    llm_rope: Rope
    head_rope: Rope

    @property
    def count(self) -> int:
        return len(self.geometry.prefix)

    def first(self, rows: int) -> Rows:
        """The first `rows` of these rows."""
        llm_pass = self.llm_pass.first(rows)
        return Rows(
            text_tokens=self.text_tokens[:rows],
            geometry=llm_pass.geometry,
            llm_pass=llm_pass,
            head_pass=self.head_pass.first(rows),
            llm_rope=(self.llm_rope[0][:rows], self.llm_rope[1][:rows]),
            head_rope=(self.head_rope[0][:rows], self.head_rope[1][:rows]),
        )


@dataclass
class ImageState:
    """One image (or batch of images) being drawn.

    Attributes:
        all_rows: the conditional rows, then, under guidance, the unconditional ones.
        conditional: the rows of a step that runs one branch.
        modality_positions: [rows, 1, 2], (offset, length) of the image span.
        guided: rows come in two halves that share one latent.
        planned_scale: the caller's guidance scale, where the plan depends on it.
        step: evaluations done. last_time: t of the last one.
        skipped: the layers chosen by the last measurement, or None before the first.
        semantic: the encoder's features [images or rows, patches, clip] kept for later steps, or None.
        encode_due: a step that should have run the encoder was cached instead.
        ran: what was run, step by step: the plan's steps with everything decided.
        routed: tokens of the span times layers of the language model, 'computed' and 'carried' past a layer.
    """

    plan: StepPlan
    all_rows: Rows
    conditional: Rows
    modality_positions: Tensor
    guided: bool
    planned_scale: float | None
    positions: Tensor
    grid: tuple[int, int]
    cache: HeadCache
    gate: AdaptiveGate
    router: TokenRouter
    step: int = 0
    last_time: float = float("-inf")
    skipped: tuple[int, ...] | None = None
    semantic: Tensor | None = None
    encode_due: bool = False
    prefixes: dict[tuple[Variant, int], PrefixCache] = field(default_factory=dict)
    choices: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    ran: list[Step] = field(default_factory=list)
    routed: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        return self.conditional.count

    @property
    def kinds(self) -> list[str]:
        return [step.kind for step in self.ran]

    def rows(self, step: Step) -> Rows:
        """The rows that a step runs."""
        return self.all_rows if step.guided else self.conditional

    def matches(
        self,
        text_tokens: Tensor,
        modality_positions: Tensor,
        guided: bool,
        grid: tuple[int, int],
        planned_scale: float | None,
    ) -> bool:
        """Whether a call with this conditioning goes on with this image."""
        return (
            self.guided == guided
            and self.grid == grid
            and self.planned_scale == planned_scale
            and _same(self.all_rows.text_tokens, text_tokens)
            and _same(self.modality_positions, modality_positions)
        )

    def release(self) -> None:
        """Drop the caches of a finished image; what a summary reads stays."""
        for rows in (self.all_rows, self.conditional):
            rows.llm_pass.buffers.clear()
            rows.head_pass.buffers.clear()
        self.prefixes.clear()
        self.semantic = None
        for kept in (self.cache, self.gate, self.router):
            kept.release()

    def nbytes(self) -> int:
        """Bytes of all caches of this image."""
        passes = self.all_rows.llm_pass.nbytes() + self.all_rows.head_pass.nbytes()
        kept = sum(kept.nbytes() for kept in (self.cache, self.gate, self.router))
        semantic = self.semantic.nbytes if self.semantic is not None else 0
        return passes + kept + semantic + sum(prefix.nbytes() for prefix in self.prefixes.values())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
