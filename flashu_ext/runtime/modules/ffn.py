"""An FFN of the model as the runtime runs it: on the kernel, over a task's neurons, or as the module itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import ops
from ...models.adapter import out_features
from ...models.int8 import Int8, int8_of
from ...models.lora import Update, base_of, updates_of
from ...ops.kernel_sets import KernelSet
from ...ops.selection import Selection
from ...planning.neurons import NeuronLayout, ffn_weights
from .adapters import AdapterRows, RowAdapters
from .linear import add_product

__all__ = ["FFN"]

Updates = tuple[tuple[Update, ...], ...]
"""What is added to gate, up and down."""


class FFN:
    """A SwiGLU FFN. The module stays where it is in the model; nothing is replaced.

    Attributes:
        module: the model's own, with gate_proj, up_proj and down_proj.
        why_itself: why the kernel does not compute this module, which is then called as it is, on all neurons; or None. Rows
            that name an adapter are computed all the same, where the kernel can.
        why_in_place: why its neurons must stay where they are, or None.
    """

    def __init__(
        self,
        module: Any,
        kernels: KernelSet,
        why_itself: str | None,
        layout: NeuronLayout | None = None,
        rows: RowAdapters | None = None,
        named: Sequence[str] = (),
    ):
        """Args:
        why_itself: of the module with what is active.
        layout: the tasks' neurons, in the order in which the weights lie; None: every task uses all.
        rows: the network's; None: all rows are of what is active.
        named: the adapters with which the kernel computes the module, whichever are active.
        """
        self.module = module
        self.why_itself = why_itself
        self.why_in_place: str | None = None
        self._own = kernels, why_itself, rows or RowAdapters(), tuple(named)
        self._kernels, _, self._rows, _ = self._own
        self._int8: list[Int8] = []
        self._updates: dict[str | None, Updates] = {}
        self._selections: dict[str, Selection] = {}
        if adapters := [*([None] if why_itself is None else []), *named]:
            self._read(kernels, adapters)
        self._beside = any(any(each) for each in self._updates.values())
        if layout is not None and self.computed:
            device = module.gate_proj.weight.device
            self._selections = {
                task: Selection.from_runs(runs, layout.intermediate, device) for task, runs in layout.runs.items()
            }

    def _read(self, kernels: KernelSet, adapters: Sequence[str | None]) -> None:
        """Adapters and int8 weights, for which there are kernels on the CPU only."""
        projections = (self.module.gate_proj, self.module.up_proj, self.module.down_proj)
        self._updates = {adapter: tuple(updates_of(each, adapter) for each in projections) for adapter in adapters}
        self._int8 = [own for each in projections if (own := int8_of(base_of(each).weight)) is not None]
        if any(base_of(each) is not each for each in projections):
            self.why_in_place = "it has LoRA adapters"
        if self._int8:
            self.why_in_place = "its weights are int8"
        if kernels.chosen["gathered_ffn"] == "flashu" and ffn_weights(self.module)[0].device.type == "cpu":
            return
        plain = {} if self._int8 else {name: own for name, own in self._updates.items() if not any(own)}
        if None in self._updates and None not in plain:
            self.why_itself = self._only_cpu()
        self._updates = plain

    def _only_cpu(self) -> str:
        return f"{self.why_in_place}, for which only the CPU's FFN kernel is"

    @property
    def neurons(self) -> int:
        return out_features(self.module.gate_proj)

    @property
    def computed(self) -> bool:
        """Whether the kernel computes it for any rows: those of what is active, or of an adapter that they name."""
        return bool(self._updates)

    def why_not(self, adapter: str) -> str | None:
        """Why this kernel does not compute rows of an adapter, or None; `why_not_ffn` found no reason."""
        return None if adapter in self._updates else self._only_cpu()

    def over(self, layout: NeuronLayout | None) -> FFN:
        """The same FFN over the tasks' neurons of a layout."""
        kernels, why_itself, rows, named = self._own
        return FFN(self.module, kernels, why_itself, layout, rows, named)

    def __call__(self, x: Tensor, task: str | None = None, residual: Tensor | None = None) -> Tensor:
        """x [..., hidden] -> [..., hidden], plus `residual` of that shape where given.

        Args:
            task: whose neuron set to use; None or a task without a set uses all neurons.
        """
        selection = self._selections.get(task) if task else None
        if self.why_itself is None:
            return self._compute(x, residual, selection, self._rows.groups(x) if self._beside else ())

        def own(adapter: str | None, x: Tensor, residual: Tensor | None) -> Tensor:
            if adapter is not None:  # which is refused where the kernel cannot add it
                return self._compute(x, residual, selection, (AdapterRows(adapter),))
            out: Tensor = self.module(x)
            return out if residual is None else out + residual

        return self._rows.each(own, x, residual) if self.computed else own(None, x, residual)

    def _compute(
        self, x: Tensor, residual: Tensor | None, selection: Selection | None, groups: Sequence[AdapterRows]
    ) -> Tensor:
        if self._int8:
            gate, up, down = ((own.values, own.scale) for own in self._int8)
            return ops.int8_ffn(x, *gate, *up, *down, residual=residual, selection=selection)
        if self._beside:
            return self._adapted(x, residual, selection, groups)
        return self._kernels.gathered_ffn(x, *ffn_weights(self.module), residual=residual, selection=selection)

    def _adapted(
        self, x: Tensor, residual: Tensor | None, selection: Selection | None, groups: Sequence[AdapterRows]
    ) -> Tensor:
        """With LoRA adapters, of which the selection takes rows of B in gate and up, and columns of A in down. Rows to which
        nothing is added go the same way, so that the weights are read once for all."""
        w_gate, w_up, w_down = ffn_weights(self.module)
        gate_add, up_add = (self._added(part, x, selection, groups) for part in range(2))
        h = ops.gathered_swiglu(x, w_gate, w_up, gate_add=gate_add, up_add=up_add, selection=selection)
        y = ops.gathered_down(h, w_down, residual=residual, selection=selection)
        for rows in groups:
            *_, down = self._updates[rows.adapter]
            if down:
                y = rows.put(self._lowered(down, rows.take(h), rows.take(y), selection), y)
        return y

    def _lowered(self, updates: tuple[Update, ...], h: Tensor, y: Tensor, selection: Selection | None) -> Tensor:
        """y [..., hidden] plus what adapters of down give for h [..., n]."""
        dtype = y.dtype
        for update in updates:
            low = ops.gathered_down(h.to(update.down.weight.dtype), update.down.weight, selection=selection)
            y = add_product(self._kernels, low * update.scaling, update.up.weight, y)
        return y.to(dtype)

    def _added(self, part: int, x: Tensor, selection: Selection | None, groups: Sequence[AdapterRows]) -> Tensor | None:
        """What adapters add to gate (part 0) or up (1), [..., n] in x's dtype; None for none."""
        out: Tensor | None = None
        for rows in groups:
            if (own := self._raised(self._updates[rows.adapter][part], rows.take(x), selection)) is None:
                continue
            if out is None:  # the number that leaves every other as it is, zeros of both signs too
                out = own if rows.runs is None else own.new_full((x.shape[0], *own.shape[1:]), -0.0)
            out = rows.put(own, out)
        return out

    def _raised(self, updates: tuple[Update, ...], x: Tensor, selection: Selection | None) -> Tensor | None:
        """What adapters of gate or up give for x, [..., n] in x's dtype; None for none."""
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
