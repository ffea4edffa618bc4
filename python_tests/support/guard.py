"""Red zones for kernel tests: a tensor between guards, its rows padded, everything around it NaN.

A read outside the tensor shows as NaN in the result, a write outside it is counted by `check`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD_BYTES = 4096
POISON = 0xFF  # NaN in every floating dtype, -1 in the integer ones


class Guarded:
    """A copy of `like` in guarded memory, as `tensor`.

    Args:
        padding: elements between rows of the last dimension (0 keeps the tensor contiguous).
    """

    def __init__(self, like: Tensor, padding: int = 0):
        width = like.shape[-1] if like.dim() else 1
        rows = math.prod(like.shape[:-1])
        stride = width + (padding if like.dim() > 1 else 0)
        size = like.element_size()
        body = rows * stride * size
        self.bytes = torch.full((2 * GUARD_BYTES + body,), POISON, dtype=torch.uint8)
        self.outside = torch.ones_like(self.bytes, dtype=torch.bool)
        if body:
            self.outside[GUARD_BYTES : GUARD_BYTES + body].view(rows, stride, size)[:, :width] = False
        inner = self.bytes[GUARD_BYTES : GUARD_BYTES + body].view(like.dtype)
        strides = [1] * like.dim()
        for dim in range(like.dim() - 2, -1, -1):
            strides[dim] = stride if dim == like.dim() - 2 else strides[dim + 1] * max(1, like.shape[dim + 1])
        self.tensor = torch.as_strided(inner, like.shape, strides).copy_(like)

    def check(self) -> None:
        """Fails if a byte outside the tensor was written."""
        written = self.outside & (self.bytes != POISON)
        assert not written.any(), (
            f"{int(written.sum())} bytes of the red zone were written, the first at {int(written.nonzero()[0]) - GUARD_BYTES}"
        )
