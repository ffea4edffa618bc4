"""Which family's checkpoint a folder holds."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["family_in", "pipeline_class", "shell_of"]

_MODELS = {"bagel": "Bagel", "janusflow": "JanusFlow", "showo2": "Showo2"}
"""Family -> class of its models. Show-o2's config file has no mark of its own, so it is what is left."""


def family_in(directory: Path) -> str:
    """The family, by the config files alone; Show-o2's where they are no other's."""
    *marked, rest = _MODELS
    return next((family for family in marked if _layout(family).is_in(directory)), rest)


def pipeline_class(directory: Path) -> Any:
    """The pipeline that reads a folder."""
    return import_module(f".{family_in(directory)}.pipeline", __package__).Pipeline


def shell_of(directory: Path) -> Any:
    """A model of a folder's sizes on the default device, with new weights; the folder's are not read."""
    family = family_in(directory)
    build = getattr(import_module(f".{family}.model", __package__), _MODELS[family])
    return build(_layout(family).read_config(directory))


def _layout(family: str) -> Any:
    return import_module(f".{family}.checkpoint", __package__).LAYOUT
