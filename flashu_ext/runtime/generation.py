"""Room: runtime. Draws images: runs every evaluation as its step plan says, with text computed once and dead work left out."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..config import FlashUConfig
from ..kernel_sets import KernelSet
from ..modules.attention import RowGeometry, SpanPass, rope_table
from ..schedule import Step, StepPlan
from ..structure import Showo2Parts, position_table
from .backbone import TASK, Backbone
from .encoder import early_signal, embed_image, embed_time, semantic_features
from .head import Head
from .head_cache import AdaptiveGate, HeadCache
from .state import ImageState, Rows
from .token_router import TokenRouter

__all__ = ["TASK", "GenerationEngine"]


class GenerationEngine:
    """Evaluates the velocity of images in progress. Holds no state of its own: every image has its `ImageState`."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.config = config
        self.kernels = kernels
        self.backbone = Backbone(parts, config, kernels)
        self.head = Head(parts, config, kernels)

    # ---- an image begins

    def begin(
        self,
        steps: int | None,
        text_tokens: Tensor,
        modality_positions: Tensor,
        guidance_scale: float,
        latent_size: tuple[int, int],
    ) -> ImageState:
        """Set up an image (or a batch of them).

        Args:
            steps: grid points; None takes the config's, or 50.
            text_tokens: int64 [rows, length]. modality_positions: int64 [rows, 1, 2]: (offset, length) of each row's span.
            guidance_scale: the caller's; above 0 the second half of the rows is the unconditional one.
            latent_size: (H, W) of the latents.
        """
        parts, config = self.parts, self.config
        guided = guidance_scale > 0
        grid = (latent_size[0] // parts.patch_size, latent_size[1] // parts.patch_size)
        plan = StepPlan.build(config, steps, len(parts.layers), guidance_scale, grid[0] * grid[1])
        rows = self._rows(text_tokens, modality_positions)
        return ImageState(
            plan=plan,
            all_rows=rows,
            conditional=rows.first(rows.count // 2) if guided else rows,
            modality_positions=modality_positions.clone(),
            guided=guided,
            planned_scale=self.planned_scale(guidance_scale),
            positions=position_table(parts, *grid),
            grid=grid,
            cache=HeadCache(config.head_forecast_order, restarts=config.adaptive_cache),
            gate=AdaptiveGate(config.adaptive_cache_budget),
            router=TokenRouter(int(grid[0] * grid[1] * config.token_skip_ratio), parts.has_time_token),
        )

    def planned_scale(self, guidance_scale: float) -> float | None:
        """The caller's guidance scale where a step plan depends on it, else None."""
        return guidance_scale if self.config.skip_unit_guidance else None

    def _rows(self, text_tokens: Tensor, modality_positions: Tensor) -> Rows:
        parts = self.parts
        geometry = RowGeometry(tuple(modality_positions[:, 0, 0].tolist()), int(modality_positions[0, 0, 1]))
        position_ids = modality_positions[:, 0, :1] + torch.arange(geometry.span, device=text_tokens.device)
        llm, head = parts.llm_attention, parts.head_attention
        dtype, device = parts.dtype, parts.device
        return Rows(
            text_tokens=text_tokens.clone(),
            geometry=geometry,
            llm_pass=SpanPass(geometry, len(parts.layers), llm.kv_heads, llm.head_dim, dtype, device),
            head_pass=SpanPass(geometry, len(parts.blocks), head.kv_heads, head.head_dim, dtype, device),
            llm_rope=rope_table(parts.llm_rope, position_ids, dtype),
            head_rope=rope_table(parts.blocks[0].self_attn.rotary_emb, position_ids, dtype),
        )

    # ---- one evaluation

    def evaluate(self, state: ImageState, latents: Tensor, t: Tensor) -> Tensor:
        """Run the next evaluation of an image.

        Args:
            latents: [images, channels, H, W], or [rows, ...] where guided rows have latents of their own.
            t: fp32 [images or rows].

        Returns:
            Velocity rows before guidance, [rows, patches, patch * patch * channels]; only the conditional ones, [images,
            ...], where the step plan leaves the other branch out.
        """
        planned = state.plan.at(state.step + 1)
        rows = state.rows(planned)
        latents, t = latents[: rows.count], t[: rows.count]
        time, time_token = embed_time(self.parts, t)
        step = self._decided(state, planned, latents, time_token)
        time, hidden, prefix = _to_rows(time, rows), None, None
        if step.backbone:
            span, step = self._embed(state, step, latents)
            span = _to_rows(span, rows)
            if self.parts.has_time_token:
                span = torch.cat([_to_rows(time_token, rows)[:, None], span], dim=1)
            hidden, prefix = self.backbone.run(state, rows, step, span)
        if step.head:
            assert hidden is not None, "a step that runs the head runs its backbone"
            head_state = self.head.run(state, rows, step, hidden, time, prefix)
        else:
            head_state = self.head.carry(state, rows, step, hidden)
        state.step += 1
        state.ran.append(step)
        return self.head.velocity(head_state, time)

    def _decided(self, state: ImageState, step: Step, latents: Tensor, time_token: Tensor) -> Step:
        """The step with the question answered whether its head is cached, one answer for the whole batch.

        Sum and comparison stay on the device. The host reads one flag where the answer is open: it launches other kernels
        then, so it cannot do without.
        """
        if not self.config.adaptive_cache or not (step.adaptive or step.keep_head):
            return step
        gate, cache = state.gate, state.cache
        gate.watch(early_signal(self.parts, latents, time_token), self.kernels)
        if step.adaptive:
            interval = self.config.head_cache_interval
            too_old = interval > 0 and step.index - cache.kept_at[-1] >= interval
            if not too_old and not bool(gate.due()):
                state.encode_due |= step.encode
                return step.cached(cache.kept_at[-1], self.config.head_residual_reuse)
        gate.computed()
        return step

    def _embed(self, state: ImageState, step: Step, latents: Tensor) -> tuple[Tensor, Step]:
        """The image's embeddings [images or rows, patches, hidden], and the step with the question answered whether the
        encoder ran for them."""
        images, semantic = latents.shape[0], state.semantic
        if semantic is None or step.encode or state.encode_due or semantic.shape[0] < images:
            semantic = semantic_features(self.parts, latents, state.positions)
            state.semantic = semantic if self.config.encoder_cache else None
            state.encode_due = False
            step = dataclasses.replace(step, encode=True)
        return embed_image(self.parts, latents, state.positions, semantic[:images]), step


def _to_rows(x: Tensor, rows: Rows) -> Tensor:
    """Repeat per-image values for the guided rows that share them."""
    return torch.cat([x, x]) if x.shape[0] != rows.count else x
