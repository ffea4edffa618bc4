"""The diffusion head of a denoising step: its blocks on the image span, or a prediction of their output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..models.checks import made_by
from .image_memory import ImageMemory, joined, joined_early, joined_rope
from .modules.attention import SegmentPass, span_pass
from .modules.head_block import head_block
from .network import Network
from .work import HeadWork

__all__ = ["Head"]


class Head:
    """Runs the diffusion head on an `ImageMemory`: device work only, which depends on nothing but the memory and the work."""

    def __init__(self, network: Network):
        self.network = network.at("generation", "head")
        self.parts = self.network.parts
        self.kernels = self.network.kernels

    def prefix(self, memory: ImageMemory, rows: int, hidden: Tensor) -> None:
        """The prompt's final hidden states [rows, tokens, hidden], consumed -> its keys and values, in memory."""
        if not self.network.blocks:
            return
        tokens = hidden.shape[1]
        attention = SegmentPass(memory.prefix(rows)[1], self.kernels, tokens)
        rope = (memory.head_text_rope[0][:, :tokens], memory.head_text_rope[1][:, :tokens])
        x = self.parts.head_input(hidden)
        for index, block in enumerate(self.network.blocks):
            x = head_block(block, index, x, None, rope, attention, self.parts.head_attention, self.kernels)

    def run(self, memories: Sequence[ImageMemory], works: Sequence[HeadWork]) -> None:
        """The language model's output in each memory -> the step's velocity rows, in memory; then the Euler steps. Several works
        compute the same (`HeadWork.computes`)."""
        with self.network.rows.of(*((work.adapter, work.rows) for work in works)):
            self._run(memories, works)

    def _run(self, memories: Sequence[ImageMemory], works: Sequence[HeadWork]) -> None:
        pairs = list(zip(memories, works, strict=True))
        modulation = joined([m.modulation.index_select(0, m.time_rows[: work.rows]) for m, work in pairs])
        if works[0].prediction is not None:
            x = joined([self._predict(memory, work) for memory, work in pairs])
        else:
            x = self._compute(memories, works, modulation)
        early = joined_early([(memory, work.rows) for memory, work in pairs])
        velocity = made_by("velocity", self.parts.velocity(x, modulation, early), len(x), *memories[0].sizes.velocity)
        for (memory, work), own in zip(pairs, velocity.split([work.rows for work in works]), strict=True):
            if work.formula is not None:
                own = work.formula(own, memory.scale.index_select(0, memory.time_rows[:1]))
                made_by("DrawInputs.formula", own, memory.shape.images, *memory.sizes.velocity)
            memory.velocity[: len(own)] = own
            if work.stepped:
                latents = memory.latents[: work.stepped]
                self.kernels.guided_euler_step_(
                    latents, memory.velocity[: len(own)], memory.scale, memory.dt, memory.time_rows[:1]
                )
                memory.time_rows.add_(1)

    def _predict(self, memory: ImageMemory, work: HeadWork) -> Tensor:
        assert work.prediction is not None
        x = memory.cache.predict(work.prediction, work.rows, self.kernels)
        return self.parts.head_input(memory.hidden[: work.rows]) + x if work.residual else x

    def _compute(self, memories: Sequence[ImageMemory], works: Sequence[HeadWork], modulation: Tensor) -> Tensor:
        pairs = list(zip(memories, works, strict=True))
        x = self.parts.head_input(joined([memory.hidden[: work.rows] for memory, work in pairs]))
        before = x.clone() if any(work.residual for work in works) else x  # the blocks write into x
        attention = span_pass([memory.span_pass(memory.head, work.rows, self.kernels) for memory, work in pairs])
        rope = joined_rope([(memory.head_rope, work.rows) for memory, work in pairs])
        for index, block in enumerate(self.network.blocks):
            x = head_block(block, index, x, modulation, rope, attention, self.parts.head_attention, self.kernels)
        rows = [work.rows for work in works]
        for (memory, work), own, first in zip(pairs, x.split(rows), before.split(rows), strict=True):
            if work.update is not None:
                memory.cache.update(work.update, own - first if work.residual else own, self.kernels)
        return x
