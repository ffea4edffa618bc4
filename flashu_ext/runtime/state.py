"""What is true of one running image: its plan, step and the sets in force. Owned by a runner."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..planning.schedule import Step, StepPlan
from .graphs import Pieces, Readback
from .modules.attention import RowGeometry
from .workspace import Workspace

__all__ = ["Conditioning", "ImageState", "StepWork", "Variant"]

Variant = tuple[str | None, tuple[int, ...]]
"""A network variant: the task whose neuron set is in force (None: all neurons) and the layers skipped."""

KEPT_PREFIXES = 3
"""Prefixes that an image keeps aside: of the pruned network before and after a measurement, and of the whole one."""


@dataclass(frozen=True)
class StepWork:
    """What one evaluation asked of the device. waits: the times that the host waited for an answer."""

    kind: str
    launches: int
    syncs: int
    waits: int


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The arguments of a call through upstream's interface that do not change within an image, as objects: equal ones are the
    very same tensors, not written to since, so nothing has to be read to know it."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    numbers: tuple[Any, ...]

    @classmethod
    def of(
        cls, latents: Any, t: Any, text_tokens: Any, modality_positions: Any, attention_mask: Any, guidance_scale: float
    ) -> Conditioning | None:
        """None where writing to a tensor leaves no trace (made under `torch.inference_mode`), or one is missing."""
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        tensors = (text_tokens, modality_positions, mask)
        given = [tensor for tensor in tensors if tensor is not None]
        needed = (latents, t, text_tokens, modality_positions)
        if not all(isinstance(tensor, Tensor) for tensor in needed) or any(tensor.is_inference() for tensor in given):
            return None
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (latents, t)]
        return cls(tensors, tuple(tensor._version for tensor in given), (*shapes, guidance_scale, mask is None))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Conditioning)
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
            and self.versions == other.versions
            and self.numbers == other.numbers
        )


@dataclass
class ImageState:
    """One image (or batch of images) being drawn.

    Attributes:
        workspace: its memory, which it holds until `release`. pieces: what runs there.
        modality_positions: [rows, 1, 2], (offset, length) of the image span.
        guided: rows come in two halves that share one latent.
        planned_scale: the caller's guidance scale, where the plan depends on it.
        length: of the rows of text tokens. carried: tokens of a row carried past a layer where tokens are routed.
        conditioning: of the last call through upstream's interface.
        step: evaluations done. last_time: t of the last one.
        skipped: the layers chosen by the last measurement, or None before the first.
        measured: the step whose measurement is on its way to the host, or None. importance: that measurement of the layers.
        flag: the adaptive cache's answer.
        semantic_rows: latents whose encoder features are kept for later steps.
        encode_due: a step that should have run the encoder was cached instead.
        prefixes: by variant and rows the prefixes kept aside, of the language model and of the head.
        ran: what was run, step by step: the plan's steps with everything decided. work: what that asked of the device.
        routed: tokens of the span times layers of the language model, 'computed' and 'carried' past a layer.
    """

    plan: StepPlan
    workspace: Workspace
    pieces: Pieces
    geometry: RowGeometry
    modality_positions: Tensor
    guided: bool
    planned_scale: float | None
    length: int
    carried: int
    conditioning: Conditioning | None = None
    step: int = 0
    last_time: float = float("-inf")
    skipped: tuple[int, ...] | None = None
    measured: int | None = None
    importance: Readback = field(default_factory=Readback)
    flag: Readback = field(default_factory=Readback)
    semantic_rows: int = 0
    encode_due: bool = False
    prefixes: OrderedDict[tuple[Variant, int], tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)
    choices: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    ran: list[Step] = field(default_factory=list)
    work: list[StepWork] = field(default_factory=list)
    routed: Counter[str] = field(default_factory=Counter)
    held_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.geometry.prefix) // 2 if self.guided else len(self.geometry.prefix)

    @property
    def waits(self) -> int:
        """Times that the host waited for an answer."""
        return self.importance.waits + self.flag.waits

    @property
    def kinds(self) -> list[str]:
        return [step.kind for step in self.ran]

    def rows(self, step: Step) -> int:
        """How many rows a step runs: all, or those of the conditional branch."""
        return len(self.geometry.prefix) if step.guided else self.images

    def keep_prefix(self, variant: Variant, rows: int) -> None:
        """Keep the prefix that the workspace holds, for when another variant has taken its place."""
        llm, head = self.workspace.prefix(rows)
        self.prefixes[variant, rows] = (llm.clone(), head.clone())
        while len(self.prefixes) > KEPT_PREFIXES:
            self.prefixes.popitem(last=False)

    def load_prefix(self, variant: Variant, rows: int) -> bool:
        """Put a prefix kept aside in place; False where there is none. One of more rows serves too."""
        for kept in (len(self.geometry.prefix), rows):
            if (variant, kept) in self.prefixes:
                for mine, theirs in zip(self.workspace.prefix(kept), self.prefixes[variant, kept], strict=True):
                    mine.copy_(theirs)
                self.workspace.owner = (variant, kept)
                self.prefixes.move_to_end((variant, kept))
                return True
        return False

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
            and self.workspace.grid == grid
            and self.planned_scale == planned_scale
            and _same(self.workspace.text_tokens, text_tokens)
            and _same(self.modality_positions, modality_positions)
        )

    def let_go(self) -> None:
        """Let go of everything but what a summary reads."""
        self.held_bytes = self.nbytes()
        self.prefixes.clear()
        self.conditioning = None
        del self.workspace, self.pieces

    @property
    def ended(self) -> bool:
        return bool(self.held_bytes)

    def nbytes(self) -> dict[str, int]:
        """Bytes of all that this image holds, by purpose."""
        aside = sum(llm.nbytes + head.nbytes for llm, head in self.prefixes.values())
        held = self.workspace.nbytes()
        return held | ({"prefixes kept aside": aside} if aside else {})


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
