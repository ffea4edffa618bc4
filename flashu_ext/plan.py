"""Room: the task plan. What calibration found about a model, per task: neuron scores and the sets kept from them.

A plan is independent of the runtime: it is made from scores, saved as safetensors with validated JSON metadata, loaded,
and checked against a model by shape and fingerprint before anything is touched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import strict_json
from .neurons import NeuronLayout
from .safe_files import content_digest, load_safetensors, save_safetensors

__all__ = ["TaskPlan", "kept_count", "model_fingerprint"]

FORMAT = "flashu_ext.task_plan"
VERSION = 1


def kept_count(intermediate: int, ratio: float, multiple: int) -> int:
    """Neurons kept of `intermediate` when `ratio` of them is pruned: rounded down to `multiple`, never to none.

    Source: Flash-Unified's reference code, `structural_pruning.py`.
    """
    ideal = intermediate - int(intermediate * ratio)
    kept = ideal // multiple * multiple
    if kept == 0:
        kept = multiple if multiple <= intermediate else max(ideal, 1)
    return kept


def model_fingerprint(model: Any) -> str:
    """Digest that tells one model's weights from another's: the LLM's FFN shapes and a sample of its attention weights.

    It ignores the order of FFN neurons and survives a cast to bf16, so an accelerated model and its checkpoint agree.
    """
    sample: list[Tensor] = []
    shapes: list[int] = []
    for layer in model.showo.model.layers:
        down = layer.mlp.down_proj.weight
        shapes += list(down.shape)
        query = layer.self_attn.q_proj.weight.detach().flatten()
        sample += [layer.post_attention_layernorm.weight, query[:: max(1, query.numel() // 256)]]
    return content_digest([torch.tensor(shapes, dtype=torch.float32), *sample])


def _check_scores(task: str, scores: Sequence[Tensor]) -> Tensor:
    if not isinstance(scores, (list, tuple)) or not scores:
        raise ValueError(
            f"{task}: expected a non-empty list with one score tensor per layer, got {type(scores).__name__}"
        )
    for layer, score in enumerate(scores):
        if not isinstance(score, Tensor) or score.dim() != 1 or not score.is_floating_point():
            got = f"{tuple(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"{task}[{layer}]: expected a 1-D floating-point tensor of neuron scores, got {got}")
        if score.numel() == 0 or score.numel() != scores[0].numel():
            raise ValueError(
                f"{task}[{layer}]: expected {scores[0].numel() or 'at least 1'} scores as in layer 0, got {score.numel()}"
            )
        bad = torch.nonzero(~torch.isfinite(score))
        if bad.numel():
            raise ValueError(
                f"{task}[{layer}]: expected finite scores, got {float(score[bad[0, 0]])} at neuron {int(bad[0, 0])}"
            )
    return torch.stack([score.detach().to("cpu", torch.float32) for score in scores])


@dataclass(frozen=True)
class TaskPlan:
    """Neuron scores per task and the pruning drawn from them. Make one with `from_scores` or `flashu_ext.calibrate`.

    Attributes:
        scores: task -> fp32 [layers, intermediate]; larger is more important.
        ratio: fraction pruned per layer (r_p).
        multiple: kept neurons are a multiple of this.
        fingerprint: `model_fingerprint` of the model it was made for, or None.
    """

    scores: Mapping[str, Tensor]
    ratio: float
    multiple: int
    fingerprint: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or not math.isfinite(self.ratio) or not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: expected a number in [0, 1), got {self.ratio!r}")
        if not isinstance(self.multiple, int) or isinstance(self.multiple, bool) or self.multiple < 1:
            raise ValueError(f"multiple: expected an integer >= 1, got {self.multiple!r}")
        if not self.scores:
            raise ValueError("scores: expected at least one task (generation=... or understanding=...), got none")
        shapes = {task: tuple(score.shape) for task, score in self.scores.items()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"scores: expected the same layers and neurons for every task, got {shapes}")

    @classmethod
    def from_scores(
        cls,
        *,
        generation: Sequence[Tensor] | None = None,
        understanding: Sequence[Tensor] | None = None,
        ratio: float = 0.2,
        multiple: int = 64,
        model: Any | None = None,
        **other_tasks: Sequence[Tensor],
    ) -> TaskPlan:
        """A plan from neuron scores.

        Args:
            generation, understanding, other_tasks: per task one fp tensor [intermediate] per layer; either may be left out,
                and a task without scores runs on all neurons.
            ratio: fraction pruned per layer. multiple: kept counts are rounded down to it.
            model: the model that the scores belong to; its fingerprint goes into the plan.

        Raises:
            ValueError: no task, NaN or infinite scores, or shapes that differ between layers.
        """
        given = {"generation": generation, "understanding": understanding, **other_tasks}
        scores = {task: _check_scores(task, value) for task, value in given.items() if value is not None}
        plan = cls(scores, ratio, multiple, model_fingerprint(model) if model is not None else None)
        if model is not None:
            plan.check_model(model)
        return plan

    # ---- what it says

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.scores)

    @property
    def layers(self) -> int:
        return next(iter(self.scores.values())).shape[0]

    @property
    def intermediate(self) -> int:
        return next(iter(self.scores.values())).shape[1]

    @property
    def kept_neurons(self) -> int:
        """Neurons kept per layer."""
        return kept_count(self.intermediate, self.ratio, self.multiple)

    def kept(self, task: str, layer: int) -> Tensor:
        """Neurons kept for `task` in `layer`: ascending int64 [kept_neurons]; equal scores keep the lower index."""
        if task not in self.scores:
            raise KeyError(f"task: expected one of {', '.join(self.scores)}, got {task!r}")
        order = torch.sort(self.scores[task][layer], descending=True, stable=True).indices
        return order[: self.kept_neurons].sort().values

    def layouts(self) -> list[NeuronLayout]:
        """For each layer the permutation that makes the tasks' sets contiguous."""
        return [
            NeuronLayout.build(self.intermediate, {task: self.kept(task, layer) for task in self.tasks})
            for layer in range(self.layers)
        ]

    def with_ratio(self, ratio: float, multiple: int | None = None) -> TaskPlan:
        """The same scores, pruned further or less."""
        return TaskPlan(
            self.scores, ratio, self.multiple if multiple is None else multiple, self.fingerprint, self.notes
        )

    def check_model(self, model: Any) -> None:
        """Raises ValueError where the plan was not made for this model."""
        layers = model.showo.model.layers
        shape = (len(layers), layers[0].mlp.down_proj.weight.shape[1])
        if shape != (self.layers, self.intermediate):
            raise ValueError(
                f"plan: made for {self.layers} layers of {self.intermediate} neurons, the model has {shape[0]} of {shape[1]}"
            )
        if self.fingerprint is not None:
            actual = model_fingerprint(model)
            if actual != self.fingerprint:
                raise ValueError(
                    f"plan: made for another model (fingerprint {self.fingerprint[:12]}..., this model has {actual[:12]}...); "
                    "calibrate again with flashu_ext.calibrate"
                )

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as safetensors with JSON metadata, atomically."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "tasks": list(self.tasks),
            "ratio": self.ratio,
            "multiple": self.multiple,
            "fingerprint": self.fingerprint,
            "notes": dict(self.notes),
        }
        tensors = {f"score.{task}": score for task, score in self.scores.items()}
        save_safetensors(path, tensors, {"plan": json.dumps(header, allow_nan=False)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any | None = None) -> TaskPlan:
        """Read a plan; with `model`, refuse one that was made for another model.

        Raises:
            ValueError: not a plan, damaged, of an unknown version, with unknown or missing fields, or for another model.
        """
        tensors, metadata = load_safetensors(path)
        if set(metadata) != {"plan"}:
            raise ValueError(f"{path}: expected a task plan (metadata 'plan'), got metadata {sorted(metadata)}")
        header = strict_json(metadata["plan"], f"{path}: plan")
        fields = {"format", "version", "tasks", "ratio", "multiple", "fingerprint", "notes"}
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}")
        if header.get("version") != VERSION:
            raise ValueError(f"{path}: expected version {VERSION}, got {header.get('version')!r}")
        if set(header) != fields:
            raise ValueError(f"{path}: expected fields {sorted(fields)}, got {sorted(header)}")
        tasks = header["tasks"]
        if (
            not isinstance(tasks, list)
            or not all(isinstance(task, str) for task in tasks)
            or len(set(tasks)) != len(tasks)
        ):
            raise ValueError(f"{path}: tasks: expected distinct names, got {tasks!r:.200}")
        if set(tensors) != {f"score.{task}" for task in tasks}:
            raise ValueError(f"{path}: expected scores of {tasks}, got tensors {sorted(tensors)}")
        if not isinstance(header["notes"], dict):
            raise ValueError(f"{path}: notes: expected an object, got {type(header['notes']).__name__}")
        if not (header["fingerprint"] is None or isinstance(header["fingerprint"], str)):
            raise ValueError(f"{path}: fingerprint: expected a string or null, got {header['fingerprint']!r:.80}")
        for name, tensor in tensors.items():
            if tensor.dim() != 2 or tensor.dtype != torch.float32 or tensor.numel() == 0:
                raise ValueError(
                    f"{path}: {name}: expected fp32 [layers, neurons], got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: {name}: expected finite scores")
        try:
            plan = cls(
                {task: tensors[f"score.{task}"] for task in tasks},
                header["ratio"],
                header["multiple"],
                header["fingerprint"],
                header["notes"],
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if model is not None:
            plan.check_model(model)
        return plan
