"""Layers that `kernels.kernelize` puts into a model: it binds a layer's `forward` to the model's own modules.

They have no state: they read what the module has. None has a backward, as no op has one. `kernelize` binds them to subclasses
too: those with a forward of their own run as themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ffn import gathered_ffn
from .linear import linear
from .norm import rms_norm
from .selection import Selection

__all__ = ["Linear", "RMSNorm", "SwiGLUMLP"]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), for modules with `weight` [width] and `variance_epsilon` or `eps`.

    Rounded once, to the dtype of x. A weight of another dtype than x is computed with in the wider of both. An `nn.RMSNorm`
    without a weight or an eps runs as itself.
    """

    has_backward = False
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float | None
    eps: float | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., width], returned in its shape and dtype."""
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        if _is_overridden(self) or eps is None or self.weight is None:
            return _own_forward(self, hidden_states)
        wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states.to(wide), self.weight.to(wide), eps).to(hidden_states.dtype)


class SwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), of the neurons of `selection` where the module has one.

    A module with biases, another activation, or projections that are not plain linear layers (an adapter's, quantised,
    hooked) is computed by its own parts.
    """

    has_backward = False
    can_torch_compile = True

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden], returned so.

        Raises:
            ValueError: the module has a selection, and its parts are not those of a plain SwiGLU.
        """
        selection: Selection | None = getattr(self, "selection", None)
        if _is_overridden(self):
            if selection is not None:
                raise ValueError(
                    f"selection: expected a module with the forward of its base class, got {type(self).__name__}"
                )
            return _own_forward(self, x)
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if _is_silu(self.act_fn) and all(map(_is_plain, projections)):
            gate, up, down = (projection.weight for projection in projections)
            return gathered_ffn(x, gate, up, down, selection=selection)  # type: ignore[arg-type]
        if selection is not None:
            raise ValueError(
                "selection: expected a module of SiLU and three nn.Linear without bias, hooks or a forward of their own, got"
                f" {self}"
            )
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Linear(nn.Module):
    """x weight^T + bias, as `nn.Linear`. A weight of a subclass of Tensor (quantised, distributed) runs as itself."""

    has_backward = False
    can_torch_compile = True

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]; gives [..., out_features]."""
        if _is_overridden(self) or not _is_plain_tensor(self.weight):
            return _own_forward(self, input)
        return linear(input, self.weight, self.bias)


def _is_overridden(module: nn.Module) -> bool:
    """Whether a subclass of the class that was given the layer's name has a forward of its own."""
    kind: Any
    for kind in type(module).__mro__:
        if "kernel_layer_name" in kind.__dict__:
            return type(module).forward is not kind.forward
    return False


def _own_forward(module: Any, x: Tensor) -> Tensor:
    """What the module computes without `kernelize`."""
    result: Tensor = type(module).forward(module, x)
    return result


def _runs(module: nn.Module, *forwards: Any) -> bool:
    """Whether calling the module runs one of these, and no hook. `kernelize` binds a forward also where it has no kernel."""
    # Not `module.forward` where it is the class's: torch.compile makes another method of it.
    own = getattr(module.forward, "__func__", None) if "forward" in module.__dict__ else type(module).forward
    return own in forwards and not module._forward_hooks and not module._forward_pre_hooks


def _is_plain(module: Any) -> bool:
    """Whether calling the module multiplies by its weight and does nothing else."""
    own = type(module).forward is nn.Linear.forward and _runs(module, nn.Linear.forward, Linear.forward)
    return own and module.bias is None and _is_plain_tensor(module.weight)


def _is_plain_tensor(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _is_silu(module: Any) -> bool:
    """transformers has a class of its own, which is not imported here."""
    kind = type(module)
    known = kind is nn.SiLU or (kind.__name__ == "SiLUActivation" and kind.__module__ == "transformers.activations")
    return known and _runs(module, kind.forward)
