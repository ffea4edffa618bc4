"""Red zones for kernel tests: a tensor between guards, with padded rows, surrounded by NaN.

A read outside the tensor gives NaN in the result; `check` counts writes outside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUARD_BYTES = 4096
POISON = 0xFF  # NaN in every floating dtype, -1 in the integer ones


class Guarded:
    """A copy of `like` in guarded memory, as `tensor`.

    Args:
        padding: elements between rows of the last dimension (0 keeps the tensor contiguous). gap: extra elements between
            the entries of each dimension further out, so that leading dimensions do not fold into rows of one stride.
        inner: stride of the last dimension. offset: elements by which the tensor is shifted, so that no vector is aligned.
        odd_ones: dimensions of size 1 get arbitrary strides, which must never be used.
    """

    def __init__(
        self, like: Tensor, padding: int = 0, *, gap: int = 0, inner: int = 1, offset: int = 0, odd_ones: bool = False
    ):
        strides, step = [1] * like.dim(), inner
        for dim in reversed(range(like.dim())):
            strides[dim] = step if not odd_ones or like.shape[dim] != 1 else 5 + 2 * dim
            step *= max(1, like.shape[dim])
            step += padding if dim == like.dim() - 1 and like.dim() > 1 else gap if 0 < dim < like.dim() - 1 else 0
        size = like.element_size()
        guard = GUARD_BYTES // size
        self.bytes = torch.full((2 * guard + offset + step, size), POISON, dtype=torch.uint8)
        elements = self.bytes.view(-1).view(like.dtype)
        self.tensor = elements.as_strided(like.shape, strides, guard + offset).copy_(like)
        self.outside = torch.ones(elements.numel(), dtype=torch.bool)
        self.outside.as_strided(like.shape, strides, guard + offset).fill_(False)
        self._first = guard + offset

    def check(self) -> None:
        """Fails if a byte outside the tensor was written."""
        written = self.outside & (self.bytes != POISON).any(1)
        assert not written.any(), (
            f"{int(written.sum())} elements of the red zone were written, "
            f"the first {int(written.nonzero()[0]) - self._first} after the tensor's first"
        )
