"""The embedders of latents and times as the runtime runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.embedding import sinusoids
from ...models.known import patch_convolution, why_not_patches, why_not_time
from ...ops.kernel_sets import KernelSet
from .adapters import RowAdapters
from .linear import Chain

__all__ = ["PatchEmbedder", "TimeEmbedder"]


class PatchEmbedder:
    """A convolution whose kernels do not overlap, which is a linear layer of patches.

    Attributes:
        why_itself: why the module is called as it is, or None.
    """

    def __init__(self, module: Any, kernels: KernelSet, like: Tensor):
        self.module = module
        self.why_itself = why_not_patches(module, like)
        self._kernels = kernels

    def __call__(self, latents: Tensor) -> Tensor:
        """[images, channels, H, W] -> [images, patches, width], patches in raster order."""
        convolution = patch_convolution(self.module)
        if self.why_itself is not None:
            out = self.module(latents)
            return out.flatten(2).transpose(1, 2) if convolution is self.module else out
        height, width = convolution.kernel_size
        images, channels, rows, columns = latents.shape
        rows, columns = rows // height, columns // width
        # As the convolution does, without what is left over at the edges.
        whole = latents[:, :, : rows * height, : columns * width]
        patches = whole.reshape(images, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(images, rows * columns, channels * height * width)
        return self._kernels.linear(flat, convolution.weight.flatten(1), convolution.bias)


class TimeEmbedder:
    """Sinusoids of times, then the module's MLP.

    Attributes:
        why_itself: why the module is called as it is, or None; the MLP's linear layers may have reasons of their own.
    """

    def __init__(self, module: Any, kernels: KernelSet, like: Tensor, rows: RowAdapters):
        self.module = module
        self.why_itself = why_not_time(module)
        self.mlp = None if self.why_itself is not None else Chain(module.mlp, kernels, like, rows)

    def __call__(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t [rows] -> [rows, width]."""
        if self.mlp is None:
            return self.module(t, dtype)
        width = self.module.mlp[0].in_features
        return self.mlp(sinusoids(t, width).to(dtype))
