"""The diffusion head of a denoising step: its blocks on the image span, or a prediction of their output."""

from __future__ import annotations

from torch import Tensor

from .image_memory import ImageMemory
from .modules.attention import CausalPass
from .modules.head_block import final_layer, head_block
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
        tokens = hidden.shape[1]
        attention = CausalPass(tokens, memory.prefix(rows)[1], self.kernels)
        rope = (memory.head_text_rope[0][:, :tokens], memory.head_text_rope[1][:, :tokens])
        x = self._input(hidden)
        for index, block in enumerate(self.network.blocks):
            x = head_block(block, index, x, None, rope, attention, self.parts.head_attention, self.kernels)

    def run(self, memory: ImageMemory, work: HeadWork) -> None:
        """The language model's output in memory -> the step's velocity rows, in memory; then the Euler step."""
        rows = work.rows
        modulation = memory.modulation.index_select(0, memory.time_rows[:rows])
        x = self._predict(memory, work) if work.prediction is not None else self._compute(memory, work, modulation)
        skip = 1 if self.parts.has_time_token else 0
        memory.velocity[:rows] = final_layer(self.network.head_out, self.network.head_norm, x[:, skip:], modulation)
        if work.stepped:
            latents = memory.latents[: work.stepped]
            self.kernels.guided_euler_step_(
                latents, memory.velocity[:rows], memory.scale, memory.dt, memory.time_rows[:1]
            )
            memory.time_rows.add_(1)

    def _predict(self, memory: ImageMemory, work: HeadWork) -> Tensor:
        assert work.prediction is not None
        x = memory.cache.predict(work.prediction, work.rows, self.kernels)
        return self._input(memory.hidden[: work.rows]) + x if work.residual else x

    def _compute(self, memory: ImageMemory, work: HeadWork, modulation: Tensor) -> Tensor:
        rows = work.rows
        x = self._input(memory.hidden[:rows])
        before = x.clone() if work.residual else x  # the blocks write into x
        attention = memory.span_pass(memory.head, rows, self.kernels)
        rope = (memory.head_rope[0][:rows], memory.head_rope[1][:rows])
        for index, block in enumerate(self.network.blocks):
            x = head_block(block, index, x, modulation, rope, attention, self.parts.head_attention, self.kernels)
        if work.update is not None:
            memory.cache.update(work.update, x - before if work.residual else x, self.kernels)
        return x

    def _input(self, hidden: Tensor) -> Tensor:
        # The blocks overwrite their input. Without a projection that is `hidden`, which is not read again.
        return hidden if self.parts.diff_proj is None else self.parts.diff_proj(hidden)
