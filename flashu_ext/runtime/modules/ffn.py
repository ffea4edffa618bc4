"""The FFN that is swapped into the language model: the original's weights, read in runs of neurons."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.kernel_sets import KernelSet
from ...ops.selection import Selection
from ...planning.neurons import NeuronLayout, Runs

__all__ = ["GatheredFFN"]


class GatheredFFN(nn.Module):
    """SwiGLU FFN over a chosen set of neurons, with a layer's own gate_proj, up_proj and down_proj as children.

    The children are the very objects of the original FFN, so parameter names and state_dict keys do not change.
    Without `task` it computes all neurons, as the original does.
    """

    def __init__(self, original: nn.Module, kernels: KernelSet, layout: NeuronLayout | None = None):
        super().__init__()
        self.gate_proj: nn.Linear = original.gate_proj  # type: ignore[assignment]
        self.up_proj: nn.Linear = original.up_proj  # type: ignore[assignment]
        self.down_proj: nn.Linear = original.down_proj  # type: ignore[assignment]
        self.kernels = kernels
        self.layout = layout
        self.training = original.training
        weight = self.gate_proj.weight
        self._selections = {
            task: Selection.from_runs(runs, weight.shape[0], weight.device)
            for task, runs in (layout.runs if layout else {}).items()
        }

    def runs(self, task: str | None) -> Runs | None:
        """Runs of neurons that `task` reads, or None: all of them."""
        return self.layout.runs.get(task) if self.layout and task else None

    def forward(self, x: Tensor, task: str | None = None, residual: Tensor | None = None) -> Tensor:
        """x [..., hidden] -> [..., hidden], plus `residual` of that shape where given.

        Args:
            task: whose neuron set to use; None or a task without a set uses all neurons.
        """
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
            # Training through an accelerated model stays possible; the kernels have no backward.
            hidden = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            out = self.down_proj(hidden)
            return out if residual is None else out + residual
        return self.kernels.gathered_ffn(x, *weights, residual=residual, selection=self._selection(task))

    def _selection(self, task: str | None) -> Selection | None:
        """A task's neurons, on the device of the weights; None: all of them."""
        selection = self._selections.get(task) if task else None
        if task and selection is not None and selection.list is not None:
            # The model may have moved since.
            selection = self._selections[task] = selection.to(self.gate_proj.weight.device)
        return selection

    def extra_repr(self) -> str:
        sets = (
            {task: sum(length for _, length in runs) for task, runs in self.layout.runs.items()} if self.layout else {}
        )
        return f"neurons={self.gate_proj.weight.shape[0]}, sets={sets}"
