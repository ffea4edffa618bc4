"""Which family's checkpoint a folder holds."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import torch

    from .pipeline import ModelPipeline

__all__ = ["family_in", "load_pipeline", "shell_of"]

_MODELS = {"bagel": "Bagel", "janusflow": "JanusFlow", "showo2": "Showo2"}
"""Family -> class of its models. Show-o2's config file has no mark of its own, so it is what is left."""


def family_in(directory: Path) -> str:
    """The family, by the config files alone; Show-o2's where they are no other's."""
    *marked, rest = _MODELS
    return next((family for family in marked if _layout(family).is_in(directory)), rest)


def load_pipeline(
    name: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    family: str = "showo2",
) -> ModelPipeline:
    """The pipeline of a folder with a checkpoint of any family, or of the embedded model of `family`.

    Args:
        name: a folder, whose config files say of which family it is, or 'nano'.
        dtype, device: as for `from_pretrained` of the family's pipeline, which says what else a folder holds.
        family: of the embedded model, 'showo2', 'janusflow' or 'bagel'; a folder has its own.

    Raises:
        ValueError: no such family.
        FileNotFoundError: no such folder.
        As the family's `from_pretrained`.
    """
    if family not in _MODELS:
        raise ValueError(f"family: expected {', '.join(_MODELS)}, got {family!r}")
    if name != "nano":
        directory = Path(name)
        if not directory.is_dir():
            raise FileNotFoundError(f"{str(name)!r}: expected 'nano' or a folder with a checkpoint")
        family = family_in(directory)
    pipeline: ModelPipeline = import_module(f".{family}.pipeline", __package__).Pipeline.from_pretrained(
        name, dtype, device
    )
    return pipeline


def shell_of(directory: Path) -> Any:
    """A model of a folder's sizes on the default device, with new weights; the folder's are not read."""
    family = family_in(directory)
    build = getattr(import_module(f".{family}.model", __package__), _MODELS[family])
    return build(_layout(family).read_config(directory))


def _layout(family: str) -> Any:
    return import_module(f".{family}.checkpoint", __package__).LAYOUT
