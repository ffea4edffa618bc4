"""What a pipeline's `from_pretrained` reads beside the model, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..planning.reading import shown
from .checkpoint import check_dtype
from .checks import check_device

__all__ = ["check_vae", "check_vocabulary", "opened", "parts_of"]


def opened(name: Any, dtype: Any, device: Any, expected: str) -> tuple[Path, torch.device]:
    """The folder and device of `from_pretrained`'s arguments. expected: for messages."""
    check_dtype(dtype)
    device = check_device(device)
    directory = Path(name)
    if not directory.is_dir():
        raise FileNotFoundError(f"{str(name)!r}: expected {expected}")
    return directory, device


def parts_of(directory: Path, tokenizer: Callable[[Path], Any], codec: Callable[[Path], Any]) -> tuple[Any, Any]:
    """What stands beside a model: its tokenizer, in `tokenizer/` or the folder itself, and its VAE in `vae/`."""
    try:
        own = directory / "tokenizer"
        return tokenizer(own if own.is_dir() else directory), codec(directory / "vae")
    except FileNotFoundError as error:
        hint = "model.save_pretrained writes only the model, pipe.save_pretrained what goes with it too"
        raise FileNotFoundError(f"{error}; {hint}") from error


def check_vocabulary(directory: Path, tokenizer: Any, vocabulary: int) -> None:
    """Raise ValueError where the tokenizer has tokens that the model has no embedding of."""
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}")


def check_vae(directory: Path, name: str, expected: Any, got: Any) -> None:
    """Raise ValueError where the VAE is not the model's."""
    if got != expected:
        raise ValueError(f"{directory / 'vae'}: {name}: expected {expected}, as the model's VAE has, got {shown(got)}")
