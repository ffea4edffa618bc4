"""Installs the runtime in one model instance, returns a handle, and removes everything again.

Only the instance is changed: its FFN modules are replaced by ones that hold the same weight objects, whose neurons are
reordered in place, and two methods are shadowed. No class is patched, and there is no global state.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType

import torch
from torch import nn

from ..models.accelerated import HANDLE, handle_of
from ..models.parts import Showo2Parts
from ..ops.kernel_sets import resolve
from ..planning.config import FlashUConfig
from ..planning.groups import Answers
from ..planning.neurons import NeuronLayout
from ..planning.plan import TaskPlan
from .generation import TASK as GENERATION
from .modules.ffn import GatheredFFN
from .runner import Runner
from .state import ImageRecord
from .summary import Summary
from .upstream import METHODS, UpstreamMethods

__all__ = ["Handle", "accelerate"]


class Handle:
    """An accelerated model's handle: `summary()`, `remove()`, and a context manager that removes at its end."""

    def __init__(self, runner: Runner, plan: TaskPlan | None, layouts: list[NeuronLayout] | None):
        self.runner = runner
        self.config = runner.config
        self.plan = plan
        self.model = runner.parts.model
        self._layouts = layouts
        self._original_ffns: list[nn.Module] = []
        self._shadowed: dict[str, object] = {}
        self._upstream = UpstreamMethods(runner, {name: getattr(self.model, name) for name in METHODS})
        self._active = False

    # ---- install and remove

    def _install(self) -> None:
        try:
            for index, layer in enumerate(self.runner.parts.layers):
                layout = self._layouts[index] if self._layouts else None
                original = layer.mlp
                replacement = GatheredFFN(original, self.runner.kernels, layout)
                if layout is not None:
                    _permute(replacement, layout.permutation)
                self._original_ffns.append(original)
                layer.mlp = replacement
            for name in METHODS:
                if name in self.model.__dict__:
                    self._shadowed[name] = self.model.__dict__[name]
                self.model.__dict__[name] = getattr(self._upstream, name)
            self.model.__dict__[HANDLE] = self
            self._active = True
        except BaseException:
            self._uninstall()
            raise

    def _uninstall(self) -> None:
        self.model.__dict__.pop(HANDLE, None)
        for name in METHODS:
            method = self.model.__dict__.get(name)
            if getattr(method, "__self__", None) is self._upstream:
                del self.model.__dict__[name]
            if name in self._shadowed:
                self.model.__dict__[name] = self._shadowed.pop(name)
        for layer, original in zip(self.runner.parts.layers, self._original_ffns, strict=False):
            replacement = layer.mlp
            layer.mlp = original
            if isinstance(replacement, GatheredFFN) and replacement.layout is not None:
                _permute(replacement, replacement.layout.inverse)
        self._original_ffns.clear()

    def remove(self) -> None:
        """Restore the model bitwise, with the same module and parameter objects. A second call does nothing."""
        if self._active:
            self._active = False
            self._upstream.reset()
            self.runner.reset()
            self._uninstall()

    @property
    def active(self) -> bool:
        """Whether the model is still accelerated through this handle."""
        return self._active

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # ---- summary

    def summary(self) -> Summary:
        """What the accelerated model is and did; see `Summary`."""
        runner, parts = self.runner, self.runner.parts
        image = runner.last_image
        done = image.ran if image else []
        answers = runner.understanding
        tokens = {"prefilled": answers.prefilled, "reused": answers.reused}
        tokens |= {"visual": answers.visual, "visual kept": answers.visual_kept}
        if image is not None:
            geometry = image.geometry
            tail = image.length - min(geometry.prefix) - geometry.span
            tokens |= {"prefix": geometry.longest, "span": geometry.span, "tail": tail}
        reasons = Counter(f"{name}: {why}" for name, why in runner.kernels.fallbacks.items()) + runner.fallbacks
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
            routed=dict(image.routed) if image and self.config.tokens and self.config.tokens.on else {},
            layers_skipped=tuple(image.choices) if image else (),
            answer_layers_skipped=answers.skipped,
            neurons=dict.fromkeys(self.plan.tasks, self.plan.kept_neurons) if self.plan and self._layouts else {},
            intermediate=int(parts.layers[0].mlp.gate_proj.weight.shape[0]),
            tokens=tokens,
            weight_bytes=sum(parameter.nbytes for parameter in self.model.parameters()),
            extra_weight_bytes=sum(layout.permutation.nbytes for layout in self._layouts or ()),
            cache_bytes=sum(held.values()),
            memory=held,
            last_image_memory=dict(image.memory) if image else {},
            launches=_launches(image) if image else {},
            syncs=sum(counts.syncs for counts in image.counts) if image else 0,
            host_waits=sum(counts.waits for counts in image.counts) if image else 0,
            step_runner=f"eager: {why_not}" if (why_not := capture.why_not or capture.failure) else "graphs",
            graphs=_graphs(runner),
            kernels=dict(runner.kernels.chosen),
            fallbacks=dict(reasons),
        )

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        return (
            f"Handle({type(self.model).__name__}, {state}, approximates={list(self.config.approximates) or 'nothing'})"
        )


def accelerate(model: nn.Module, config: FlashUConfig | None = None, plan: TaskPlan | None = None) -> Handle:
    """Accelerate a Show-o2 model in place: ours, or an upstream `Showo2Qwen2_5` instance.

    Args:
        model: the model; its weights stay where they are.
        config: the settings; None is `FlashUConfig.exact()`.
        plan: neuron sets, required where `config.ffn` prunes neurons. A task without a set runs on all neurons.

    Returns:
        A handle; `handle.remove()` or leaving its `with` block restores the model.

    Raises:
        TypeError: not a Show-o2 model, or config or plan of another type.
        ValueError: pruning neurons without a plan, or with a plan for another model, ratio or multiple (where ratios differ per
            layer, `plan.ratio` is their mean); pruning tokens at a layer that the model does not have.
        RuntimeError: the model is already accelerated.
    In each case the model is unchanged.
    """
    config = FlashUConfig.exact() if config is None else config
    if not isinstance(config, FlashUConfig):
        raise TypeError(f"config: expected a FlashUConfig, got {type(config).__name__}")
    if plan is not None and not isinstance(plan, TaskPlan):
        raise TypeError(f"plan: expected a TaskPlan, got {type(plan).__name__}")
    parts = Showo2Parts.from_model(model)
    if handle_of(model) is not None:
        raise RuntimeError("model: already accelerated; call handle.remove() first")
    layers = len(parts.layers)
    answers = config.answers or Answers()
    if answers.token_prune_ratio > 0 and answers.token_prune_layer >= layers:
        raise ValueError(
            f"config.token_prune_layer: expected a layer in [0, {layers}) of this model, got {answers.token_prune_layer}"
        )
    layouts = _layouts(model, config, plan)
    kernels = resolve(config, parts.device, parts.dtype)
    handle = Handle(Runner(parts, config, kernels), plan, layouts)
    handle._install()
    return handle


def _launches(image: ImageRecord) -> dict[str, int]:
    """Launches of the last evaluation of every kind: the first one also computes the prompt's keys and values."""
    return {counts.kind: counts.launches for counts in image.counts}


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


@torch.no_grad()
def _permute(ffn: GatheredFFN, order: torch.Tensor) -> None:
    """Reorder an FFN's neurons in place. All copies of one layer are made before any write, so running out of memory leaves
    the weights unchanged."""
    index = order.to(ffn.gate_proj.weight.device).long()
    matrices = ((ffn.gate_proj.weight, 0), (ffn.up_proj.weight, 0), (ffn.down_proj.weight, 1))
    permuted = [weight.index_select(dim, index) for weight, dim in matrices]
    for (weight, _), values in zip(matrices, permuted, strict=True):
        weight.copy_(values)
