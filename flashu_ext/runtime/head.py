"""The diffusion head of a denoising step: its blocks on the image span, or what was kept of them."""

from __future__ import annotations

from torch import Tensor

from ..models.structure import Showo2Parts
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.schedule import Step
from .modules.attention import CausalPass
from .modules.head_block import final_layer, head_block
from .workspace import Workspace

__all__ = ["Head"]


class Head:
    """Runs the diffusion head in a workspace. Device work only: it changes no plain number, and reads no value back."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.residual = config.head is not None and config.head.residual
        self.kernels = kernels

    def prefix(self, ws: Workspace, rows: int, hidden: Tensor) -> None:
        """The prompt's final hidden states [rows, tokens, hidden], consumed -> its keys and values, into the workspace."""
        tokens = hidden.shape[1]
        attention = CausalPass(tokens, self.parts.head_attention, ws.prefix(rows)[1], self.kernels)
        rope = (ws.head_text_rope[0][:, :tokens], ws.head_text_rope[1][:, :tokens])
        x = self._input(hidden)
        for index, block in enumerate(self.parts.blocks):
            x = head_block(block, index, x, None, rope, attention, self.parts.head_attention, self.kernels)

    def run(self, ws: Workspace, step: Step, rows: int) -> None:
        """A step's velocity rows, into the workspace, from the language model's result there and the head cache.

        Where a later step carries it forward, the head's state is kept: the output of the blocks, or what they added to
        their input.
        """
        modulation = ws.modulation.index_select(0, ws.time_rows[:rows])
        if step.head:
            x = self._compute(ws, step, rows, modulation)
        else:
            x = ws.cache.carry(step.index, rows, self.kernels)
            if step.residual:
                x = self._input(ws.hidden[:rows]) + x
        skip = 1 if self.parts.has_time_token else 0
        ws.velocity[:rows] = final_layer(self.parts.final_layer, x[:, skip:], modulation, self.kernels)

    def _compute(self, ws: Workspace, step: Step, rows: int, modulation: Tensor) -> Tensor:
        x = self._input(ws.hidden[:rows])
        residual = self.residual and step.keep_head
        before = x.clone() if residual else x  # the blocks write into x
        attention = ws.span_pass(ws.head, rows, self.kernels)
        rope = (ws.head_rope[0][:rows], ws.head_rope[1][:rows])
        for index, block in enumerate(self.parts.blocks):
            x = head_block(block, index, x, modulation, rope, attention, self.parts.head_attention, self.kernels)
        if step.keep_head:
            ws.cache.keep(x - before if residual else x, step.index, self.kernels)
        return x

    def _input(self, hidden: Tensor) -> Tensor:
        # The blocks write into their input: where the widths agree that is `hidden`, which no one reads after this.
        return hidden if self.parts.diff_proj is None else self.parts.diff_proj(hidden)
