"""Draws images: runs every evaluation as its step plan says, with text computed once and dead work left out.

An evaluation is a handful of pieces of device work on a workspace (`graphs`), and the host's bookkeeping around them:
which step it is, what is skipped, what was kept. Only here is a number read back from the device: the layers' importance
after a measurement, behind which the head is launched before the host waits, and the adaptive cache's flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..models.embedding import early_signal, embed_image, embed_time, semantic_features
from ..models.structure import Showo2Parts
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.schedule import Step, StepPlan
from .backbone import TASK, Backbone
from .counting import Counts
from .graphs import Captures
from .head import Head
from .modules.attention import RowGeometry
from .modules.head_block import modulation_table
from .state import ImageState, StepWork, Variant
from .workspace import Shape
from .workspaces import Workspaces

__all__ = ["TASK", "GenerationEngine"]


class GenerationEngine:
    """Evaluates the velocity of images in progress. Every image has its `ImageState`; the memory is shared by turns."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet, captures: Captures):
        self.parts = parts
        self.config = config
        self.kernels = kernels
        self.head = Head(parts, config, kernels)
        self.backbone = Backbone(parts, config, kernels, self.head)
        self.workspaces = Workspaces(parts, config, captures)

    # ---- an image begins and ends

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
        rows = text_tokens.shape[0]
        patches = (latent_size[0] // parts.patch_size) * (latent_size[1] // parts.patch_size)
        plan = StepPlan.build(config, steps, len(parts.layers), guidance_scale, patches)
        where = modality_positions[:, 0].tolist()
        geometry = RowGeometry(tuple(offset for offset, _ in where), int(where[0][1]))
        shape = Shape(
            rows,
            rows // 2 if guided else rows,
            latent_size,
            text_tokens.shape[1],
            geometry.longest,
            max(len(plan), rows),
        )
        workspace, pieces = self.workspaces.take(shape)
        try:
            workspace.load(parts, text_tokens, modality_positions[:, 0, 0], geometry)
        except BaseException:
            self.workspaces.give_back(workspace)
            raise
        return ImageState(
            plan=plan,
            workspace=workspace,
            pieces=pieces,
            geometry=geometry,
            modality_positions=modality_positions.clone(),
            guided=guided,
            planned_scale=self.planned_scale(guidance_scale),
            length=shape.length,
            carried=workspace.router.carried,
        )

    def planned_scale(self, guidance_scale: float) -> float | None:
        """The caller's guidance scale where a step plan depends on it, else None."""
        return guidance_scale if self.config.execution.skip_unit_guidance else None

    def load_times(self, state: ImageState, t: Tensor, scale: Tensor, dt: Tensor) -> None:
        """Compute what depends on time alone for all evaluations, and go to the first.

        Args:
            t, scale, dt: fp32 [evaluations]: time, guidance scale and time step of each.
        """
        ws, count = state.workspace, t.shape[0]
        ws.scale[:count] = scale
        ws.dt[:count] = dt
        ws.time_rows.zero_()
        self._fill_times(state, t)

    def _fill_times(self, state: ImageState, t: Tensor) -> None:
        ws, parts = state.workspace, self.parts
        time, token = embed_time(parts, t)
        ws.time_token[: t.shape[0]] = token
        ws.modulation[: t.shape[0]] = modulation_table(parts.blocks, parts.final_layer, time)

    def end(self, state: ImageState) -> None:
        """Give a finished or abandoned image's memory back; what a summary reads stays."""
        if state.ended:
            return
        self.workspaces.give_back(state.workspace)
        state.let_go()

    # ---- one evaluation

    def step(self, state: ImageState) -> None:
        """Run the next evaluation of an image whose times are loaded, and move its latents along."""
        self._evaluate(state, state.images, moves=True)

    def velocity_at(self, state: ImageState, latents: Tensor, t: Tensor) -> Tensor:
        """Run the next evaluation at given latents and times.

        Args:
            latents: [images, channels, H, W], or [rows, ...] where guided rows have latents of their own.
            t: fp32 [images or rows].

        Returns:
            Velocity rows before guidance, [rows, patches, patch * patch * channels]; only the conditional ones, [images,
            ...], where the step plan leaves the other branch out. Overwritten by the next evaluation.
        """
        ws = state.workspace
        count = latents.shape[0]
        ws.latents[:count] = latents
        ws.time_rows.copy_(torch.arange(ws.shape.rows, device=latents.device) % count)
        self._fill_times(state, t.to(torch.float32))
        rows = self._evaluate(state, count, moves=False)
        return ws.velocity[:rows]

    def _evaluate(self, state: ImageState, latents: int, moves: bool) -> int:
        """One evaluation; latents: how many of the workspace's are in use. Returns the rows that ran."""
        if state.ended or not self.workspaces.lent(state.workspace):
            raise RuntimeError("model: its handle was removed or reset while this image was being drawn")
        waits = state.waits
        planned = state.plan.at(state.step + 1)
        rows = state.rows(planned)
        images = min(latents, rows)
        done: list[Counts] = []

        def run(key: Hashable, work: Callable[[], Any], rare: bool = False) -> None:
            done.append(state.pieces.run(key, work, rare))

        step = self._decided(state, planned, images, run)
        if step.backbone:
            step = self._run_backbone(state, step, rows, images, run)
        self._run_head(state, step, rows, moves, run)
        state.step += 1
        state.ran.append(step)
        state.work.append(
            StepWork(
                step.kind,
                sum(counts.launched for counts in done),
                sum(counts.synced for counts in done),
                state.waits - waits,
            )
        )
        return rows

    def _decided(self, state: ImageState, step: Step, images: int, run: Callable[..., None]) -> Step:
        """The step with the question answered whether its head is cached, one answer for the whole batch.

        Sum and comparison stay on the device. The host reads one flag where the answer is open: it launches other kernels
        then, so it cannot do without.
        """
        head = self.config.head
        if head is None or not head.adaptive or not (step.adaptive or step.keep_head):
            return step
        ws = state.workspace
        gate, cache = ws.gate, ws.cache

        def watch() -> None:
            token = ws.time_token.index_select(0, ws.time_rows[:images])
            gate.watch(early_signal(self.parts, ws.latents[:images], token), self.kernels)

        run(("watch", gate.watches(images)), watch)
        gate.watched(images)
        if step.adaptive:
            too_old = head.interval > 0 and step.index - cache.kept_at[-1] >= head.interval
            if not too_old:
                state.flag.post(gate.due().float())
                if not state.flag.wait()[0]:
                    state.encode_due |= step.encode
                    return step.cached(cache.kept_at[-1], head.residual)
        gate.computed()
        return step

    def _run_backbone(self, state: ImageState, step: Step, rows: int, images: int, run: Callable[..., None]) -> Step:
        """The image's embeddings and the language model on them; returns the step with the question answered whether the
        encoder ran."""
        ws, backbone, router = state.workspace, self.backbone, state.workspace.router
        encode = step.encode or state.encode_due or state.semantic_rows < images
        step = dataclasses.replace(step, encode=encode)
        variant: Variant = (TASK if step.pruned else None, ())
        if not step.measure:
            variant = (variant[0], self._skipped(state) if step.skip_from is not None else ())
            self._load_prefix(state, rows, variant, run)
        measures = (step.measure, router.slot() if step.measure_tokens else None, step.measure and step.head)
        routes = router.reads(step.tokens_from, step.index) if step.tokens_from else ()

        def work() -> None:
            span = self._span(ws, rows, images, encode)
            (backbone.measure if step.measure else backbone.run)(ws, step, rows, variant, span)

        lengths = _lengths(state, rows)
        # Which layers are skipped may be another choice for every prompt.
        run(("backbone", rows, images, encode, variant, measures, routes, lengths), work, rare=bool(variant[1]))
        if encode and ws.semantic is not None:
            state.semantic_rows = images
        state.encode_due &= not encode
        if step.measure:
            ws.owner = (variant, rows) if step.head else None
            state.importance.post(ws.importance)
            state.measured = step.index
        if step.measure_tokens:
            router.measured(step.index)
        carried = router.carried if step.tokens_from else 0
        layers = (len(self.parts.layers) - len(variant[1])) * rows
        state.routed["computed"] += layers * (ws.span - carried)
        state.routed["carried"] += layers * carried
        return step

    def _span(self, ws: Any, rows: int, images: int, encode: bool) -> Tensor:
        """The rows' embeddings of image and time, [rows, span, hidden]."""
        parts, latents = self.parts, ws.latents[:images]
        if not encode:
            semantic = ws.semantic[:images]
        else:
            semantic = semantic_features(parts, latents, ws.positions)
            if ws.semantic is not None:
                ws.semantic[:images] = semantic
        span = embed_image(parts, latents, ws.positions, semantic)
        if parts.has_time_token:
            token = ws.time_token.index_select(0, ws.time_rows[:images])
            span = torch.cat([token[:, None], span], dim=1)
        return torch.cat([span, span]) if images != rows else span

    def _skipped(self, state: ImageState) -> tuple[int, ...]:
        """The layers in force, chosen from a measurement as soon as it has arrived."""
        if state.measured is not None:
            scores = state.importance.wait()
            assert self.config.layers is not None, "a step plan without skipped layers measures none"
            count = self.config.layers.count(len(scores))
            state.skipped = tuple(sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count]))
            state.choices.append((state.measured, state.skipped))
            state.measured = None
        return state.skipped or ()

    def _load_prefix(self, state: ImageState, rows: int, variant: Variant, run: Callable[..., None]) -> None:
        """Have a variant's prefix of at least so many rows in the workspace."""
        ws = state.workspace
        owner = ws.owner
        if (owner is not None and owner[0] == variant and owner[1] >= rows) or state.load_prefix(variant, rows):
            return
        run(("prefix", rows, variant), lambda: self.backbone.prefix(ws, rows, variant), rare=bool(variant[1]))
        ws.owner = (variant, rows)
        state.keep_prefix(variant, rows)

    def _run_head(self, state: ImageState, step: Step, rows: int, moves: bool, run: Callable[..., None]) -> None:
        ws, cache = state.workspace, state.workspace.cache
        keeps: tuple[Any, ...] = ()
        if step.keep_head:
            first_block = self.parts.blocks[0]
            cache.resize(rows, ws.hidden.new_empty(0, ws.span, first_block.input_layernorm.weight.shape[0]))
            keeps = cache.keeps(step.index)
        elif not step.head:
            keeps = (*cache.carries(step.index), step.residual)

        def work() -> None:
            self.head.run(ws, step, rows)
            if moves:
                images = ws.latents[: state.images]
                self.kernels.guided_euler_step_(images, ws.velocity[:rows], ws.scale, ws.dt, ws.time_rows[:1])
                ws.time_rows.add_(1)

        lengths = _lengths(state, rows)
        run(("head", rows, step.head, step.keep_head, keeps, moves, lengths), work)
        if step.keep_head:
            cache.kept(step.index)


def _lengths(state: ImageState, rows: int) -> int | None:
    """What a piece asks of the device depends on, where the prompts' lengths are read on the host: how many different ones
    follow each other. Such pieces are counted, never captured."""
    return None if state.workspace.mask is not None else len(state.geometry.first(rows).groups())
