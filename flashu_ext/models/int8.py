"""Weights that torchao quantised to int8, told by their class. torchao is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Int8", "int8_of", "inner_tensors", "is_int8", "stored_bytes", "why_not_int8"]


@dataclass(frozen=True)
class Int8:
    """Attributes:
    values: int8 [N, K].
    scale: fp32 [N]; row r stands for values[r] * scale[r].
    """

    values: Tensor
    scale: Tensor


def is_int8(weight: Any) -> bool:
    """Whether a weight is torchao's tensor of `Int8WeightOnlyConfig`, or of a kind near it."""
    kind = type(weight)
    return kind.__name__ == "Int8Tensor" and kind.__module__.startswith("torchao.")


def int8_of(weight: Any) -> Int8 | None:
    """The numbers, in place, of a weight that `why_not_int8` has nothing against; None for a plain weight."""
    return Int8(weight.qdata, weight.scale.reshape(-1)) if is_int8(weight) else None


def why_not_int8(weight: Any, shape: tuple[int, ...], like: Tensor) -> str | None:
    """Why the int8 kernels cannot read a weight of which `is_int8` is true, or None."""
    values, scale, zero = weight.qdata, weight.scale, weight.zero_point
    if weight.act_quant_kwargs is not None:
        return "its weight is int8 for activations that are quantised too"
    if weight.act_pre_scale is not None:
        return "its weight is int8 with a scale for activations"
    if tuple(values.shape) != shape:
        return f"its weight is {list(values.shape)}, expected {list(shape)}"
    if list(weight.block_size) != [1, shape[1]] or scale.numel() != shape[0]:
        return f"its weight is int8 with a scale for every {list(weight.block_size)} of {list(shape)}, expected one per row"
    if zero is not None and bool(zero.any()):
        return "its weight is int8 with zero points"
    if weight.dtype != like.dtype:
        return f"its weight is {weight.dtype}, the model's {like.dtype}"
    if scale.dtype != torch.float32:
        return f"its weight is int8 with scales of {scale.dtype}, expected torch.float32"
    if values.device.type != "cpu" or like.device.type != "cpu":
        return f"its weight is int8 on {values.device.type}, where no kernel reads it"
    return None if values.is_contiguous() and scale.is_contiguous() else "its weight is not contiguous"


def inner_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a tensor of a subclass consists of; none of a plain one."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    inner = [] if flatten is None else [getattr(weight, name) for name in flatten()[0]]
    return [each for each in inner if isinstance(each, Tensor)]


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes, of a quantizer's those of what it is made of."""
    inner = inner_tensors(weight)
    return sum(map(stored_bytes, inner)) if inner else weight.nbytes
