"""Room: runtime. The diffusion head of a denoising step: its blocks on the image span, or what was kept of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import FlashUConfig
from ..kernel_sets import KernelSet
from ..modules.attention import CausalPass, KeyValue, rope_table
from ..modules.head_block import final_layer, head_block
from ..schedule import Step
from ..structure import Showo2Parts
from .state import ImageState, PrefixCache, Rows

__all__ = ["Head"]


class Head:
    """Runs the diffusion head for images in progress. Holds no state of its own."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.config = config
        self.kernels = kernels

    def run(
        self, state: ImageState, rows: Rows, step: Step, hidden: Tensor, time: Tensor, prefix: PrefixCache | None
    ) -> Tensor:
        """hidden [rows, span, hidden], which is consumed, time [rows, width] -> head state [rows, span, width].

        Where a later step carries it forward, the state is kept: the output of the blocks, or what they added to their
        input.
        """
        assert prefix is not None, "a step that runs the head has a prefix"
        rows.head_pass.load_prefix(self._prefix(prefix), prefix)
        x = self._input(hidden)
        residual = self.config.head_residual_reuse and step.keep_head
        before = x.clone() if residual else x  # the blocks write into x
        x = self._blocks(x, time, rows)
        if step.keep_head:
            state.cache.keep(x - before if residual else x, step.index, self.kernels)
        return x

    def _blocks(self, x: Tensor, time: Tensor, rows: Rows) -> Tensor:
        shape = self.parts.head_attention
        for index, block in enumerate(self.parts.blocks):
            x = head_block(block, index, x, time, rows.head_rope, rows.head_pass, shape, self.kernels)
        return x

    def carry(self, state: ImageState, rows: Rows, step: Step, hidden: Tensor | None) -> Tensor:
        """The head state [rows, span, width] of a step whose blocks do not run.

        Args:
            hidden: [rows, span, hidden], where the kept residual is added to a fresh input.
        """
        kept = state.cache.carry(step.index, rows.count, self.kernels)
        if not step.residual:
            return kept
        assert hidden is not None, "a step that reuses the residual runs its backbone"
        return self._input(hidden) + kept

    def velocity(self, head_state: Tensor, time: Tensor) -> Tensor:
        """The final layer: [rows, span, width] -> velocity rows [rows, patches, patch * patch * channels]."""
        skip = 1 if self.parts.has_time_token else 0
        return final_layer(self.parts.final_layer, head_state[:, skip:], time, self.kernels)

    def _input(self, hidden: Tensor) -> Tensor:
        # The blocks write into their input: where the widths agree that is `hidden`, which no one reads after this.
        return hidden if self.parts.diff_proj is None else self.parts.diff_proj(hidden)

    def _prefix(self, prefix: PrefixCache) -> list[KeyValue | None]:
        """The prompt's keys and values, computed from its hidden states where a head first runs over this prefix."""
        if prefix.head is None:
            assert prefix.hidden is not None, "hidden states are kept until the head's keys and values are"
            parts, tokens = self.parts, prefix.geometry.longest
            attention = CausalPass(tokens, len(parts.blocks), parts.dtype, parts.device)
            if tokens:
                x = self._input(prefix.hidden)
                positions = torch.arange(tokens, device=parts.device)[None]
                rope = rope_table(parts.blocks[0].self_attn.rotary_emb, positions, parts.dtype)
                for index, block in enumerate(parts.blocks):
                    x = head_block(block, index, x, None, rope, attention, parts.head_attention, self.kernels)
            prefix.head, prefix.hidden = prefix.geometry.right_align_all(attention.cache), None
        return prefix.head
