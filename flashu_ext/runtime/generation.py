"""Generates images: runs every evaluation as its step plan says, with text computed once and dead work omitted.

An evaluation is two or three works (`work`) on an `ImageMemory`, and the bookkeeping on the host. Images that need the same
work at the same time run it together, whenever they began: every row's bits are its own. Two values are read back from
the device, both here: the adaptive cache's flag, and the layer importance after a measurement. The head is launched
before the host waits for the latter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..models.checks import made_by
from ..models.sampling import DrawInputs, TaylorSeer
from ..models.velocity import Scale, guide, guided, unpatchify
from ..planning.config import FlashUConfig
from ..planning.groups import HeadCaching, LayerSkip
from ..planning.schedule import Step, StepPlan, least_important
from .backbone import TASK, Backbone
from .counting import Counts
from .graphs import GraphCapture
from .head import Head
from .history import HeadHistory
from .image_memory import ImageMemory, ImageShape, joined
from .memory import MemoryPool
from .modules.attention import RowGeometry
from .network import Network
from .state import ImageRecord, ImageState, StepCounts
from .work import BackboneWork, EarlyWork, HeadWork, PrefixWork, Variant, WatchWork

__all__ = ["TASK", "AcceleratedStepper", "GenerationEngine"]

W = TypeVar("W", EarlyWork, BackboneWork, HeadWork)

IDLE_IMAGE_MEMORIES = 2
"""Memories pooled between images: for the current batch size, and for the smaller last batch of a list."""


class GenerationEngine:
    """Evaluates the velocity of images in progress. Each image has its own `ImageState`; memory comes from one pool."""

    def __init__(self, network: Network, config: FlashUConfig, capture: GraphCapture):
        self.network = network.at(TASK, "embed")
        self.parts = self.network.parts
        self.config = config
        self.invariant = config.execution.invariant_on(network.parts.device.type)
        self.head = Head(network)
        self.backbone = Backbone(network, self.head)
        self.capture = capture
        self.pool: MemoryPool[ImageMemory] = MemoryPool(capture, IDLE_IMAGE_MEMORIES)

    # ---- an image begins and ends

    def begin(
        self,
        steps: int | None,
        text_tokens: Tensor,
        modality_positions: Tensor,
        guidance_scale: Scale,
        latent_size: tuple[int, int],
        config: FlashUConfig | None = None,
        inputs: DrawInputs | None = None,
        adapter: str | None = None,
    ) -> list[ImageState]:
        """Set up a batch of images: a state for each, so that none depends on its neighbours, or where the config is not
        `batch_invariant` one state for all.

        Args:
            steps: grid points; None takes the config's, or 50.
            text_tokens: int64 [rows, length].
            modality_positions: int64 [rows, 1, 2], (offset, length) of each row's span.
            guidance_scale: the caller's; above 0 the second half of the rows is unconditional.
            latent_size: (H, W) of the latents.
            config: of these images; None: the model's.
            inputs: of a family's sampler, which say more: branches, what is seen, guidance.
            adapter: the LoRA adapter that draws (`Network.check_adapter`); None: what is active.
        """
        config = self.config if config is None else config
        told = None if inputs is None else inputs.seen
        seen = tuple(modality_positions[:, 0, 0].tolist()) if told is None else tuple(told)
        images = text_tokens.shape[0] // _branches(guidance_scale, inputs)
        if not self.invariant:
            own = (text_tokens, modality_positions, guidance_scale, latent_size, config, seen)
            return [self._begin(steps, *own, inputs, adapter)]
        scales = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale,) * images
        states: list[ImageState] = []
        try:
            for image, scale in enumerate(scales):
                rows = slice(image, None, images)  # the image's row in every branch
                tokens, positions = text_tokens[rows], modality_positions[rows]
                own = (tokens, positions, scale, latent_size, config, seen[rows])
                states.append(self._begin(steps, *own, inputs, adapter))
        except BaseException:
            for state in states:
                self.end(state)
            raise
        return states

    def _begin(
        self,
        steps: int | None,
        text_tokens: Tensor,
        modality_positions: Tensor,
        guidance_scale: Scale,
        latent_size: tuple[int, int],
        config: FlashUConfig,
        seen: tuple[int, ...],
        inputs: DrawInputs | None,
        adapter: str | None,
    ) -> ImageState:
        parts = self.parts
        rows, length = text_tokens.shape
        patches = parts.sizes(latent_size).patches
        steps = steps or config.steps or parts.grid_points
        planned = config.replace(skip_unit_guidance=True) if parts.drops_unit_guidance else config
        scale = None if isinstance(guidance_scale, tuple) else guidance_scale
        guides = None if inputs is None else inputs.guides(steps, config)
        computes, restarts = None, 0
        if inputs is not None and (seer := inputs.forecast) is not None:
            config, planned = (_predicting(each, seer) for each in (config, planned))
            computes, restarts = [seer.computes(index) for index in range(steps - 1)], seer.first_enhance - 1
        plan = StepPlan.build(planned, steps, len(parts.layers), scale, patches, guides, computes)
        geometry = RowGeometry(seen, int(modality_positions[0, 0, 1]))
        branches = _branches(guidance_scale, inputs)
        images = rows // branches
        shape = ImageShape(rows, images, latent_size, length, geometry.longest, max(len(plan), rows))
        lease = self._acquire(shape, config)
        try:
            with self.network.rows.of((adapter, images)):
                more = () if inputs is None else (inputs.context(parts), _trailing(inputs, parts))
            lease.memory.load(parts, text_tokens, modality_positions, geometry, *more)
        except BaseException:
            self.pool.release(lease)
            raise
        caching = config.head or HeadCaching()
        head = HeadHistory(caching.order, restarts=caching.adaptive, upto=restarts)
        tail = length - int(modality_positions[:, 0].sum(dim=1).min())
        memory = lease.memory
        record = ImageRecord(plan, branches, geometry, length, tail, memory.router.skipped, memory.nbytes())
        formula = inputs.formula if inputs is not None and branches > 1 else None
        return ImageState(lease, record, config, caching, head, adapter, formula=formula, guides=guides)

    def _acquire(self, shape: ImageShape, config: FlashUConfig) -> Any:
        fixed = self.pool.fixed
        return self.pool.acquire(
            lambda memory: memory.shape.holds(shape) and memory.config == config,
            lambda: ImageMemory(self.parts, config, shape.rounded() if fixed else shape, fixed),
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
        self._fill_times(state, t)

    def _fill_times(self, state: ImageState, t: Tensor) -> None:
        parts, memory, count = self.parts, state.memory, t.shape[0]
        with self.network.rows.of((state.adapter, count)):
            time = made_by("embed_time", parts.embed_time(t), count, None)
            memory.time_token[:count] = made_by("time_token", parts.time_token(time), count, parts.hidden)
            memory.modulation[:count] = made_by("modulation", parts.modulation(time), count, memory.sizes.modulation)

    def end(self, state: ImageState) -> None:
        """Release a finished or abandoned image's memory; its record stays."""
        state.record.memory = state.nbytes()
        self.pool.release(state.lease)

    # ---- one evaluation

    def step(self, states: Sequence[ImageState]) -> None:
        """Run the next evaluation, with its Euler step, of images whose times are loaded."""
        self._evaluate([_Evaluation(state, state.images) for state in states], stepped=True)

    def velocity_at(
        self, states: Sequence[ImageState], latents: Sequence[Tensor], times: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run the next evaluation at given latents and times.

        Args:
            latents: for each state [images, channels, H, W], or [rows, ...] where the two guidance branches have separate
                latents.
            times: for each state fp32 [images or rows].

        Returns:
            Velocity rows before guidance of each state, [rows, patches, patch * patch * channels]; [images, ...] where the
            step plan runs the conditional branch only. Overwritten by the next evaluation.
        """
        for state, own, t in zip(states, latents, times, strict=True):
            memory, count = state.memory, own.shape[0]
            memory.latents[:count] = own
            memory.time_rows.copy_(torch.arange(memory.shape.rows, device=own.device) % count)
            self._fill_times(state, t.to(torch.float32))
        evaluations = [_Evaluation(state, own.shape[0]) for state, own in zip(states, latents, strict=True)]
        self._evaluate(evaluations, stepped=False)
        return [each.state.memory.velocity[: each.rows] for each in evaluations]

    def _evaluate(self, evaluations: Sequence[_Evaluation], stepped: bool) -> None:
        for each in evaluations:
            self.pool.check(each.state.lease, "this image was being generated")
        for each in evaluations:
            self._decide(each)
        early = [
            (each, EarlyWork(each.rows, each.images, adapter=each.state.adapter))
            for each in evaluations
            if each.state.memory.early is not None
        ]
        self._run_together(self.backbone.early, early)
        backbones = [(each, self._plan_backbone(each)) for each in evaluations if each.step.backbone]
        self._run_together(self.backbone.run, backbones)
        for each, work in backbones:
            self._after_backbone(each, work)
        self._run_together(self.head.run, [(each, self._plan_head(each, stepped)) for each in evaluations])
        for each in evaluations:
            each.record()

    def _run_together(
        self, execute: Callable[[Sequence[ImageMemory], Sequence[W]], None], works: Sequence[tuple[_Evaluation, W]]
    ) -> None:
        """Execute works; those that agree in what they compute in one call."""
        groups: dict[Hashable, list[tuple[_Evaluation, W]]] = {}
        for each, work in works:
            alone = work.alone or self.capture.active  # a graph is of one memory
            key = id(each) if alone else (work.computes, each.state.memory.shape.latent_size)
            groups.setdefault(key, []).append((each, work))
        for group in groups.values():
            if len(group) == 1:
                group[0][0].run(lambda memory, work: execute([memory], [work]), group[0][1])
                continue
            memories = [each.state.memory for each, _ in group]
            counts = self.capture.run_together(execute, memories, tuple(work for _, work in group))
            for each, _ in group:
                each.done.append(counts)

    def _decide(self, each: _Evaluation) -> None:
        """The adaptive cache's decision whether the head is cached: one for each state.

        The drift is summed and compared on the device. The host must read the resulting flag, for it decides what to launch.
        """
        state, step, images, caching = each.state, each.step, each.images, each.state.caching
        if not caching.adaptive or not (step.adaptive or step.keep_head):
            return
        gate, steps = state.memory.gate, state.head.steps
        each.run(self.backbone.watch, WatchWork(images, min(images, state.watched), adapter=state.adapter))
        state.watched = images
        if step.adaptive:
            too_old = caching.interval > 0 and step.index - steps[-1] >= caching.interval
            if not too_old:
                state.flag.post(gate.due().float())
                if not state.flag.wait()[0]:
                    state.encode_due |= step.encode
                    each.step = step.cached(steps[-1], caching.residual)
                    return
        gate.computed()

    def _plan_backbone(self, each: _Evaluation) -> BackboneWork:
        """What embeds the image and runs the language model. Decides whether the encoder runs, and computes the prefix."""
        state = each.state
        encode = each.step.encode or state.encode_due or state.semantic_rows < each.images
        each.step = step = dataclasses.replace(each.step, encode=encode)
        variant = self._variant(state, step)
        if not step.measure or state.memory.context is not None:
            self._load_prefix(each, variant)
        return BackboneWork(
            each.rows,
            each.images,
            encode,
            variant,
            step.measure,
            stores_prefix=step.measure and step.head and state.memory.context is None,
            token_slot=state.tokens.measure(step.index) if step.measure_tokens else None,
            routing=state.tokens.routing(step.tokens_from, step.index) if step.tokens_from else None,
            skipped_tokens=state.record.skipped_tokens if step.tokens_from else 0,
            groups=state.memory.groups(each.rows),
            adapter=state.adapter,
        )

    def _variant(self, state: ImageState, step: Step) -> Variant:
        """The network of a step; waits for a measurement under way and chooses the skipped layers from it."""
        task = TASK if step.pruned else None
        if step.measure or step.skip_from is None:
            return Variant(task)
        if state.measured is not None:
            scores = state.importance.wait()
            layers = state.config.layers or LayerSkip(0.0, 0)
            state.skipped = least_important(scores, layers.count(len(scores)))
            state.record.choices.append((state.measured, state.skipped))
            state.measured = None
        return Variant(task, state.skipped or ())

    def _load_prefix(self, each: _Evaluation, variant: Variant) -> None:
        """Make sure that memory holds a variant's prefix, of as many rows as run."""
        if not each.state.load_prefix(variant, each.rows):
            context, adapter = each.state.memory.context, each.state.adapter
            if context is None:
                each.run(self.backbone.prefix, PrefixWork(each.rows, variant, adapter=adapter))
            else:  # its tensors come with the image, so it is in no graph
                lengths = tuple(tuple(one.embeds.shape[1] for one in row) for row in context)
                works = (PrefixWork(each.rows, variant, lengths, adapter=adapter),)
                each.done.append(self.capture.run_together(self.backbone.context, (each.state.memory,), works))
            each.state.prefix = (variant, each.rows)
            each.state.store_prefix()

    def _after_backbone(self, each: _Evaluation, work: BackboneWork) -> None:
        """Record what later steps need to know."""
        state = each.state
        if work.encode and state.memory.features is not None:
            state.semantic_rows = work.images
        state.encode_due &= not work.encode
        if work.measure:
            if state.memory.context is None:
                state.prefix = (work.variant, work.rows) if work.stores_prefix else None
            state.importance.post(state.memory.importance)
            state.measured = each.step.index
        layers = (len(self.parts.layers) - len(work.variant.skipped)) * work.rows
        state.record.routed["computed"] += layers * (state.memory.span - work.skipped_tokens)
        state.record.routed["skipped"] += layers * work.skipped_tokens

    def _plan_head(self, each: _Evaluation, stepped: bool) -> HeadWork:
        """Blocks and final layer, or the final layer on a prediction of the blocks' output."""
        state, step = each.state, each.step
        return HeadWork(
            each.rows,
            update=state.head.update(step.index, each.rows) if step.keep_head else None,
            prediction=None if step.head else state.head.predict(step.index, each.rows),
            residual=state.caching.residual and step.keep_head if step.head else step.residual,
            stepped=state.images if stepped else 0,
            formula=state.formula_at(step),
            groups=state.memory.groups(each.rows),
            adapter=state.adapter,
        )


def _trailing(inputs: DrawInputs, parts: Any) -> Tensor | None:
    """The embeddings of the tokens behind the patches."""
    return made_by("DrawInputs.trailing", inputs.trailing(parts), 1, parts.trail, parts.hidden) if parts.trail else None


def _branches(guidance_scale: Scale, inputs: DrawInputs | None) -> int:
    """Rows of an image."""
    if inputs is not None:
        return inputs.branches
    return 2 if guided(guidance_scale) else 1


def _predicting(config: FlashUConfig, seer: TaylorSeer) -> FlashUConfig:
    """A config whose head cache is TaylorSeer's.

    Raises:
        ValueError: it has one of its own, or skips layers, which are measured in evaluations that may be predicted.
    """
    if config.head is not None and config.head.approximates:
        raise ValueError(f"taylorseer: expected None with a config that caches the head, got one with {config.head}")
    if config.layers is not None and config.layers.ratio > 0:
        raise ValueError(f"taylorseer: expected None with a config that skips layers, got one with {config.layers}")
    return config.replace(head_cache_interval=seer.fresh_threshold, head_forecast_order=seer.max_order)


class _Evaluation:
    """One evaluation of a state, under way.

    Attributes:
        step: as planned, then as it runs.
        rows, images: of the state, that run.
        done: launches and syncs of its works.
    """

    def __init__(self, state: ImageState, latents: int):
        """latents: how many of the state's latents are in use."""
        self.state = state
        self.step = state.plan.at(state.step + 1)
        self.rows = state.rows(self.step)
        self.images = min(latents, self.rows)
        self.done: list[Counts] = []
        self._waited = state.waits

    def run(self, execute: Callable[[ImageMemory, Any], None], work: Any) -> None:
        self.done.append(self.state.lease.graphs.run(execute, work))

    def record(self) -> None:
        launched, synced = (sum(counts) for counts in zip(*((c.launched, c.synced) for c in self.done), strict=True))
        record = self.state.record
        record.ran.append(self.step)
        record.counts.append(StepCounts(self.step.kind, launched, synced, self.state.waits - self._waited))


class AcceleratedStepper:
    """The steps of a family's `sample` on an accelerated model: guidance and Euler step are part of an evaluation."""

    def __init__(
        self,
        engine: GenerationEngine,
        inputs: DrawInputs,
        working: Callable[[], AbstractContextManager[None]],
        unchanged: Callable[..., None],
        config: FlashUConfig | None = None,
        adapter: str | None = None,
    ):
        """Args:
        working: `Runner.working`, entered for each step, so that steps of different threads never overlap.
        unchanged: `Runner.check_unchanged`: after a callback, which may have changed the model, and after each step, in which
            another thread may have written to weights.
        config: of these images; None: the model's.
        adapter: see `GenerationEngine.begin`.
        """
        self.engine = engine
        self._working = working
        self._unchanged = unchanged
        self._seen = False
        self.inputs = inputs
        height, width = inputs.noise.shape[2:]
        size = (height, width)
        self.states = engine.begin(
            inputs.steps, inputs.tokens, inputs.positions, inputs.guidance_scale, size, config, inputs, adapter
        )
        self.evaluations = len(self.states[0].plan)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        inputs = self.inputs
        points = self.states[0].plan.grid_points
        times, dt = (made_by("DrawInputs.schedule", each, points - 1) for each in inputs.schedule(points))
        asked = inputs.guidance_scale
        self._scales = []
        images = inputs.noise.split([state.images for state in self.states])
        for index, (state, noise) in enumerate(zip(self.states, images, strict=True)):
            own = asked[index] if isinstance(asked, tuple) else asked
            scales = [state.config.guidance_at(i + 1, own) if inputs.guided else 0.0 for i in range(self.evaluations)]
            self._scales.append(scales)
            on_device = torch.tensor(scales, dtype=torch.float32, device=times.device)
            self.engine.load_times(state, times, on_device, dt)
            state.memory.latents[: state.images].copy_(noise)

    def step(self, index: int) -> None:
        with self._working():
            self.check_memory()
            if self._seen:
                self._unchanged()
                self._seen = False
            self.engine.step(self.states)
            self._unchanged(weights_only=True)

    def check_memory(self) -> None:
        """Raise RuntimeError where the memory of these images was taken away."""
        if not self.states:
            raise RuntimeError("image: it has ended")
        for state in self.states:
            self.engine.pool.check(state.lease, "this image was being generated")

    def velocity(self) -> Tensor:
        shape = self.inputs.noise.shape
        return joined(
            [
                guided_velocity(
                    state.memory.velocity[: state.images if state.formula else state.rows(state.record.ran[-1])],
                    scales[state.step - 1],
                    torch.Size((state.images, *shape[1:])),
                )
                for state, scales in zip(self.states, self._scales, strict=True)
            ]
        )

    def latents(self) -> Tensor:
        self._seen = True
        return torch.cat([state.memory.latents[: state.images] for state in self.states])

    def close(self) -> None:
        with self._working():
            for state in self.states:
                self.engine.end(state)
        # An error's traceback may hold this object for long; it shall not hold the memory.
        self.states = []


def guided_velocity(rows: Tensor, scale: Scale, shape: torch.Size) -> Tensor:
    """Velocity rows of one or both guidance branches -> guided velocity, a new tensor of `shape`.

    Args:
        rows: [images or 2 * images, patches, patch * patch * channels]. shape: [images, channels, H, W].
    """
    velocity = unpatchify(rows, shape)
    return velocity.clone() if rows.shape[0] == shape[0] else guide(velocity, scale)
