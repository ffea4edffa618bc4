"""Loading what is shipped, or what training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..planning.config import FlashUConfig
from ..planning.plan import TaskPlan
from ..planning.reading import read_json, refusal, shown
from .subject import DATA, FAMILIES, WEIGHTS, subject

__all__ = ["load_model", "load_plan"]


def load_model(directory: Path = DATA) -> Any:
    """The trained model of a folder, of any family, fp32, in eval mode.

    Raises:
        FileNotFoundError: the folder has no weights; those of some families are in a package of their own.
        ValueError: the folder's config.json is not of an embedded model.
    """
    if not (directory / "model.safetensors").is_file():
        if directory in (subject(family).folder for family in FAMILIES) and directory != DATA:
            raise FileNotFoundError(
                f"the embedded {directory.name} is in the package {WEIGHTS}, which is not installed: pip install {WEIGHTS}, "
                f"or ./nano_weights in the sources"
            )
        raise FileNotFoundError(
            f"{directory}: model.safetensors is missing; train it with python -m flashu_ext.nano.train"
        )
    path = directory / "config.json"
    fields = read_json(path)
    written = fields.get("format") if isinstance(fields, dict) else None
    formats = {f"flashu_ext.{family}": family for family in FAMILIES}
    if written not in formats:
        raise refusal(path, f"expected format {' or '.join(formats)}, got {shown(written)}")
    return subject(formats[written]).load(directory)


def load_plan(model: Any, directory: Path = DATA, config: FlashUConfig | None = None) -> TaskPlan:
    """The task plan beside a model, pruned as `config` says (default: as it was written)."""
    plan = TaskPlan.load(directory / "plan.safetensors", model=model)
    return plan if config is None else plan.with_pruning(config.ffn)
