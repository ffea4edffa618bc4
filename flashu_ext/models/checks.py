"""Checks of arguments that all families have, before anything runs. Torch only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..planning.groups import real, whole
from ..planning.reading import shown
from .velocity import Scale

__all__ = [
    "check_callback",
    "check_count",
    "check_device",
    "check_eos",
    "check_finite",
    "check_own",
    "check_generator",
    "check_generators",
    "check_sampling",
    "check_tensor",
    "check_tokens",
    "guidance_scale_of",
    "made_by",
]


def check_finite(name: str, numbers: Tensor) -> None:
    """What was drawn."""
    if not bool(numbers.isfinite().all()):
        raise FloatingPointError(
            f"{name}: expected finite numbers, got NaN or Infinity: a guidance_scale, or the weights, lead beyond the "
            "range of a dtype"
        )


def check_tensor(name: str, value: Any, dims: int, dtype: str, device: torch.device) -> None:
    """dtype: 'int64' or 'a floating-point tensor'."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(value.shape)}")
    wrong = value.dtype != torch.int64 if dtype == "int64" else not value.is_floating_point()
    if wrong:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as the model, got {value.device}")


def made_by(method: str, value: Any, *shape: int | None) -> Tensor:
    """What a method of an adapter, or of another class that is named, gave, if it has the shape that is asked for; None: any
    length.

    Raises:
        TypeError, ValueError: it has not; the method is named.
    """
    method = method if "." in method else f"Adapter.{method}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{method}: expected it to give a tensor, got {type(value).__name__}")
    got = tuple(value.shape)
    if len(got) != len(shape) or any(want is not None and want != have for want, have in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{method}: expected it to give [{wanted}], got {list(got)}")
    return value


def check_own(model: Any, kind: type) -> None:
    """Raise TypeError for a dense upstream instance: it computes nothing for this library unless it is accelerated."""
    if not isinstance(model, kind):
        raise TypeError(
            f"model: expected a flashu_ext {kind.__name__}, or any that is accelerated (flashu_ext.accelerate), got "
            f"{type(model).__name__}"
        )


def check_tokens(name: str, value: Any, rows: int, embed_tokens: Any) -> None:
    """int64 [rows, n] of ids that a token embedding has, on its device."""
    check_tensor(name, value, 2, "int64", embed_tokens.weight.device)
    if value.shape[0] != rows:
        raise ValueError(f"{name}: expected {rows} rows, got {value.shape[0]}")
    vocabulary = embed_tokens.weight.shape[0]
    if value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= vocabulary:
            raise IndexError(f"{name}: expected token ids in [0, {vocabulary}), got {low if low < 0 else high}")


def guidance_scale_of(guidance_scale: Any, images: int) -> Scale:
    """A caller's guidance scale: a number, or one above 0 for each image in a sequence, array or tensor.

    Raises:
        ValueError: anything else.
    """
    if isinstance(guidance_scale, (Tensor, np.ndarray)):
        guidance_scale = guidance_scale.flatten().tolist() if guidance_scale.ndim else guidance_scale.item()
    if not isinstance(guidance_scale, (list, tuple)):
        scale = real(guidance_scale)
        if scale is None or scale < 0:
            raise ValueError(f"guidance_scale: expected a finite number >= 0, got {shown(guidance_scale)}")
        return scale
    numbers = [scale for scale in map(real, guidance_scale) if scale is not None and scale > 0]
    if len(guidance_scale) != images or len(numbers) != images:
        raise ValueError(
            f"guidance_scale: expected {images} finite numbers above 0, one for each image, got {guidance_scale!r:.80}"
        )
    return tuple(numbers)


def check_sampling(temperature: Any, top_k: Any, top_p: Any) -> tuple[float, int | None, float | None]:
    """Sampling parameters of `decoding.TokenSampler`, as Python's numbers."""
    heat, kept, total = real(temperature), whole(top_k), real(top_p)
    if heat is None or heat < 0:
        raise ValueError(f"temperature: expected a finite number >= 0, got {shown(temperature)}")
    if top_k is not None and (kept is None or kept < 1):
        raise ValueError(f"top_k: expected None or an integer >= 1, got {top_k!r}")
    if top_p is not None and (total is None or not 0 < total <= 1):
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p!r}")
    return heat, kept, total


def check_generator(name: str, value: Any, device: torch.device) -> None:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: expected a torch.Generator, got {type(value).__name__}")
    if value.device.type != device.type:
        raise ValueError(f"{name}: expected a generator on {device} as the model, got {value.device}")


def check_generators(values: Any, count: int, device: torch.device) -> None:
    """None, or one generator for each of `count` questions."""
    if values is None:
        return
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"generators: expected a list, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"generators: expected one for each of {count} questions, got {len(values)}")
    for row, generator in enumerate(values):
        check_generator(f"generators[{row}]", generator, device)


def check_callback(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected None or a function, got {type(value).__name__}")


def check_device(value: Any) -> torch.device:
    """A device that torch has here. Raises TypeError or ValueError, naming `device`."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"device: expected one of torch's, as 'cpu' or 'cuda', got {shown(value)}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError(f"device: expected 'cpu', as torch sees no GPU here, got {shown(value)}")
        if device.index is not None and device.index >= count:
            raise ValueError(f"device: expected a GPU in [0, {count}), got {shown(value)}")
    return device


def check_count(name: str, value: Any) -> None:
    number = whole(value)
    if number is None or number < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")


def check_eos(value: Any) -> None:
    if value is not None and whole(value) is None:
        raise TypeError(f"eos_token: expected None or a token id, got {value!r}")
