"""The running sums of each task and the samples read so far, in memory and in a checkpoint file.

Sums are fp64 and stored exactly, so a resumed run is bit-equal to an uninterrupted one. A checkpoint of other settings,
another model or other data is rejected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..planning.estimators import Calibration, DownNorms, NeuronSums
from ..planning.groups import is_int
from ..planning.reading import refusal, shown, strict_json
from ..planning.safe_files import load_safetensors, save_safetensors

__all__ = ["KINDS", "TaskState", "chained_digest", "load_states", "save_states"]

FORMAT = "flashu_ext.calibration"
VERSION = 1
KINDS = ("generation", "understanding")


@dataclass
class TaskState:
    """One task's sums so far.

    Attributes:
        kind: of its samples, 'generation' or 'understanding'.
        total, squares: fp64 [layers, intermediate], see `NeuronSums`.
        importance: fp64 [rows, layers], sums over samples.
        mean_importance: fp64 [layers], nonzero only for understanding.
        samples, tokens: counts so far.
        digest: chained over the samples, empty without a checkpoint.
    """

    kind: str
    total: Tensor
    squares: Tensor
    importance: Tensor
    mean_importance: Tensor
    samples: int = 0
    tokens: int = 0
    digest: str = ""

    @classmethod
    def build(cls, kind: str, layers: int, intermediate: int, times: int, device: torch.device) -> TaskState:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        rows = times if kind == "generation" else 1
        return cls(kind, zeros(layers, intermediate), zeros(layers, intermediate), zeros(rows, layers), zeros(layers))

    def tensors(self) -> dict[str, Tensor]:
        names = ("total", "squares", "importance", "mean_importance")
        return {name: getattr(self, name) for name in names}


def measured(
    states: Mapping[str, TaskState], down: DownNorms, drawing_down: DownNorms | None, times: Sequence[float]
) -> Calibration:
    """The calibration from finished states. Raises ValueError with task, layer and neuron of any NaN or infinity."""
    sums, importance, means = {}, {}, {}
    for task, state in states.items():
        try:
            sums[task] = NeuronSums(state.tokens, state.total.cpu(), state.squares.cpu())
        except ValueError as error:
            raise ValueError(f"{task}: activations: {error}") from error
        importance[task] = (state.importance / state.samples).float().cpu()
        if state.kind == "understanding":
            means[task] = (state.mean_importance / state.samples).float().cpu()
    drawn = any(state.kind == "generation" for state in states.values())
    return Calibration(sums, down, tuple(times) if drawn else (), importance, means, drawing_down if drawn else None)


def chained_digest(previous: str, sample: Any) -> str:
    """SHA-256 of the earlier samples' digest and a sample: a dataclass of tensors, numbers, lists and dataclasses."""
    digest = hashlib.sha256(previous.encode())
    for field in dataclasses.fields(sample):
        _feed(digest, field.name, getattr(sample, field.name))
    return digest.hexdigest()


def _feed(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif dataclasses.is_dataclass(value):
        digest.update(f"{name} {type(value).__name__};".encode())
        for field in dataclasses.fields(value):
            _feed(digest, f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        digest.update(f"{name} of {len(value)};".encode())
        for index, item in enumerate(value):
            _feed(digest, f"{name}[{index}]", item)
    else:
        digest.update(f"{name} {value!r};".encode())


# ---- files


def save_states(path: str | os.PathLike[str], settings: Mapping[str, Any], states: Mapping[str, TaskState]) -> None:
    """Write a checkpoint atomically. settings: all that the sums depend on, as JSON values."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "tasks": {
            task: {"kind": state.kind, "samples": state.samples, "tokens": state.tokens, "digest": state.digest}
            for task, state in states.items()
        },
    }
    tensors = {f"{name}.{task}": value for task, state in states.items() for name, value in state.tensors().items()}
    save_safetensors(path, tensors, {"calibration": json.dumps(header, allow_nan=False)})


def load_states(
    path: str | os.PathLike[str], settings: Mapping[str, Any], device: torch.device
) -> dict[str, TaskState]:
    """Read a checkpoint of a run with the same settings.

    Raises:
        ValueError: not a checkpoint, damaged, or of other settings or another model; the message names the difference.
    """
    tensors, metadata = load_safetensors(path)
    if set(metadata) != {"calibration"}:
        raise refusal(path, f"expected a calibration checkpoint, got metadata {shown(sorted(metadata))}")
    header = strict_json(metadata["calibration"], f"{os.fspath(path)}: calibration")
    try:
        return _read(header, tensors, settings, device)
    except ValueError as error:
        raise refusal(path, error) from error


def _read(
    header: Any, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], device: torch.device
) -> dict[str, TaskState]:
    if not isinstance(header, dict) or set(header) != {"format", "version", "settings", "tasks"}:
        raise ValueError("expected format, version, settings and tasks")
    if header["format"] != FORMAT or type(header["version"]) is not int or header["version"] != VERSION:
        raise ValueError(f"expected format {FORMAT!r} and version {VERSION}")
    made = header["settings"]
    if not isinstance(made, dict) or set(made) != set(settings):
        raise ValueError(f"settings: expected {sorted(settings)}, got {shown(made)}")
    for name, value in settings.items():
        if made[name] != value:
            raise ValueError(
                f"checkpoint of another calibration: {name} was {shown(made[name])}, is {shown(value)}; "
                "delete the file to start over"
            )
    tasks = header["tasks"]
    if not isinstance(tasks, dict) or set(tasks) - set(settings["tasks"]):
        raise ValueError(f"tasks: expected some of {settings['tasks']}, got {shown(tasks)}")
    states = {}
    for task in (task for task in settings["tasks"] if task in tasks):
        record = tasks[task]
        if not isinstance(record, dict) or set(record) != {"kind", "samples", "tokens", "digest"}:
            raise ValueError(f"tasks[{task!r}]: expected kind, samples, tokens and digest, got {shown(record)}")
        counts = (record["samples"], record["tokens"])
        if (
            record["kind"] not in KINDS
            or not all(is_int(count) and 1 <= count < 2**63 for count in counts)
            or not isinstance(record["digest"], str)
        ):
            raise ValueError(f"tasks[{task!r}]: not valid: {shown(record)}")
        times = len(settings["times"])
        state = TaskState.build(record["kind"], settings["layers"], settings["intermediate"], times, device)
        state.samples, state.tokens, state.digest = *counts, record["digest"]
        for name, value in state.tensors().items():
            got = tensors.get(f"{name}.{task}")
            if got is None or got.dtype != torch.float64 or got.shape != value.shape:
                found = "nothing" if got is None else f"{tuple(got.shape)} {got.dtype}"
                raise ValueError(f"{name}.{task}: expected fp64 {tuple(value.shape)}, got {found}")
            value.copy_(got)
        states[task] = state
    if len(tensors) != sum(len(state.tensors()) for state in states.values()):
        raise ValueError(f"expected the tensors of {list(states)}, got {shown(sorted(tensors))}")
    return states
