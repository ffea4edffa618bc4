"""An RMSNorm of the model as the runtime runs it: on the kernels, fused with what is around it, or as the module itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...models.adapter import norm_eps
from ...ops.kernel_sets import KernelSet

__all__ = ["Norm"]


class Norm:
    """Attributes:
    module: the model's own.
    why_itself: why the kernels do not compute this module, which is then called as it is; or None.
    """

    def __init__(self, module: Any, kernels: KernelSet, why_itself: str | None):
        self.module = module
        self.why_itself = why_itself
        self._kernels = kernels

    def __call__(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x [..., width] -> [..., width]; modulated, x [rows, n, width], by shift and scale [rows, width] where given."""
        for name, value in (("shift", shift), ("scale", scale)):
            if value is not None and value.shape != (x.shape[0], x.shape[-1]):
                raise ValueError(f"{name}: expected [{x.shape[0]}, {x.shape[-1]}], got {tuple(value.shape)}")
        if self.why_itself is None:
            return self._kernels.rms_norm(x, self.module.weight, norm_eps(self.module), shift, scale)
        normed = self.module(x)
        if shift is None or scale is None:
            return normed
        wide = normed.float() * (1 + scale.float()[:, None]) + shift.float()[:, None]
        return wide.to(normed.dtype)

    def after_adding(self, y: Tensor, residual: Tensor) -> Tensor:
        """Add y [..., width] to `residual` in place and norm the sum. y may be overwritten."""
        if self.why_itself is None:
            return self._kernels.add_rms_norm_(y, residual, self.module.weight, norm_eps(self.module))
        return self.module(residual.add_(y))
