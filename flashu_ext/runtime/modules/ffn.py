"""An FFN of the model as the runtime runs it: on the kernel, over a task's neurons, or as the module itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import ops
from ...models.adapter import out_features
from ...models.int8 import Int8, int8_of
from ...models.lora import Update, base_of, updates_of
from ...ops.kernel_sets import KernelSet
from ...ops.selection import Selection
from ...planning.neurons import NeuronLayout, ffn_weights
from .linear import add_product

__all__ = ["FFN"]


class FFN:
    """A SwiGLU FFN. The module stays where it is in the model; nothing is replaced.

    Attributes:
        module: the model's own, with gate_proj, up_proj and down_proj.
        why_itself: why the kernel does not compute this module, which is then called as it is, on all neurons; or None.
        why_in_place: why its neurons must stay where they are, or None.
    """

    def __init__(self, module: Any, kernels: KernelSet, why_itself: str | None, layout: NeuronLayout | None = None):
        """layout: the tasks' neurons, in the order in which the weights lie; None: every task uses all."""
        self.module = module
        self.why_itself = why_itself
        self.why_in_place: str | None = None
        self._kernels = kernels
        self._int8: list[Int8] = []
        self._updates: list[tuple[Update, ...]] = []
        self._selections: dict[str, Selection] = {}
        if why_itself is None:
            self._read(kernels)
        if layout is not None and self.why_itself is None:
            device = module.gate_proj.weight.device
            self._selections = {
                task: Selection.from_runs(runs, layout.intermediate, device) for task, runs in layout.runs.items()
            }

    def _read(self, kernels: KernelSet) -> None:
        """Adapters and int8 weights, for which there are kernels on the CPU only."""
        projections = (self.module.gate_proj, self.module.up_proj, self.module.down_proj)
        updates = [updates_of(each) for each in projections]
        self._updates = updates if any(updates) else []
        self._int8 = [own for each in projections if (own := int8_of(base_of(each).weight)) is not None]
        if any(base_of(each) is not each for each in projections):
            self.why_in_place = "it has LoRA adapters"
        if self._int8:
            self.why_in_place = "its weights are int8"
        if self._updates or self._int8:
            on_kernel = kernels.chosen["gathered_ffn"] == "flashu" and ffn_weights(self.module)[0].device.type == "cpu"
            self.why_itself = None if on_kernel else f"{self.why_in_place}, for which only the CPU's FFN kernel is"

    @property
    def neurons(self) -> int:
        return out_features(self.module.gate_proj)

    def over(self, layout: NeuronLayout | None) -> FFN:
        """The same FFN over the tasks' neurons of a layout."""
        return FFN(self.module, self._kernels, self.why_itself, layout)

    def __call__(self, x: Tensor, task: str | None = None, residual: Tensor | None = None) -> Tensor:
        """x [..., hidden] -> [..., hidden], plus `residual` of that shape where given.

        Args:
            task: whose neuron set to use; None or a task without a set uses all neurons.
        """
        if self.why_itself is not None:
            out = self.module(x)
            return out if residual is None else out + residual
        selection = self._selections.get(task) if task else None
        if self._int8:
            gate, up, down = ((own.values, own.scale) for own in self._int8)
            return ops.int8_ffn(x, *gate, *up, *down, residual=residual, selection=selection)
        if self._updates:
            return self._adapted(x, residual, selection)
        return self._kernels.gathered_ffn(x, *ffn_weights(self.module), residual=residual, selection=selection)

    def _adapted(self, x: Tensor, residual: Tensor | None, selection: Selection | None) -> Tensor:
        """With LoRA adapters, of which the selection takes rows of B in gate and up, and columns of A in down."""
        w_gate, w_up, w_down = ffn_weights(self.module)
        gate, up, down = self._updates
        added = {"gate_add": self._added(gate, x, selection), "up_add": self._added(up, x, selection)}
        h = ops.gathered_swiglu(x, w_gate, w_up, **added, selection=selection)
        y = ops.gathered_down(h, w_down, residual=residual, selection=selection)
        for update in down:
            low = ops.gathered_down(h.to(update.down.weight.dtype), update.down.weight, selection=selection)
            y = add_product(self._kernels, low * update.scaling, update.up.weight, y)
        return y.to(x.dtype)

    def _added(self, updates: tuple[Update, ...], x: Tensor, selection: Selection | None) -> Tensor | None:
        """What adapters add to gate or up, [..., n] in x's dtype; None for none."""
        total: Tensor | None = None
        for update in updates:
            low = self._kernels.linear(x.to(update.down.weight.dtype), update.down.weight)
            total = add_product(self._kernels, low * update.scaling, _rows(update.up.weight, selection), total)
        return None if total is None else total.to(x.dtype)


def _rows(weight: Tensor, selection: Selection | None) -> Tensor:
    """The rows of a selection's neurons."""
    if selection is None:
        return weight
    if selection.list is None:
        assert selection.runs is not None
        return weight[:0] if not selection.runs else weight.narrow(0, *selection.runs)
    return weight.index_select(0, selection.list)
