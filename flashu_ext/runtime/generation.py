"""Draws images: runs every evaluation as its step plan says, with text computed once and dead work left out.

An evaluation is two or three pieces of device work (`work`) in a workspace, and the host's bookkeeping around them. Only here
is a number read back from the device: the layers' importance after a measurement, behind which the head is launched before
the host waits, and the adaptive cache's flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..models.embedding import embed_time
from ..models.parts import Showo2Parts
from ..models.showo2.sampling import SampleInputs
from ..models.velocity import guide, unpatchify
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.schedule import Step, StepPlan, least_important
from .backbone import TASK, Backbone
from .counting import Counts
from .graphs import GraphCapture
from .head import Head
from .history import HeadHistory
from .memory import MemoryPool
from .modules.attention import RowGeometry
from .modules.head_block import modulation_table
from .state import ImageRecord, ImageState, StepWork
from .work import BackboneWork, HeadWork, PrefixWork, Variant, WatchWork
from .workspace import Shape, Workspace

__all__ = ["TASK", "AcceleratedStepper", "GenerationEngine"]

IDLE_WORKSPACES = 2
"""Kept between images: for the batch size in use, and for the smaller last batch of a list."""

W = TypeVar("W", bound=Hashable)


class GenerationEngine:
    """Evaluates the velocity of images in progress. Every image has its `ImageState`; the memory is shared by turns."""

    def __init__(self, parts: Showo2Parts, config: FlashUConfig, kernels: KernelSet, capture: GraphCapture):
        self.parts = parts
        self.config = config
        self.kernels = kernels
        self.head = Head(parts, kernels)
        self.backbone = Backbone(parts, kernels, self.head)
        self.pool: MemoryPool[Workspace] = MemoryPool(capture, IDLE_WORKSPACES)

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
        rows, length = text_tokens.shape
        patches = (latent_size[0] // parts.patch_size) * (latent_size[1] // parts.patch_size)
        plan = StepPlan.build(config, steps, len(parts.layers), guidance_scale, patches)
        where = modality_positions[:, 0].tolist()
        geometry = RowGeometry(tuple(offset for offset, _ in where), int(where[0][1]))
        images = rows // 2 if guided else rows
        lease = self._acquire(Shape(rows, images, latent_size, length, geometry.longest, max(len(plan), rows)))
        try:
            lease.memory.load(parts, text_tokens, modality_positions, geometry)
        except BaseException:
            self.pool.release(lease)
            raise
        head = HeadHistory(config.head_forecast_order, restarts=config.adaptive_cache)
        skipped = lease.memory.router.skipped
        return ImageState(lease, ImageRecord(plan, guided, geometry, length, skipped, lease.memory.nbytes()), head)

    def _acquire(self, shape: Shape) -> Any:
        fixed = self.pool.fixed
        return self.pool.acquire(
            lambda workspace: workspace.shape.holds(shape),
            lambda: Workspace(self.parts, self.config, shape.rounded() if fixed else shape, fixed),
        )

    def load_times(self, state: ImageState, t: Tensor, scale: Tensor, dt: Tensor) -> None:
        """Compute what depends on time alone for all evaluations, and go to the first.

        Args:
            t, scale, dt: fp32 [evaluations]: time, guidance scale and time step of each.
        """
        ws, count = state.workspace, t.shape[0]
        ws.scale[:count] = scale
        ws.dt[:count] = dt
        ws.time_rows.zero_()
        self._fill_times(ws, t)

    def _fill_times(self, ws: Workspace, t: Tensor) -> None:
        time, token = embed_time(self.parts, t)
        ws.time_token[: t.shape[0]] = token
        ws.modulation[: t.shape[0]] = modulation_table(self.parts.blocks, self.parts.final_layer, time)

    def end(self, state: ImageState) -> None:
        """Release a finished or abandoned image's memory; its record stays."""
        state.record.memory = state.nbytes()
        self.pool.release(state.lease)

    # ---- one evaluation

    def step(self, state: ImageState) -> None:
        """Run the next evaluation of an image whose times are loaded, and move its latents along."""
        self._evaluate(state, state.images, moved=state.images)

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
        self._fill_times(ws, t.to(torch.float32))
        rows = self._evaluate(state, count, moved=0)
        return ws.velocity[:rows]

    def _evaluate(self, state: ImageState, latents: int, moved: int) -> int:
        """One evaluation; latents: how many of the workspace's are in use. Returns the rows that ran."""
        self.pool.check(state.lease, "this image was being drawn")
        planned = state.plan.at(state.step + 1)
        rows = state.rows(planned)
        images = min(latents, rows)
        run = _Runs(state)
        step = self._decide(state, planned, images, run)
        if step.backbone:
            step = self._run_backbone(state, step, rows, images, run)
        self._run_head(state, step, rows, moved, run)
        state.record.ran.append(step)
        state.record.work.append(run.asked(step.kind))
        return rows

    def _decide(self, state: ImageState, step: Step, images: int, run: _Runs) -> Step:
        """The step with the question answered whether its head is cached, one answer for the whole batch.

        Sum and comparison stay on the device. The host reads one flag where the answer is open: it launches other kernels
        then, so it cannot do without.
        """
        if not self.config.adaptive_cache or not (step.adaptive or step.keep_head):
            return step
        gate, steps = state.workspace.gate, state.head.steps
        run(self.backbone.watch, WatchWork(images, min(images, state.watched)))
        state.watched = images
        if step.adaptive:
            interval = self.config.head_cache_interval
            too_old = interval > 0 and step.index - steps[-1] >= interval
            if not too_old:
                state.flag.post(gate.due().float())
                if not state.flag.wait()[0]:
                    state.encode_due |= step.encode
                    return step.cached(steps[-1], self.config.head_residual_reuse)
        gate.computed()
        return step

    def _run_backbone(self, state: ImageState, step: Step, rows: int, images: int, run: _Runs) -> Step:
        """The image's embeddings and the language model on them; returns the step with the question answered whether the
        encoder ran."""
        encode = step.encode or state.encode_due or state.semantic_rows < images
        step = dataclasses.replace(step, encode=encode)
        variant = self._variant(state, step)
        if not step.measure:
            self._load_prefix(state, rows, variant, run)
        work = BackboneWork(
            rows,
            images,
            encode,
            variant,
            step.measure,
            stores_prefix=step.measure and step.head,
            token_slot=state.tokens.measure(step.index) if step.measure_tokens else None,
            routing=state.tokens.routing(step.tokens_from, step.index) if step.tokens_from else None,
            groups=state.workspace.groups(rows),
        )
        run(self.backbone.run, work)
        self._after_backbone(state, step, work)
        return step

    def _variant(self, state: ImageState, step: Step) -> Variant:
        """The network of a step, its layers chosen from a measurement as soon as that has arrived."""
        task = TASK if step.pruned else None
        if step.measure or step.skip_from is None:
            return Variant(task)
        if state.measured is not None:
            scores = state.importance.wait()
            state.skipped = least_important(scores, self.config.layer_skip_ratio)
            state.record.choices.append((state.measured, state.skipped))
            state.measured = None
        return Variant(task, state.skipped or ())

    def _load_prefix(self, state: ImageState, rows: int, variant: Variant, run: _Runs) -> None:
        """Have a variant's prefix of at least so many rows in the workspace."""
        if not state.load_prefix(variant, rows):
            run(self.backbone.prefix, PrefixWork(rows, variant))
            state.prefix = (variant, rows)
            state.store_prefix()

    def _after_backbone(self, state: ImageState, step: Step, work: BackboneWork) -> None:
        """What later steps have to know of it."""
        if work.encode and self.config.encoder_cache:
            state.semantic_rows = work.images
        state.encode_due &= not work.encode
        if work.measure:
            state.prefix = (work.variant, work.rows) if work.stores_prefix else None
            state.importance.post(state.workspace.importance)
            state.measured = step.index
        skipped = state.record.skipped_tokens if work.routing is not None else 0
        layers = (len(self.parts.layers) - len(work.variant.skipped)) * work.rows
        state.record.routed["computed"] += layers * (state.workspace.span - skipped)
        state.record.routed["carried"] += layers * skipped

    def _run_head(self, state: ImageState, step: Step, rows: int, moved: int, run: _Runs) -> None:
        """Blocks and final layer, or the final layer on what stands for the blocks' output."""
        work = HeadWork(
            rows,
            update=state.head.update(step.index, rows) if step.keep_head else None,
            prediction=None if step.head else state.head.predict(step.index, rows),
            residual=self.config.head_residual_reuse and step.keep_head if step.head else step.residual,
            moved=moved,
            groups=state.workspace.groups(rows),
        )
        run(self.head.run, work)


class _Runs:
    """The works of one evaluation, and what they ask of the device."""

    def __init__(self, state: ImageState):
        self._state = state
        self._waited = state.waits
        self._done: list[Counts] = []

    def __call__(self, execute: Callable[[Workspace, W], None], work: W) -> None:
        self._done.append(self._state.lease.graphs.run(execute, work))

    def asked(self, kind: str) -> StepWork:
        launched, synced = (sum(counts) for counts in zip(*((c.launched, c.synced) for c in self._done), strict=True))
        return StepWork(kind, launched, synced, self._state.waits - self._waited)


class AcceleratedStepper:
    """Takes the steps of `showo2.sample` on an accelerated model: guidance and Euler step are part of an evaluation."""

    def __init__(self, engine: GenerationEngine, inputs: SampleInputs):
        self.engine = engine
        self.inputs = inputs
        height, width = inputs.noise.shape[2:]
        self.state = engine.begin(inputs.steps, inputs.tokens, inputs.positions, inputs.guidance_scale, (height, width))
        self.evaluations = len(self.state.plan)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        inputs, state = self.inputs, self.state
        at = self.engine.config.guidance_at
        self._scales = [at(i + 1, inputs.guidance_scale) if inputs.guided else 0.0 for i in range(self.evaluations)]
        times = inputs.times(state.plan.grid_points)
        scales = torch.tensor(self._scales, dtype=torch.float32, device=times.device)
        self.engine.load_times(state, times[:-1], scales, times[1:] - times[:-1])
        state.workspace.latents[: state.images].copy_(inputs.noise)

    def step(self, index: int) -> None:
        self.engine.step(self.state)

    def velocity(self) -> Tensor:
        state = self.state
        rows = state.workspace.velocity[: state.rows(state.record.ran[-1])]
        return guided_velocity(rows, self._scales[state.step - 1], self.inputs.noise.shape)

    def latents(self) -> Tensor:
        return self.state.workspace.latents[: self.state.images].clone()

    def close(self) -> None:
        self.engine.end(self.state)


def guided_velocity(rows: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """Velocity rows of one or both branches [images or 2 * images, patches, patch * patch * channels] -> the guided velocity of
    `shape` [images, channels, H, W], in memory of its own."""
    velocity = unpatchify(rows, shape)
    return velocity.clone() if rows.shape[0] == shape[0] else guide(velocity, scale)
