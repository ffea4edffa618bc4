"""Generates images: runs every evaluation as its step plan says, with text computed once and dead work omitted.

An evaluation is two or three works (`work`) on an `ImageMemory`, and the bookkeeping on the host. Two values are read back from
the device, both here: the adaptive cache's flag, and the layer importance after a measurement. The head is launched
before the host waits for the latter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..models.embedding import embed_time
from ..models.showo2.sampling import SampleInputs
from ..models.velocity import Scale, guide, guided, unpatchify
from ..planning.config import FlashUConfig
from ..planning.groups import HeadCaching, LayerSkip
from ..planning.schedule import Step, StepPlan, least_important
from .backbone import TASK, Backbone
from .counting import Counts
from .graphs import GraphCapture
from .head import Head
from .history import HeadHistory
from .image_memory import ImageMemory, ImageShape
from .memory import MemoryPool
from .modules.attention import RowGeometry
from .modules.head_block import modulation_table
from .network import Network
from .state import ImageRecord, ImageState, StepCounts
from .work import BackboneWork, HeadWork, PrefixWork, Variant, WatchWork

__all__ = ["TASK", "AcceleratedStepper", "GenerationEngine"]

IDLE_IMAGE_MEMORIES = 2
"""Memories pooled between images: for the current batch size, and for the smaller last batch of a list."""

W = TypeVar("W", bound=Hashable)


class GenerationEngine:
    """Evaluates the velocity of images in progress. Each image has its own `ImageState`; memory comes from one pool."""

    def __init__(self, network: Network, config: FlashUConfig, capture: GraphCapture):
        self.network = network.at(TASK, "embed")
        self.parts = self.network.parts
        self.config = config
        self.layers = config.layers or LayerSkip(0.0, 0)
        self.caching = config.head or HeadCaching()
        self.head = Head(network)
        self.backbone = Backbone(network, self.head)
        self.pool: MemoryPool[ImageMemory] = MemoryPool(capture, IDLE_IMAGE_MEMORIES)

    # ---- an image begins and ends

    def begin(
        self,
        steps: int | None,
        text_tokens: Tensor,
        modality_positions: Tensor,
        guidance_scale: Scale,
        latent_size: tuple[int, int],
    ) -> ImageState:
        """Set up an image (or a batch of them).

        Args:
            steps: grid points; None takes the config's, or 50.
            text_tokens: int64 [rows, length].
            modality_positions: int64 [rows, 1, 2], (offset, length) of each row's span.
            guidance_scale: the caller's; above 0 the second half of the rows is unconditional.
            latent_size: (H, W) of the latents.
        """
        parts, config = self.parts, self.config
        with_guidance = guided(guidance_scale)
        rows, length = text_tokens.shape
        patches = (latent_size[0] // parts.patch_size) * (latent_size[1] // parts.patch_size)
        plan = StepPlan.build(
            config, steps, len(parts.layers), None if isinstance(guidance_scale, tuple) else guidance_scale, patches
        )
        where = modality_positions[:, 0].tolist()
        geometry = RowGeometry(tuple(offset for offset, _ in where), int(where[0][1]))
        images = rows // 2 if with_guidance else rows
        lease = self._acquire(ImageShape(rows, images, latent_size, length, geometry.longest, max(len(plan), rows)))
        try:
            lease.memory.load(parts, text_tokens, modality_positions, geometry)
        except BaseException:
            self.pool.release(lease)
            raise
        head = HeadHistory(self.caching.order, restarts=self.caching.adaptive)
        skipped = lease.memory.router.skipped
        return ImageState(
            lease, ImageRecord(plan, with_guidance, geometry, length, skipped, lease.memory.nbytes()), head
        )

    def _acquire(self, shape: ImageShape) -> Any:
        fixed = self.pool.fixed
        return self.pool.acquire(
            lambda memory: memory.shape.holds(shape),
            lambda: ImageMemory(self.parts, self.config, shape.rounded() if fixed else shape, fixed),
        )

    def load_times(self, state: ImageState, t: Tensor, scale: Tensor, dt: Tensor) -> None:
        """Fill the time tables of all evaluations and start at the first.

        Args:
            t, scale, dt: fp32 [evaluations]: time, guidance scale and time step of each.
        """
        memory, count = state.memory, t.shape[0]
        memory.scale[:count] = scale
        memory.dt[:count] = dt
        memory.time_rows.zero_()
        self._fill_times(memory, t)

    def _fill_times(self, memory: ImageMemory, t: Tensor) -> None:
        time, token = embed_time(self.parts, t)
        memory.time_token[: t.shape[0]] = token
        memory.modulation[: t.shape[0]] = modulation_table(self.network.modulations, time)

    def end(self, state: ImageState) -> None:
        """Release a finished or abandoned image's memory; its record stays."""
        state.record.memory = state.nbytes()
        self.pool.release(state.lease)

    # ---- one evaluation

    def step(self, state: ImageState) -> None:
        """Run the next evaluation of an image whose times are loaded, and its Euler step."""
        self._evaluate(state, state.images, stepped=state.images)

    def velocity_at(self, state: ImageState, latents: Tensor, t: Tensor) -> Tensor:
        """Run the next evaluation at given latents and times.

        Args:
            latents: [images, channels, H, W], or [rows, ...] where the two guidance branches have separate latents.
            t: fp32 [images or rows].

        Returns:
            Velocity rows before guidance, [rows, patches, patch * patch * channels]; [images, ...] where the step plan runs
            the conditional branch only. Overwritten by the next evaluation.
        """
        memory = state.memory
        count = latents.shape[0]
        memory.latents[:count] = latents
        memory.time_rows.copy_(torch.arange(memory.shape.rows, device=latents.device) % count)
        self._fill_times(memory, t.to(torch.float32))
        rows = self._evaluate(state, count, stepped=0)
        return memory.velocity[:rows]

    def _evaluate(self, state: ImageState, latents: int, stepped: int) -> int:
        """One evaluation; latents: how many are in use. Returns the number of rows that ran."""
        self.pool.check(state.lease, "this image was being generated")
        planned = state.plan.at(state.step + 1)
        rows = state.rows(planned)
        images = min(latents, rows)
        run = _Runs(state)
        step = self._decide(state, planned, images, run)
        if step.backbone:
            step = self._run_backbone(state, step, rows, images, run)
        self._run_head(state, step, rows, stepped, run)
        state.record.ran.append(step)
        state.record.counts.append(run.counted(step.kind))
        return rows

    def _decide(self, state: ImageState, step: Step, images: int, run: _Runs) -> Step:
        """The step, with the adaptive cache's decision whether the head is cached: one decision for the whole batch.

        The drift is summed and compared on the device. The host must read the resulting flag, for it decides what to launch.
        """
        if not self.caching.adaptive or not (step.adaptive or step.keep_head):
            return step
        gate, steps = state.memory.gate, state.head.steps
        run(self.backbone.watch, WatchWork(images, min(images, state.watched)))
        state.watched = images
        if step.adaptive:
            interval = self.caching.interval
            too_old = interval > 0 and step.index - steps[-1] >= interval
            if not too_old:
                state.flag.post(gate.due().float())
                if not state.flag.wait()[0]:
                    state.encode_due |= step.encode
                    return step.cached(steps[-1], self.caching.residual)
        gate.computed()
        return step

    def _run_backbone(self, state: ImageState, step: Step, rows: int, images: int, run: _Runs) -> Step:
        """Embed the image and run the language model; returns the step, with `encode` saying whether the encoder ran."""
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
            groups=state.memory.groups(rows),
        )
        run(self.backbone.run, work)
        self._after_backbone(state, step, work)
        return step

    def _variant(self, state: ImageState, step: Step) -> Variant:
        """The network of a step; waits for a measurement under way and chooses the skipped layers from it."""
        task = TASK if step.pruned else None
        if step.measure or step.skip_from is None:
            return Variant(task)
        if state.measured is not None:
            scores = state.importance.wait()
            state.skipped = least_important(scores, self.layers.count(len(scores)))
            state.record.choices.append((state.measured, state.skipped))
            state.measured = None
        return Variant(task, state.skipped or ())

    def _load_prefix(self, state: ImageState, rows: int, variant: Variant, run: _Runs) -> None:
        """Make sure that memory holds a variant's prefix, of at least `rows` rows."""
        if not state.load_prefix(variant, rows):
            run(self.backbone.prefix, PrefixWork(rows, variant))
            state.prefix = (variant, rows)
            state.store_prefix()

    def _after_backbone(self, state: ImageState, step: Step, work: BackboneWork) -> None:
        """Record what later steps need to know."""
        if work.encode and state.memory.semantic is not None:
            state.semantic_rows = work.images
        state.encode_due &= not work.encode
        if work.measure:
            state.prefix = (work.variant, work.rows) if work.stores_prefix else None
            state.importance.post(state.memory.importance)
            state.measured = step.index
        skipped = state.record.skipped_tokens if work.routing is not None else 0
        layers = (len(self.parts.layers) - len(work.variant.skipped)) * work.rows
        state.record.routed["computed"] += layers * (state.memory.span - skipped)
        state.record.routed["skipped"] += layers * skipped

    def _run_head(self, state: ImageState, step: Step, rows: int, stepped: int, run: _Runs) -> None:
        """Blocks and final layer, or the final layer on a prediction of the blocks' output."""
        work = HeadWork(
            rows,
            update=state.head.update(step.index, rows) if step.keep_head else None,
            prediction=None if step.head else state.head.predict(step.index, rows),
            residual=self.caching.residual and step.keep_head if step.head else step.residual,
            stepped=stepped,
            groups=state.memory.groups(rows),
        )
        run(self.head.run, work)


class _Runs:
    """Runs the works of one evaluation and counts their launches, syncs and waits."""

    def __init__(self, state: ImageState):
        self._state = state
        self._waited = state.waits
        self._done: list[Counts] = []

    def __call__(self, execute: Callable[[ImageMemory, W], None], work: W) -> None:
        self._done.append(self._state.lease.graphs.run(execute, work))

    def counted(self, kind: str) -> StepCounts:
        launched, synced = (sum(counts) for counts in zip(*((c.launched, c.synced) for c in self._done), strict=True))
        return StepCounts(kind, launched, synced, self._state.waits - self._waited)


class AcceleratedStepper:
    """The steps of `showo2.sample` on an accelerated model: guidance and Euler step are part of an evaluation."""

    def __init__(
        self,
        engine: GenerationEngine,
        inputs: SampleInputs,
        working: Callable[[], AbstractContextManager[None]],
        unchanged: Callable[..., None],
    ):
        """Args:
        working: `Runner.working`, entered for each step, so that steps of different threads never overlap.
        unchanged: `Runner.check_unchanged`: after a callback, which may have changed the model, and after each step, in which
            another thread may have written to weights.
        """
        self.engine = engine
        self._working = working
        self._unchanged = unchanged
        self._seen = False
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
        asked = inputs.guidance_scale
        assert not isinstance(asked, tuple), "Handle.stepper has another stepper for scales of each image"
        self._scales = [at(i + 1, asked) if inputs.guided else 0.0 for i in range(self.evaluations)]
        times = inputs.times(state.plan.grid_points)
        scales = torch.tensor(self._scales, dtype=torch.float32, device=times.device)
        self.engine.load_times(state, times[:-1], scales, times[1:] - times[:-1])
        state.memory.latents[: state.images].copy_(inputs.noise)

    def step(self, index: int) -> None:
        with self._working():
            if self._seen:
                self._unchanged()
                self._seen = False
            self.engine.step(self.state)
            self._unchanged(weights_only=True)

    def velocity(self) -> Tensor:
        state = self.state
        rows = state.memory.velocity[: state.rows(state.record.ran[-1])]
        return guided_velocity(rows, self._scales[state.step - 1], self.inputs.noise.shape)

    def latents(self) -> Tensor:
        self._seen = True
        return self.state.memory.latents[: self.state.images].clone()

    def close(self) -> None:
        with self._working():
            self.engine.end(self.state)


def guided_velocity(rows: Tensor, scale: Scale, shape: torch.Size) -> Tensor:
    """Velocity rows of one or both guidance branches -> guided velocity, a new tensor of `shape`.

    Args:
        rows: [images or 2 * images, patches, patch * patch * channels]. shape: [images, channels, H, W].
    """
    velocity = unpatchify(rows, shape)
    return velocity.clone() if rows.shape[0] == shape[0] else guide(velocity, scale)
