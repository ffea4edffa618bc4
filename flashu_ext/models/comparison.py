"""A family's outputs compared with those of the unmodified upstream program, from a folder of such outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn

from ..planning.reading import strict_json

__all__ = ["LIMIT", "Accelerated", "Comparison", "Fixture", "compared", "each", "relative", "same"]

M = TypeVar("M", bound=nn.Module)

LIMIT = 1e-4
"""Relative L2 distance from fp32 outputs that counts as agreement."""

Accelerated = Callable[..., AbstractContextManager[Any]]
"""`flashu_ext.accelerate`, or for the dense model a context that changes nothing: (model, config=None, plan=None)."""


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        name: of what was compared.
        error: distance from upstream's.
        limit: up to which they agree.
    """

    name: str
    error: float
    limit: float = LIMIT

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Fixture:
    """A folder of outputs: fixture.json says what ran, safetensors hold weights, inputs and results."""

    folder: Path
    spec: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Fixture:
        """Raises FileNotFoundError or ValueError where this is no such folder."""
        path = folder / "fixture.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a folder of upstream's outputs")
        spec = strict_json(path.read_text(), path)
        if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
            raise ValueError(f"{path}: expected an object with 'model'")
        return cls(folder, spec)

    @property
    def family(self) -> str:
        """The first folders, of Show-o2, do not name theirs."""
        return str(self.spec.get("family", "showo2"))

    def loaded(self, model: M) -> M:
        """A model with the weights that upstream ran, in eval mode."""
        model.load_state_dict(self.tensors("model"), strict=True)
        return model.eval()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Of a file, by name without its ending; empty where it is missing."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else {}


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance of `got` from `expected`, computed in fp64. Raises ValueError for other shapes."""
    if got.shape != expected.shape:
        raise ValueError(f"got: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())


def compared(name: str, got: Tensor, expected: Tensor) -> Comparison:
    """By relative L2 distance."""
    return Comparison(name, relative(got, expected))


def each(name: str, got: Tensor, expected: Tensor) -> Comparison:
    """Of several [n, ...] the farthest."""
    return Comparison(name, max(relative(a, b) for a, b in zip(got, expected, strict=True)))


def same(name: str, got: Tensor, expected: Tensor) -> Comparison:
    """Of tokens: the share that differs, none of which is agreement."""
    differs = 1.0 if got.shape != expected.shape else float((got != expected).double().mean())
    return Comparison(name, differs, 0.0)
