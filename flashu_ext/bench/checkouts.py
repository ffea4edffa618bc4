"""Importing upstream programs' checkouts, unmodified, into this process."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Float32Torch", "declare_operators", "imported", "module", "with_flash_attention"]


def imported(directory: Path, program: str, needs: str, files: Sequence[str], names: Sequence[str]) -> list[ModuleType]:
    """Modules of a checkout.

    Args:
        directory: the checkout, or the folder in it from which its scripts run.
        program: its name, and `needs` the packages that it imports, for messages.
        files: some of its files, by which it is recognised.
        names: of the modules.

    Raises:
        ValueError: the folder is not such a checkout. ImportError: something it needs is not installed, or another
            program's module of that name is imported already.
    """
    root = directory.resolve()
    for name in files:
        if not (root / name).is_file():
            raise ValueError(f"--upstream: expected a {program} checkout with {name}, got {directory}")
    for name in dict.fromkeys(each.partition(".")[0] for each in names):
        loaded = sys.modules.get(name)
        if loaded is not None and not str(getattr(loaded, "__file__", "")).startswith(str(root)):
            raise ImportError(f"--upstream: a module named {name!r} is imported already, from {loaded.__file__}")
    sys.path.insert(0, str(root))
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(f"--upstream: {root} cannot be imported here ({error}); it needs {needs}") from error
    finally:
        sys.path.remove(str(root))


def module(name: str, **attributes: Any) -> ModuleType:
    """A module that stands in for one that is not installed."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(attributes)
    return made


class Float32Torch(ModuleType):
    """torch as upstream's modules see it on a CPU: the bfloat16 that they write into their inference is float32."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return torch.float32 if name == "bfloat16" else getattr(torch, name)


def declare_operators() -> None:
    """Other packages import torchvision, whose PyPI wheel lacks its operators with a CPU torch; the import needs two."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


@contextlib.contextmanager
def with_flash_attention() -> Iterator[None]:
    """Inside, `flash_attn` can be imported: where it is not installed, by SDPA."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    sys.modules["flash_attn"] = module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    try:
        yield
    finally:
        del sys.modules["flash_attn"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    """Packed sequences [tokens, heads, d], whose starts are given, attended to one by one."""
    out = []
    starts = zip(*(each.tolist() for each in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    first = next(starts)
    for last in starts:
        query = q[first[0] : last[0]].transpose(0, 1)[None]
        key, value = (each[first[1] : last[1]].transpose(0, 1)[None] for each in (k, v))
        n, m = query.shape[2], key.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n) if causal else None
        out.append(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        )
        first = last
    return torch.cat(out)
