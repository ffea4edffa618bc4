"""The activation statistics of every FFN neuron that calibration measures, and importance scores from them.

A run accumulates three sums per neuron and task: tokens, activations, squares of activations. Every estimator is computed
from these and W_down, so another estimator needs no second run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .groups import is_int
from .reading import shown

__all__ = ["ESTIMATORS", "Calibration", "DownNorms", "NeuronSums", "check_estimator"]


@dataclass(frozen=True)
class NeuronSums:
    """One task's sums over the activations h that enter W_down.

    Attributes:
        tokens: number of tokens.
        total: sum of h_j over them, fp64 [layers, intermediate].
        squares: sum of h_j^2, the same shape.
    """

    tokens: int
    total: Tensor
    squares: Tensor

    def __post_init__(self) -> None:
        if not is_int(self.tokens) or self.tokens < 1:
            raise ValueError(f"tokens: expected an integer >= 1, got {shown(self.tokens)}")
        if self.tokens >= 2**63:
            raise ValueError(f"tokens: expected an integer below 2^63, got {shown(self.tokens)}")
        for name, value in (("total", self.total), ("squares", self.squares)):
            _check_matrix(name, value, torch.float64, tuple(self.total.shape))
        if (self.squares < 0).any():
            raise ValueError("squares: expected no negative sums")

    @property
    def variance(self) -> Tensor:
        """Sample variance of every neuron's activation over the tokens, fp64 [layers, intermediate]."""
        # Rounding may put a constant neuron slightly below zero.
        centred = (self.squares - self.total.square() / self.tokens).clamp_min(0)
        return centred / max(self.tokens - 1, 1)


@dataclass(frozen=True)
class DownNorms:
    """Column norms of every layer's W_down.

    Attributes:
        absolute: sum of abs(W_down[:, j]), fp32 [layers, intermediate].
        squares: sum of W_down[:, j]^2, the same shape.
    """

    absolute: Tensor
    squares: Tensor

    def __post_init__(self) -> None:
        for name, value in (("absolute", self.absolute), ("squares", self.squares)):
            _check_matrix(name, value, torch.float32, tuple(self.absolute.shape))
            if (value < 0).any():
                raise ValueError(f"{name}: expected no negative norms")

    @classmethod
    def from_projections(cls, projections: Sequence[nn.Linear]) -> DownNorms:
        """The norms of each layer's down projection, weights [hidden, intermediate]."""
        weights = [_numbers(projection.weight.detach()) for projection in projections]
        return cls(
            torch.stack([weight.float().abs().sum(0) for weight in weights]).cpu(),
            torch.stack([weight.float().square().sum(0) for weight in weights]).cpu(),
        )


def _numbers(weight: Any) -> Tensor:
    """A weight, or the numbers that a quantizer's tensor stands for."""
    return weight if type(weight) is Tensor else weight.dequantize()


def _wanda(sums: NeuronSums, down: DownNorms) -> Tensor:
    return down.absolute * sums.squares.sqrt()


def _flap(sums: NeuronSums, down: DownNorms) -> Tensor:
    return sums.variance * down.squares


def _reconstruction(sums: NeuronSums, down: DownNorms) -> Tensor:
    return sums.squares * down.squares


ESTIMATORS: Mapping[str, Callable[[NeuronSums, DownNorms], Tensor]] = {
    "wanda": _wanda,
    "flap": _flap,
    "reconstruction": _reconstruction,
}
"""Scores [layers, intermediate] by name, larger is more important:

- wanda: sum of abs(W_down[:, j]) times the L2 norm of neuron j. Source: Flash-Unified's reference code; after Wanda, arXiv
  2306.11695, summed over a neuron's outgoing weights.
- flap: variance of neuron j times the squared norm of its column of W_down: the error from replacing the neuron by its mean.
  Source: FLAP, arXiv 2312.11983, its weighted input feature variance.
- reconstruction: sum over tokens of h_j^2 times the squared norm of its column: the squared error of the FFN's output when
  only neuron j is pruned. Source: the diagonal of Optimal Brain Damage (LeCun 1989), which is exact for the squared error of
  a linear layer's output.
"""


def check_estimator(name: object) -> str:
    """Raise ValueError if `name` is not an estimator."""
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {shown(name)}")
    return name


@dataclass(frozen=True)
class Calibration:
    """The measurements of a run.

    Attributes:
        sums: task -> sums over its tokens.
        down: norms of the model's down projections.
        times: the times at which generation tasks were measured.
        layer_importance: task -> fp32 [rows, layers]: 1 - cosine(input, output) of every decoder layer, the last one's output
            after the final norm. A generation task has one row per time, the mean over its tokens; an understanding task has
            one row, of the token that predicts the first answer token.
        mean_layer_importance: understanding task -> the mean over all tokens instead, fp32 [layers].
        drawing_down: norms of the drawing experts' down projections, whose neurons a generation task's then are; None: the model
            has no such experts.
    """

    sums: Mapping[str, NeuronSums]
    down: DownNorms
    times: tuple[float, ...]
    layer_importance: Mapping[str, Tensor]
    mean_layer_importance: Mapping[str, Tensor]
    drawing_down: DownNorms | None = None

    def __post_init__(self) -> None:
        times = self.times
        if not all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t <= 1 for t in times):
            raise ValueError(f"times: expected numbers in [0, 1], got {shown(list(times))}")
        if not self.sums or set(self.sums) != set(self.layer_importance):
            raise ValueError(
                f"layer_importance: expected the tasks {sorted(self.sums)}, got {sorted(self.layer_importance)}"
            )
        if set(self.mean_layer_importance) - set(self.sums):
            raise ValueError(f"mean_layer_importance: unknown tasks {sorted(self.mean_layer_importance)}")
        shape = tuple(self.down.absolute.shape)
        if self.drawing_down is not None:
            _check_matrix("drawing_down", self.drawing_down.absolute, torch.float32, shape)
        for task, sums in self.sums.items():
            if tuple(sums.total.shape) != shape:
                raise ValueError(f"sums[{task!r}]: expected shape {shape}, got {tuple(sums.total.shape)}")
            rows = 1 if task in self.mean_layer_importance else len(times)
            importance = self.layer_importance[task]
            _check_matrix(f"layer_importance[{task!r}]", importance, torch.float32, (rows, shape[0]))
        for task, mean in self.mean_layer_importance.items():
            _check_matrix(f"mean_layer_importance[{task!r}]", mean[None], torch.float32, (1, shape[0]))

    def scores(self, estimator: str) -> dict[str, Tensor]:
        """task -> scores fp32 [layers, intermediate] by `estimator`.

        Raises:
            ValueError: no such estimator, or a score beyond fp32.
        """
        function = ESTIMATORS[check_estimator(estimator)]
        scores = {task: function(sums, self._down_of(task)).float() for task, sums in self.sums.items()}
        for task, score in scores.items():
            _check_matrix(f"scores[{task!r}] by {estimator}", score, torch.float32, tuple(self.down.absolute.shape))
        return scores

    def _down_of(self, task: str) -> DownNorms:
        if self.drawing_down is None or task in self.mean_layer_importance:
            return self.down
        return self.drawing_down


def _check_matrix(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or value.dim() != 2 or value.numel() == 0 or tuple(value.shape) != shape:
        raise ValueError(
            f"{name}: expected {dtype} of shape {list(shape) if len(shape) == 2 else '[layers, neurons]'}, "
            f"got {tuple(value.shape)} {value.dtype}"
        )
    if not torch.isfinite(value).all():
        layer, neuron = torch.nonzero(~torch.isfinite(value))[0].tolist()
        raise ValueError(f"{name}: expected finite numbers, got {float(value[layer, neuron])} at [{layer}, {neuron}]")


def standardized(scores: Tensor) -> Tensor:
    """Scores [layers, intermediate], comparable between layers: mean subtracted, divided by the standard deviation per layer.

    Source: FLAP, arXiv 2312.11983, its adaptive structure search. A layer of equal scores becomes zero.
    """
    wide = scores.double()
    centred = wide - wide.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(math.ulp(0.0))
