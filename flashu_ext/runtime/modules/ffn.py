"""An FFN of the model as the runtime runs it: on the kernel, over a task's neurons, or as the module itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...models.adapter import out_features
from ...ops.kernel_sets import KernelSet
from ...ops.selection import Selection
from ...planning.neurons import NeuronLayout, ffn_weights

__all__ = ["FFN"]


class FFN:
    """A SwiGLU FFN. The module stays where it is in the model; nothing is replaced.

    Attributes:
        module: the model's own, with gate_proj, up_proj and down_proj.
        why_itself: why the kernel does not compute this module, which is then called as it is, on all neurons; or None.
    """

    def __init__(self, module: Any, kernels: KernelSet, why_itself: str | None, layout: NeuronLayout | None = None):
        """layout: the tasks' neurons, in the order in which the weights lie; None: every task uses all."""
        self.module = module
        self.why_itself = why_itself
        self._kernels = kernels
        self._selections: dict[str, Selection] = {}
        if layout is not None and why_itself is None:
            device = module.gate_proj.weight.device
            self._selections = {
                task: Selection.from_runs(runs, layout.intermediate, device) for task, runs in layout.runs.items()
            }

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
        return self._kernels.gathered_ffn(x, *ffn_weights(self.module), residual=residual, selection=selection)
