"""Accelerates one model instance, returns a handle, and restores the model.

Only the instance is changed: a few methods are shadowed, and the neurons of its FFNs may be reordered in place. No module is
replaced, no class is patched, and there is no global state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, NoReturn

from torch import nn

from ..models.accelerated import HANDLE, handle_of, unwrapped
from ..models.adapter import adapter_of
from ..models.int8 import is_int8, stored_bytes
from ..models.lora import adapter_layers, adapters_of, is_lora
from ..models.sampling import DrawInputs, Stepper
from ..planning.config import FlashUConfig
from ..planning.decoders import FAMILIES, find
from ..planning.neurons import NeuronLayout
from ..planning.plan import TaskPlan
from ..planning.schedule import Step
from .forked import ForkedLock
from .generation import TASK as GENERATION
from .generation import AcceleratedStepper
from .kernel_sets import runs
from .overrides import Overrides
from .runner import Runner
from .state import ImageRecord
from .summary import Summary

__all__ = ["Handle", "accelerate"]

_INSTALLING = ForkedLock()
"""Held while a model's methods are shadowed or given back: of two threads that accelerate one model, one is first."""


class Handle:
    """An accelerated model's handle: `summary()`, `editing()`, `remove()`, and a context manager that removes at its end."""

    def __init__(self, runner: Runner, plan: TaskPlan | None):
        self.runner = runner
        self.config = runner.config
        self.plan = plan
        self.model = runner.model
        names = runner.parts.methods
        module = FAMILIES[runner.parts.family].upstream if names else None
        originals = {name: find(self.model, name) for name in names}
        self._upstream: Any = None if module is None else import_module(module).UpstreamMethods(runner, originals)
        attributes: dict[str, dict[str, Any]] = {"": {HANDLE: self}}
        for path in names:
            owner, _, name = path.rpartition(".")
            attributes.setdefault(owner, {})[name] = getattr(self._upstream, path.replace(".", "_"))
        self._overrides = {
            owner: Overrides(find(self.model, owner) if owner else self.model, own) for owner, own in attributes.items()
        }

    def remove(self) -> None:
        """Restore the model bitwise, with the same module and parameter objects; what was loaded or edited meanwhile stays.

        A second call does nothing, except after an interrupted one, which it completes.

        Raises:
            EditedWeightsError: weights were edited outside `editing()`, and this error was not raised yet. The model is
                restored, but those values are on other neurons than meant.
        """
        with self.runner.lock.held:
            if not self.active:
                return
            try:
                self.runner.tell_once()
            finally:
                self._restore()

    def _restore(self) -> None:
        self.runner.suspended = "remove() was interrupted; call it again"
        self.runner.reset()
        self.runner.restore()
        with _INSTALLING.held:
            for each in self._overrides.values():
                each.remove()
        self.runner.active = False

    @contextlib.contextmanager
    def editing(self) -> Iterator[nn.Module]:
        """Inside, the weights are in the model's own order, and may be written to; the model neither draws nor answers.

        At the end they are taken as they are then: the plan's neurons are pruned, and nothing computed from earlier weights
        is used again.

        Raises:
            EditedWeightsError: weights were already edited outside, and this error was not raised yet. Another attempt
                enters, with these values where they are.
            RuntimeError: the handle was removed, or this is inside `editing()` already.
        """
        runner = self.runner
        with runner.lock.held:
            if not self.active:
                raise RuntimeError("handle: its model is no longer accelerated")
            if runner.suspended is not None:
                raise RuntimeError(f"model: {runner.suspended}")
            runner.tell_once()
            try:
                runner.suspended = "inside handle.editing(); leave it first"
                runner.reset()
                runner.restore()
                yield self.model
            finally:
                if self.active:
                    runner.suspended = None
                    runner.follow()

    @property
    def active(self) -> bool:
        """Whether the model is still accelerated through this handle."""
        return self.runner.active

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("handle: it belongs to one model and cannot be copied; a copy of the model is dense")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("handle: it belongs to one model and cannot be pickled; a pickled model is dense")

    def stepper(self, inputs: DrawInputs, config: FlashUConfig | None = None, adapter: str | None = None) -> Stepper:
        """The steps of a family's `sample`: each a call of the model's own drawing method where it has one and somebody has
        wrapped that since, or where images that share their state have guidance scales of their own.

        Args:
            config: of these images; None: the handle's.
            adapter: of peft's LoRA adapters the one that draws, '__base__' for none; None: what is active.

        Raises:
            ValueError: such calls cannot have another number of steps or another config than the model's, or this config
                needs other weights or kernels.
        """
        own_scales = isinstance(inputs.guidance_scale, tuple) and not self.runner.generation.invariant
        parts = self.runner.parts
        if not own_scales and (parts.evaluates is None or self._overrides[""].intact(parts.evaluates)):
            return self.runner.stepper(inputs, config, adapter)
        if adapter is not None:
            raise ValueError("adapter: expected None, with a scale for each image or a wrapped t2i_generate")
        if config is not None and config != self.config:
            raise ValueError("preset: expected None, with a scale for each image or a wrapped t2i_generate")
        planned = self.config.steps or parts.grid_points
        if self.config.approximates and inputs.steps not in (None, planned):
            raise ValueError(
                f"steps: expected None or {planned} (FlashUConfig.steps) with a scale for each image or a wrapped "
                f"t2i_generate, got {inputs.steps}"
            )
        return parts.dense(dataclasses.replace(inputs, steps=inputs.steps or planned))

    def step_together(self, steppers: Sequence[AcceleratedStepper]) -> list[Exception | None]:
        """Run the next evaluation of several images or batches, in one call where they need the same work.

        Returns:
            For each what went wrong, or None. One that cannot go on, because the model changed after it began, stops no other.
        """
        return self.runner.step_together(steppers)

    # ---- summary

    def summary(self) -> Summary:
        """What the accelerated model is and did; see `Summary`."""
        with self.runner.lock.held:  # between two steps of an image, and between two answers
            return self._summary()

    def _summary(self) -> Summary:
        runner = self.runner
        images, image = runner.last_images, runner.last_image
        done = image.ran if image else []
        answers = runner.understanding
        tokens = {"prefilled": answers.prefilled, "reused": answers.reused}
        tokens |= {"visual": answers.visual, "visual kept": answers.visual_kept}
        if image is not None:
            geometry = image.geometry
            longest = max(each.geometry.longest for each in images)
            tokens |= {"prefix": longest, "span": geometry.span, "tail": image.tail}
        kernels = runner.network.sets
        reasons = Counter(f"{name}: {why}" for name, why in kernels.fallbacks.items()) + runner.fallbacks
        for name, why in (runner.network.run_as_themselves() | runner.in_place).items():
            reasons[f"model.{name}: {why}"] += 1
        capture = runner.capture
        if capture.failure is not None:
            reasons[f"step graphs: {capture.failure}"] += 1
        held = runner.held_bytes()
        return Summary(
            steps=dict(Counter(image.kinds)) if image else {},
            backbone_evaluations=sum(step.backbone for step in done),
            head_evaluations=sum(step.head for step in done),
            encoder_evaluations=sum(step.encode for step in done),
            decided=_decided(image) if image and self.config.head and self.config.head.adaptive else {},
            routed=dict(sum((each.routed for each in images), Counter()))
            if image and self.config.tokens and self.config.tokens.on
            else {},
            layers_skipped=tuple(image.choices) if image else (),
            answer_layers_skipped=answers.skipped,
            neurons=dict.fromkeys(self.plan.tasks, self.plan.kept_neurons) if self.plan and runner.layouts else {},
            plan_unused=self.plan is not None and not runner.layouts,
            intermediate=runner.network.layers[0].ffn.neurons,
            tokens=tokens,
            weight_bytes=sum(map(stored_bytes, self.model.parameters())),
            int8_weights=sum(map(is_int8, self.model.parameters())),
            adapters=Counter(
                name for layer in adapter_layers(self.model).values() if is_lora(layer) for name in adapters_of(layer)
            ),
            extra_weight_bytes=sum(layout.permutation.nbytes for layout in runner.layouts or ()),
            cache_bytes=sum(held.values()),
            memory=held,
            last_image_memory=dict(sum((Counter(each.memory) for each in images), Counter())),
            launches=_launches(image) if image else {},
            evicted=getattr(self._upstream, "evicted", 0),
            syncs=sum(counts.syncs for counts in image.counts) if image else 0,
            host_waits=sum(counts.waits for counts in image.counts) if image else 0,
            step_runner=f"eager: {why_not}"
            if (why_not := capture.why_not or capture.failure or capture.disabled)
            else "graphs",
            graphs=_graphs(runner),
            kernels=kernels.chosen,
            ran=_ran(runner, done),
            fallbacks=dict(reasons),
        )

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return (
            f"Handle({type(self.model).__name__}, {state}, approximates={list(self.config.approximates) or 'nothing'})"
        )


def accelerate(model: nn.Module, config: FlashUConfig | None = None, plan: TaskPlan | None = None) -> Handle:
    """Accelerate a model of a known family in place: Show-o2, JanusFlow or BAGEL (ours, or an instance of upstream's own class),
    or a registered one (`register_family`).

    Args:
        model: the model, or what has it inside and whose model is accelerated: a torch.compile, DataParallel or
            DistributedDataParallel wrapper, or upstream's `InterleaveInferencer`.
        config: the settings; None is `FlashUConfig.exact()`.
        plan: neuron sets, required where `config.ffn` prunes neurons. A task without a set runs on all neurons. Where the
            config prunes none, as `exact()`, a plan is checked against the model and not used; `summary()` says so.

    Returns:
        A handle; `handle.remove()` or leaving its `with` block restores the model.

    Raises:
        TypeError: a model of no known family, config or plan of another type, or a module that the runtime would pass over (a
            hook on a layer, a subclass that overrides a method, ...); the message names it.
        ValueError: pruning neurons without a plan, or with a plan for another model, ratio or multiple (where ratios differ per
            layer, `plan.ratio` is their mean); pruning tokens at a layer that the model does not have.
        KernelUnavailableError: a kernel that the config asks for, or batch invariance, cannot be had
            (`flashu_ext.kernel_sets`).
        RuntimeError: the model is already accelerated.
    In each case, and after an interrupt, the model is unchanged.
    """
    config = FlashUConfig.exact() if config is None else config
    if not isinstance(config, FlashUConfig):
        raise TypeError(f"config: expected a FlashUConfig, got {type(config).__name__}")
    if plan is not None and not isinstance(plan, TaskPlan):
        raise TypeError(f"plan: expected a TaskPlan, got {type(plan).__name__}")
    begun: list[Handle] = []
    try:
        with _INSTALLING.held:
            return _accelerate(unwrapped(model), config, plan, begun)
    except BaseException:
        for handle in begun:
            with handle.runner.lock.held:
                handle._restore()
        raise


def _accelerate(model: nn.Module, config: FlashUConfig, plan: TaskPlan | None, begun: list[Handle]) -> Handle:
    """begun: receives the handle before it changes the model."""
    parts = adapter_of(model)
    if handle_of(model) is not None:
        raise RuntimeError("model: already accelerated; call handle.remove() first")
    parts.check_config(config)
    for idle in config.idle:
        warnings.warn(f"FlashUConfig: {idle}", stacklevel=3)
    for path in parts.methods:
        owner, _, name = path.rpartition(".")
        if name in vars(find(model, owner) if owner else model):
            raise TypeError(f"model.{path}: expected the class's method, got one that is set on this instance")
    runner = Runner(model, config, _layouts(model, config, plan))
    handle = Handle(runner, plan)
    begun.append(handle)
    with runner.lock.held:  # another thread that finds the handle waits until it works
        for each in handle._overrides.values():
            each.install()
        runner.follow()
        return handle


def _launches(image: ImageRecord) -> dict[str, int]:
    """Launches of the last evaluation of every kind: the first one also computes the prompt's keys and values."""
    return {counts.kind: counts.launches for counts in image.counts}


def _ran(runner: Runner, done: Sequence[Step]) -> dict[str, dict[str, str]]:
    """The implementations of every phase that ran."""
    answers = runner.understanding
    phases = {
        ("generation", "embed"): bool(done),
        ("generation", "backbone"): any(step.backbone and not step.measure for step in done),
        ("generation", "head"): bool(done),
        ("generation", "measuring"): any(step.measure or step.measure_tokens for step in done),
        ("understanding", "embed"): answers.encoded > 0,
        ("understanding", "prefill"): answers.prefilled > 0,
        ("understanding", "decode"): answers.decoder.ran,
    }
    ran: dict[str, dict[str, str]] = {f"{task} {phase}": {} for (task, phase), yes in phases.items() if yes}
    for choice in runner.network.sets.choices:
        if phases[choice.use.task, choice.use.phase] and runs(choice.use, runner.parts):
            ran[f"{choice.use.task} {choice.use.phase}"][choice.use.op] = choice.implementation
    return ran


def _graphs(runner: Runner) -> dict[str, int]:
    caches = runner.generation.pool.graphs()
    return {
        "memories": len(caches),
        "captured": sum(each.captured for each in caches),
        "replays": sum(each.replayed for each in caches),
        "run eagerly": sum(each.eager for each in caches),
    }


def _decided(image: ImageRecord) -> dict[str, int]:
    """How adaptive evaluations were decided."""
    adaptive = [step for step in image.ran if image.plan.at(step.index).adaptive]
    computed = sum(step.head for step in adaptive)
    return {"computed": computed, "cached": len(adaptive) - computed}


def _layouts(model: nn.Module, config: FlashUConfig, plan: TaskPlan | None) -> list[NeuronLayout] | None:
    if plan is not None:
        plan.check_model(model)
    ffn = config.ffn
    if ffn is None or ffn.ratio == 0:
        return None
    if plan is None:
        raise ValueError(
            f"plan: FlashUConfig.ffn_prune_ratio is {ffn.ratio}, so a plan is needed for task {GENERATION!r} or "
            "'understanding'; make one with flashu_ext.calibrate(model, generation=..., understanding=...) or "
            "TaskPlan.from_scores(generation=...), or load one with TaskPlan.load(path, model=model)"
        )
    for name, wanted, made in (
        ("ffn_prune_ratio", ffn.ratio, plan.ratio),
        ("prune_multiple", ffn.multiple, plan.multiple),
    ):
        if wanted != made:
            raise ValueError(
                f"plan: made for {name} {made}, the config says {wanted}; use plan.with_ratio({ffn.ratio}, "
                f"{ffn.multiple}) or change the config"
            )
    return plan.layouts()
