"""Programs of others in which the pipelines run: diffusers. Imports none of them."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..planning.reading import read_json, shown
from ..planning.safe_files import write_text

__all__ = ["diffusers_pipeline", "write_diffusers_index"]

_INDEX = "model_index.json"
_CLASS = "FlashuPipeline"


def __getattr__(name: str) -> Any:
    if name == "diffusers":
        return import_module(".diffusers", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def diffusers_pipeline() -> str:
    """The file that `DiffusionPipeline.from_pretrained(..., custom_pipeline=)` takes."""
    return str(Path(__file__).with_name("flashu_pipeline.py"))


def write_diffusers_index(directory: str | os.PathLike[str]) -> None:
    """Write model_index.json into a checkpoint's folder: `DiffusionPipeline.from_pretrained` reads no folder without it.

    Args:
        directory: a folder that a pipeline of showo2, janusflow or bagel reads; which family it is need not be said.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has a model_index.json of another pipeline, which stays as it is.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a folder with a checkpoint")
    path = directory / _INDEX
    if path.exists():
        found: Any = read_json(path)
        name = found.get("_class_name") if isinstance(found, dict) else None
        if name != _CLASS:
            raise ValueError(f"{path}: expected no file or one of {_CLASS}, got one of {shown(name)}")
    index = {"_class_name": _CLASS, "parts": [f"{__name__}.diffusers", "Parts"]}
    write_text(path, json.dumps(index, indent=2) + "\n")
