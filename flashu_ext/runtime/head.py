"""The diffusion head of a denoising step: its blocks on the image span, or what was kept of them."""

from __future__ import annotations

from torch import Tensor

from ..models.parts import Showo2Parts
from ..ops.kernel_sets import KernelSet
from .modules.attention import CausalPass
from .modules.head_block import final_layer, head_block
from .work import HeadWork
from .workspace import Workspace

__all__ = ["Head"]


class Head:
    """Runs the diffusion head in a workspace. Device work only: it depends on its work and on memory, and reads nothing back."""

    def __init__(self, parts: Showo2Parts, kernels: KernelSet):
        self.parts = parts
        self.kernels = kernels

    def prefix(self, ws: Workspace, rows: int, hidden: Tensor) -> None:
        """The prompt's final hidden states [rows, tokens, hidden], consumed -> its keys and values, into the workspace."""
        tokens = hidden.shape[1]
        attention = CausalPass(tokens, self.parts.head_attention, ws.prefix(rows)[1], self.kernels)
        rope = (ws.head_text_rope[0][:, :tokens], ws.head_text_rope[1][:, :tokens])
        x = self._input(hidden)
        for index, block in enumerate(self.parts.blocks):
            x = head_block(block, index, x, None, rope, attention, self.parts.head_attention, self.kernels)

    def run(self, ws: Workspace, work: HeadWork) -> None:
        """The language model's result in the workspace -> a step's velocity rows, there too, and the latents moved along."""
        rows = work.rows
        modulation = ws.modulation.index_select(0, ws.time_rows[:rows])
        x = self._predict(ws, work) if work.prediction is not None else self._compute(ws, work, modulation)
        skip = 1 if self.parts.has_time_token else 0
        ws.velocity[:rows] = final_layer(self.parts.final_layer, x[:, skip:], modulation, self.kernels)
        if work.moved:
            latents = ws.latents[: work.moved]
            self.kernels.guided_euler_step_(latents, ws.velocity[:rows], ws.scale, ws.dt, ws.time_rows[:1])
            ws.time_rows.add_(1)

    def _predict(self, ws: Workspace, work: HeadWork) -> Tensor:
        assert work.prediction is not None
        x = ws.cache.predict(work.prediction, work.rows, self.kernels)
        return self._input(ws.hidden[: work.rows]) + x if work.residual else x

    def _compute(self, ws: Workspace, work: HeadWork, modulation: Tensor) -> Tensor:
        rows = work.rows
        x = self._input(ws.hidden[:rows])
        before = x.clone() if work.residual else x  # the blocks write into x
        attention = ws.span_pass(ws.head, rows, self.kernels)
        rope = (ws.head_rope[0][:rows], ws.head_rope[1][:rows])
        for index, block in enumerate(self.parts.blocks):
            x = head_block(block, index, x, modulation, rope, attention, self.parts.head_attention, self.kernels)
        if work.update is not None:
            ws.cache.update(work.update, x - before if work.residual else x, self.kernels)
        return x

    def _input(self, hidden: Tensor) -> Tensor:
        # The blocks write into their input: where the widths agree that is `hidden`, which no one reads after this.
        return hidden if self.parts.diff_proj is None else self.parts.diff_proj(hidden)
