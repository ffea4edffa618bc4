"""Task plans: per task neuron scores, the neurons kept by pruning, and layer importance.

A plan is independent of the runtime: it is made from scores, saved as safetensors with validated JSON metadata, loaded,
and checked against a model by shape and fingerprint before anything is changed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .decoders import decoder_of
from .estimators import Calibration, DownNorms, NeuronSums, check_estimator, standardized
from .fingerprint import check_fingerprint, model_fingerprint
from .groups import FfnPruning, is_int, is_real
from .neurons import NeuronLayout, aligned_sets
from .reading import printable, refusal, shown, strict_json
from .safe_files import load_safetensors, save_safetensors

__all__ = ["TaskPlan", "kept_count"]

FORMAT = "flashu_ext.task_plan"
VERSION = 2
_FIELDS_1 = {"format", "version", "tasks", "ratio", "multiple", "fingerprint", "notes"}
_FIELDS = {1: _FIELDS_1, 2: _FIELDS_1 | {"ratios", "calibration"}}


def kept_count(intermediate: int, ratio: float, multiple: int) -> int:
    """Neurons kept of `intermediate` when `ratio` of them is pruned: rounded down to `multiple`, at least one.

    Source: Flash-Unified's reference code, `structural_pruning.py`.
    """
    ideal = intermediate - int(intermediate * ratio)
    kept = ideal // multiple * multiple
    if kept == 0:
        kept = multiple if multiple <= intermediate else max(ideal, 1)
    return kept


def check_pruning(ratio: Any, multiple: Any, name: str = "ratio") -> None:
    """Raise ValueError if `ratio` or `multiple` is out of range."""
    if not is_real(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {shown(ratio)}")
    if not is_int(multiple) or multiple < 1:
        raise ValueError(f"multiple: expected an integer >= 1, got {shown(multiple)}")


def _check_scores(task: str, scores: Any) -> Tensor:
    if not isinstance(scores, (list, tuple)) and getattr(scores, "ndim", 0) == 2:
        scores = list(torch.as_tensor(scores))
    if not isinstance(scores, (list, tuple)) or not scores:
        raise ValueError(
            f"{task}: expected a non-empty list with one score tensor per layer, or scores [layers, neurons], got "
            f"{type(scores).__name__}"
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


@dataclass(frozen=True, repr=False)
class TaskPlan:
    """Neuron scores per task and the pruning by them. Made by `from_scores` or `flashu_ext.calibrate`.

    Attributes:
        scores: task -> fp32 [layers, intermediate]; larger is more important.
        ratio: fraction pruned per layer (r_p); with `ratios`, their mean.
        multiple: kept neurons are a multiple of this.
        fingerprint: `model_fingerprint` of the model it was made for, or None.
        notes: JSON values for the user.
        ratios: fraction pruned in each layer; None: `ratio` in all.
        calibration: the measurements behind the scores; None: scores were given.
        estimator: how scores were computed from the calibration, or None.
    """

    scores: Mapping[str, Tensor]
    ratio: float
    multiple: int
    fingerprint: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    ratios: tuple[float, ...] | None = None
    calibration: Calibration | None = None
    estimator: str | None = None

    def __post_init__(self) -> None:
        check_pruning(self.ratio, self.multiple)
        if not self.scores:
            raise ValueError("scores: expected at least one task (generation=... or understanding=...), got none")
        shapes = {task: tuple(score.shape) for task, score in self.scores.items()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"scores: expected the same layers and neurons for every task, got {shapes}")
        if self.ratios is not None:
            if len(self.ratios) != self.layers:
                raise ValueError(f"ratios: expected one for each of {self.layers} layers, got {len(self.ratios)}")
            for layer, ratio in enumerate(self.ratios):
                check_pruning(ratio, self.multiple, f"ratios[{layer}]")
        if (self.calibration is None) != (self.estimator is None):
            raise ValueError("estimator: expected one with a calibration, and none without")

    def __repr__(self) -> str:
        """Short: what is kept for which tasks; `describe` says more, the attributes all."""
        counts = self.kept_counts
        kept = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        tasks = printable(", ".join(self.tasks), 200)
        return f"TaskPlan({tasks}: {kept} of {self.intermediate} neurons kept in each of {self.layers} layers)"

    @classmethod
    def from_scores(
        cls,
        *,
        generation: Sequence[Tensor] | Tensor | None = None,
        understanding: Sequence[Tensor] | Tensor | None = None,
        ratio: float = 0.2,
        multiple: int = 64,
        model: Any | None = None,
        **other_tasks: Sequence[Tensor] | Tensor,
    ) -> TaskPlan:
        """A plan from neuron scores.

        Args:
            generation, understanding, other_tasks: per task scores [layers, intermediate], a tensor or an array, or one fp
                tensor [intermediate] per layer. A task without scores runs on all neurons.
            ratio: fraction pruned per layer.
            multiple: kept counts are rounded down to it.
            model: the model that the scores belong to; its fingerprint is stored in the plan.

        Raises:
            ValueError: no task, NaN or infinite scores, or shapes that differ between layers.
        """
        given = {"generation": generation, "understanding": understanding, **other_tasks}
        scores = {task: _check_scores(task, value) for task, value in given.items() if value is not None}
        plan = cls(scores, ratio, multiple, model_fingerprint(model) if model is not None else None)
        if model is not None:
            plan.check_model(model)
        return plan

    @classmethod
    def from_calibration(
        cls,
        calibration: Calibration,
        *,
        estimator: str = "wanda",
        ratio: float = 0.2,
        multiple: int = 64,
        model: Any | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> TaskPlan:
        """A plan from the measurements of `flashu_ext.calibrate`; arguments as there and in `from_scores`.

        Raises:
            ValueError: unknown estimator, or a calibration of another model.
        """
        fingerprint = model_fingerprint(model) if model is not None else None
        scores = calibration.scores(estimator)
        plan = cls(scores, ratio, multiple, fingerprint, notes or {}, None, calibration, estimator)
        if model is not None:
            plan.check_model(model)
        return plan

    # ---- contents

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
    def kept_counts(self) -> tuple[int, ...]:
        """Neurons kept in each layer, the same for every task."""
        ratios = self.ratios if self.ratios is not None else (self.ratio,) * self.layers
        return tuple(kept_count(self.intermediate, ratio, self.multiple) for ratio in ratios)

    @property
    def kept_neurons(self) -> int:
        """Neurons kept per layer; the rounded mean where layers differ."""
        return round(sum(self.kept_counts) / self.layers)

    @property
    def layer_importance(self) -> Mapping[str, Tensor]:
        """task -> fp32 [rows, layers], see `Calibration.layer_importance`; empty where the scores were given."""
        return self.calibration.layer_importance if self.calibration else {}

    @property
    def times(self) -> tuple[float, ...]:
        """Times of the rows of `layer_importance`, for generation tasks."""
        return self.calibration.times if self.calibration else ()

    def kept(self, task: str, layer: int) -> Tensor:
        """Neurons kept for `task` in `layer`: ascending int64 [kept_counts[layer]]; of equal scores the lower index.

        The first task's are its best. Of a further task's a few borderline ones are exchanged, so that the runs of the
        layout start and end at multiples of 64; see `flashu_ext.planning.neurons.aligned_sets`.
        """
        if task not in self.scores:
            raise KeyError(f"task: expected one of {', '.join(self.scores)}, got {task!r}")
        return self._sets(layer)[task]

    def _sets(self, layer: int) -> dict[str, Tensor]:
        scores = {task: by_layer[layer] for task, by_layer in self.scores.items()}
        return aligned_sets(scores, self.kept_counts[layer], self.multiple)

    def layouts(self) -> list[NeuronLayout]:
        """For each layer the permutation that makes the tasks' sets contiguous."""
        return [NeuronLayout.build(self.intermediate, self._sets(layer)) for layer in range(self.layers)]

    def describe(self) -> str:
        """A readable summary: neurons kept, and every task's layer importance (mean over its rows)."""
        counts = self.kept_counts
        kept = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
        source = f"by {self.estimator}" if self.estimator else "by given scores"
        lines = [f"kept      {kept} of {self.intermediate} neurons per layer, {source}"]
        for task in self.tasks:
            line = f"task      {task}"
            if self.calibration is not None:
                importance = " ".join(f"{value:.3f}" for value in self.layer_importance[task].mean(0).tolist())
                line += f": {self.calibration.sums[task].tokens} tokens, layer importance {importance}"
            lines.append(line)
        return "\n".join(lines)

    # ---- other pruning by the same scores

    def with_ratio(self, ratio: float, multiple: int | None = None) -> TaskPlan:
        """The same scores pruned by another ratio, equal for all layers."""
        return replace(self, ratio=ratio, multiple=self.multiple if multiple is None else multiple, ratios=None)

    def with_pruning(self, ffn: FfnPruning | None) -> TaskPlan:
        """The same scores pruned as a config's `ffn` says; None prunes nothing."""
        ffn = ffn or FfnPruning(0.0)
        return self.with_ratio(ffn.ratio, ffn.multiple)

    def with_ratios(self, ratios: Sequence[float]) -> TaskPlan:
        """The same scores with a ratio for each layer. `ratio` becomes their mean, rounded to six digits."""
        ratios = tuple(ratios)
        if len(ratios) != self.layers:
            raise ValueError(f"ratios: expected one for each of {self.layers} layers, got {len(ratios)}")
        for layer, ratio in enumerate(ratios):
            check_pruning(ratio, self.multiple, f"ratios[{layer}]")
        return replace(self, ratio=round(math.fsum(ratios) / len(ratios), 6), ratios=ratios)

    def with_adaptive_ratios(self, ratio: float | None = None) -> TaskPlan:
        """Distribute the neurons that a uniform `ratio` (None: the plan's) would keep over the layers, by their scores.

        For each task, scores are standardized per layer and ranked over all layers. A layer gets the mean of its counts in the
        tasks' rankings, rounded to `multiple` with an unchanged total, and at least one `multiple`. If layers have fewer
        neurons than `multiple`, the ratio stays uniform. Source: FLAP, arXiv 2312.11983, its adaptive structure search.
        """
        uniform = self.with_ratio(self.ratio if ratio is None else ratio)
        largest = self.intermediate // self.multiple
        if largest == 0:
            return uniform
        budget = sum(uniform.kept_counts)
        wanted = torch.zeros(self.layers, dtype=torch.float64, device="cpu")
        for scores in self.scores.values():
            best = torch.sort(standardized(scores).flatten(), descending=True, stable=True).indices[:budget]
            wanted += torch.bincount(best // self.intermediate, minlength=self.layers)
        units = _apportion((wanted / len(self.scores) / self.multiple).tolist(), budget // self.multiple, largest)
        ratios = tuple(_ratio_that_keeps(self.intermediate, unit * self.multiple, self.multiple) for unit in units)
        return replace(uniform, ratios=ratios)

    def with_estimator(self, name: str) -> TaskPlan:
        """The same calibration scored by another estimator (`estimators.ESTIMATORS`). Layer ratios do not change.

        Raises:
            ValueError: unknown estimator, or the plan was made from given scores.
        """
        check_estimator(name)
        if self.calibration is None:
            raise ValueError("plan: expected one made by flashu_ext.calibrate, this one was made from given scores")
        return replace(self, scores=self.calibration.scores(name), estimator=name)

    def check_model(self, model: Any) -> None:
        """Raise ValueError if the plan was made for another model, TypeError if it is none."""
        ffns = decoder_of(model).ffns
        shape = (len(ffns), ffns[0].down_proj.weight.shape[1])
        if shape != (self.layers, self.intermediate):
            raise ValueError(
                f"plan: made for {self.layers} layers of {self.intermediate} neurons, the model has {shape[0]} of {shape[1]}"
            )
        if self.fingerprint is not None:
            actual = check_fingerprint(model, self.fingerprint)
            if actual is not None:
                raise ValueError(
                    f"plan: made for another model (fingerprint {self.fingerprint[:12]}..., this model has {actual[:12]}...); "
                    "calibrate this one with flashu_ext.calibrate, also where it was quantised since or an adapter was merged"
                )

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as safetensors with JSON metadata, atomically.

        Raises:
            ValueError: the notes are no JSON that `load` takes. OSError: the file cannot be written.
        """
        measured = self.calibration
        header = {
            "format": FORMAT,
            "version": VERSION,
            "tasks": list(self.tasks),
            "ratio": self.ratio,
            "multiple": self.multiple,
            "fingerprint": self.fingerprint,
            "notes": dict(self.notes),
            "ratios": list(self.ratios) if self.ratios is not None else None,
            "calibration": None,
        }
        if measured is None:
            tensors = {f"score.{task}": score for task, score in self.scores.items()}
        else:
            header["calibration"] = {
                "estimator": self.estimator,
                "times": list(measured.times),
                "tokens": {task: sums.tokens for task, sums in measured.sums.items()},
            }
            tensors = _measured_tensors(measured)
        text = json.dumps(header, allow_nan=False)
        strict_json(text, "plan")  # `load` would refuse it too, then too late; notes are the caller's
        save_safetensors(path, tensors, {"plan": text})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any | None = None) -> TaskPlan:
        """Read a plan; with `model`, refuse one that was made for another model.

        Raises:
            ValueError: not a plan, damaged, of an unknown version, with unknown or missing fields, or for another model.
        """
        tensors, metadata = load_safetensors(path)
        if set(metadata) != {"plan"}:
            raise refusal(path, f"expected a task plan (metadata 'plan'), got metadata {shown(sorted(metadata))}")
        header = strict_json(metadata["plan"], f"{os.fspath(path)}: plan")
        try:
            plan = _read(header, tensors)
            if model is not None:
                plan.check_model(model)
        except ValueError as error:
            raise refusal(path, error) from error
        return plan


# ---- file contents


def _measured_tensors(measured: Calibration) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, norms in (("down", measured.down), ("drawing_down", measured.drawing_down)):
        if norms is not None:
            tensors |= {f"{name}.absolute": norms.absolute, f"{name}.squares": norms.squares}
    for task, sums in measured.sums.items():
        tensors |= {f"total.{task}": sums.total, f"squares.{task}": sums.squares}
        tensors[f"importance.{task}"] = measured.layer_importance[task]
    tensors |= {f"mean_importance.{task}": mean for task, mean in measured.mean_layer_importance.items()}
    return tensors


def _read(header: Any, tensors: Mapping[str, Tensor]) -> TaskPlan:
    """A plan from a file's header and tensors; raises ValueError without the file's name."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT!r}")
    version = header.get("version")
    if type(version) is not int or version not in _FIELDS:
        raise ValueError(f"expected version 1 or 2, got {shown(version)}")
    if set(header) != _FIELDS[version]:
        raise ValueError(f"expected fields {sorted(_FIELDS[version])}, got {shown(sorted(header))}")
    tasks = header["tasks"]
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks) or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: expected distinct names, got {shown(tasks)}")
    if not isinstance(header["notes"], dict):
        raise ValueError(f"notes: expected an object, got {type(header['notes']).__name__}")
    if not (header["fingerprint"] is None or isinstance(header["fingerprint"], str)):
        raise ValueError(f"fingerprint: expected a string or null, got {shown(header['fingerprint'])}")
    ratios, record = header.get("ratios"), header.get("calibration")
    if not (ratios is None or isinstance(ratios, list)):
        raise ValueError(f"ratios: expected a list or null, got {shown(ratios)}")
    calibration, estimator = None, None
    if record is None:
        scores = _read_scores(tasks, tensors)
    else:
        if not isinstance(record, dict) or set(record) != {"estimator", "times", "tokens"}:
            raise ValueError(f"calibration: expected estimator, times and tokens, got {shown(record)}")
        estimator = check_estimator(record["estimator"])
        calibration = _read_calibration(tasks, record["times"], record["tokens"], tensors)
        scores = calibration.scores(estimator)
    return TaskPlan(
        scores,
        header["ratio"],
        header["multiple"],
        header["fingerprint"],
        header["notes"],
        tuple(ratios) if ratios is not None else None,
        calibration,
        estimator,
    )


def _read_scores(tasks: list[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if set(tensors) != {f"score.{task}" for task in tasks}:
        raise ValueError(f"expected scores of {shown(tasks)}, got tensors {shown(sorted(tensors))}")
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.dtype != torch.float32 or tensor.numel() == 0:
            raise ValueError(f"{name}: expected fp32 [layers, neurons], got {tuple(tensor.shape)} {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite scores")
    return {task: tensors[f"score.{task}"] for task in tasks}


def _read_calibration(tasks: list[str], times: Any, tokens: Any, tensors: Mapping[str, Tensor]) -> Calibration:
    if not isinstance(times, list):
        raise ValueError(f"calibration.times: expected a list, got {shown(times)}")
    if not isinstance(tokens, dict) or set(tokens) != set(tasks):
        raise ValueError(f"calibration.tokens: expected a count for each of {shown(tasks)}, got {shown(tokens)}")
    answering = [task for task in tasks if f"mean_importance.{task}" in tensors]
    expected = {f"{kind}.{task}" for task in tasks for kind in ("total", "squares", "importance")}
    norms = ["down", "drawing_down"] if "drawing_down.absolute" in tensors else ["down"]
    expected |= {f"{name}.{kind}" for name in norms for kind in ("absolute", "squares")}
    expected |= {f"mean_importance.{task}" for task in answering}
    if set(tensors) != expected:
        raise ValueError(f"expected tensors {shown(sorted(expected), 200)}, got {shown(sorted(tensors), 200)}")
    down, *drawing = (DownNorms(tensors[f"{name}.absolute"], tensors[f"{name}.squares"]) for name in norms)
    return Calibration(
        {task: NeuronSums(tokens[task], tensors[f"total.{task}"], tensors[f"squares.{task}"]) for task in tasks},
        down,
        tuple(times),
        {task: tensors[f"importance.{task}"] for task in tasks},
        {task: tensors[f"mean_importance.{task}"] for task in answering},
        drawing[0] if drawing else None,
    )


# ---- layer ratios


def _apportion(wanted: Sequence[float], budget: int, largest: int) -> list[int]:
    """Integers in [1, largest] near `wanted` that sum to `budget`; needs len(wanted) <= budget.

    By largest remainders; of equal ones the lower layer.
    """
    units = [min(max(int(value), 1), largest) for value in wanted]
    while sum(units) < budget:
        open_layers = [layer for layer, unit in enumerate(units) if unit < largest]
        units[max(open_layers, key=lambda layer: wanted[layer] - units[layer])] += 1
    while sum(units) > budget:
        open_layers = [layer for layer, unit in enumerate(units) if unit > 1]
        units[max(open_layers, key=lambda layer: units[layer] - wanted[layer])] -= 1
    return units


def _ratio_that_keeps(intermediate: int, kept: int, multiple: int) -> float:
    """A ratio from which `kept_count` makes exactly `kept`."""
    ratio = (intermediate - kept) / intermediate
    # intermediate * ratio may round to just below the whole number, which `kept_count` then rounds down.
    return ratio if kept_count(intermediate, ratio, multiple) == kept else math.nextafter(ratio, 1.0)
