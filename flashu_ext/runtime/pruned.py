"""The smallest step in: a decoder of any kind whose FFNs compute a task's neurons only. All else stays the model's."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.accelerated import handle_of, unwrapped
from ..models.known import why_not_ffn
from ..models.stamp import Stamp
from ..ops.kernel_sets import KernelSet, resolve
from ..planning.config import FlashUConfig
from ..planning.decoders import decoder_of
from ..planning.neurons import NeuronLayout
from ..planning.plan import TaskPlan
from .forked import ForkedLock
from .modules.ffn import FFN
from .overrides import Overrides

__all__ = ["PrunedFFNs", "prune_ffn"]


class PrunedFFNs:
    """A pruned decoder's handle, and a context manager that removes at its end.

    Attributes:
        model: the caller's.
        plan: the neuron sets.
        task: whose neurons are computed; None, or a task without a set: all.
    """

    def __init__(self, model: nn.Module, plan: TaskPlan, task: str | None):
        decoder = decoder_of(model)
        self.model, self.plan, self.task = model, plan, task
        names = {module: name for name, module in model.named_modules()}
        # Neurons are read where they lie: weights stay in the model's order, so whatever happens to them counts at once.
        self._ffns: dict[str, _Pruned] = {}
        for index, (ffn, layout) in enumerate(zip(decoder.ffns, plan.layouts(), strict=True)):
            if names[ffn] in self._ffns:
                raise ValueError(f"model: expected an FFN of its own in layer {index}, got that of {names[ffn]} again")
            self._ffns[names[ffn]] = _Pruned(self, ffn, layout.in_place())
        self._lock = ForkedLock()

    @property
    def fallbacks(self) -> dict[str, str]:
        """Path in the model -> why this FFN runs as itself, on all neurons: a hook, an adapter, a bias, other weights."""
        reasons = {name: each.follow().why_itself for name, each in self._ffns.items()}
        return {name: why for name, why in reasons.items() if why is not None}

    def remove(self) -> None:
        """Give the FFNs back. A second call does nothing."""
        with self._lock.held:
            for each in self._ffns.values():
                each.overrides.remove()

    def __enter__(self) -> PrunedFFNs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Pruned:
    """One FFN of a pruned decoder."""

    def __init__(self, of: PrunedFFNs, module: Any, layout: NeuronLayout):
        self._of, self._module, self._layout = of, module, layout
        self.overrides = Overrides(module, {"forward": functools.partial(_forward, self)})
        self._ffn: FFN | None = None
        self._stamp: Stamp

    def follow(self) -> FFN:
        """The FFN on the module as it is now."""
        if self._ffn is None or self._stamp.structure_changed() or self._stamp.moved():
            gate = self._module.gate_proj
            like = gate.weight if isinstance(getattr(gate, "weight", None), Tensor) else torch.empty(0)
            why = why_not_ffn(self._module, like, own=("forward",))
            layout = self._layout
            if why is None and gate.out_features != layout.intermediate:
                why = f"has {gate.out_features} neurons, the plan {layout.intermediate}"
            self._ffn = FFN(self._module, _kernels(like.device, like.dtype), why, None if why else layout)
            self._stamp = Stamp(self._module)
        return self._ffn

    def __call__(self, x: Tensor) -> Tensor:
        ffn = self.follow()
        needs_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(weight.requires_grad for weight in ffn.module.parameters())
        )
        if ffn.why_itself is not None or needs_gradient:
            return type(self._module).forward(self._module, x)
        return ffn(x, self._of.task)


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> KernelSet:
    return resolve(FlashUConfig.exact(), device, dtype).of("understanding", "prefill")


def _forward(pruned: _Pruned, x: Tensor) -> Tensor:
    return pruned(x)


def prune_ffn(model: nn.Module, plan: TaskPlan, task: str | None = None) -> PrunedFFNs:
    """Make the FFNs of any decoder (transformers' Qwen2, Qwen3, Llama, Mistral, or a unified model's) compute one task's neurons.

    Everything else of the model is as before, its `generate` too. Weights do not move, and nothing is copied. An FFN that the
    kernels do not know, or that changes later (a hook, an adapter, a quantizer), runs as itself on all neurons; `fallbacks` says
    why. Where gradients are wanted, FFNs run dense.

    Args:
        model: the model, or a wrapper of torch.compile or DataParallel.
        plan: neuron sets, of `flashu_ext.calibrate` with `TokenSample`s or of scores.
        task: whose neurons; None: the plan's only task. The handle's attribute `task` changes it between calls.

    Returns:
        A handle; `remove()` or leaving its `with` block gives the FFNs back.

    Raises:
        TypeError: not a decoder, or a plan of another type.
        ValueError: the plan is for another model, or has several tasks and none is named, or none of this name; or two layers
            share an FFN, which the plan prunes in two ways.
        RuntimeError: the model is accelerated or pruned already.
    """
    if not isinstance(plan, TaskPlan):
        raise TypeError(f"plan: expected a TaskPlan, got {type(plan).__name__}")
    model = unwrapped(model)
    plan.check_model(model)
    if task is None and len(plan.tasks) == 1:
        task = plan.tasks[0]
    if task not in plan.tasks:
        raise ValueError(f"task: expected one of the plan's, {list(plan.tasks)}, got {task!r}")
    if handle_of(model) is not None:
        raise RuntimeError("model: expected one that is not accelerated; call handle.remove() first")
    for ffn in decoder_of(model).ffns:
        if isinstance(vars(ffn).get("forward"), functools.partial) and vars(ffn)["forward"].func is _forward:
            raise RuntimeError("model: its FFNs are pruned already; call remove() of that handle first")
    handle = PrunedFFNs(model, plan, task)
    try:
        for each in handle._ffns.values():
            each.overrides.install()
    except BaseException:
        handle.remove()
        raise
    return handle
