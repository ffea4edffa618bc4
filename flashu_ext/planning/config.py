"""What to accelerate and how far, as one frozen, self-validating record; knows nothing of models.

Field names are plain words; the symbols of the Flash-Unified paper (arXiv 2603.15271) stand beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRESETS = ("dense", "exact", "paper", "fast")
"""Names of the presets; dense is the model as it is."""

__all__ = ["TOKEN_SCORES", "FlashUConfig", "GuidancePhase"]

GuidancePhase = tuple[int, float]

TOKEN_SCORES = ("value_norm", "value_norm_small", "attention", "random")
"""Rules that choose the visual tokens to drop; see `FlashUConfig.token_prune_score`."""


def _fail(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"FlashUConfig.{name}: expected {expected}, got {got!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_SWITCHES = (
    "guidance_relative",
    "token_skip",
    "token_skip_forecast",
    "head_residual_reuse",
    "adaptive_cache",
    "encoder_cache",
    "skip_unit_guidance",
    "ffn_kernels",
    "routing_kernels",
    "norm_kernels",
    "step_kernels",
    "step_graphs",
)


@dataclass(frozen=True)
class FlashUConfig:
    """Settings of an accelerated model. Start from a preset and override: ``FlashUConfig.paper(steps=35)``.

    Generation counts its evaluations from 1; ``steps`` grid points are ``steps - 1`` evaluations.

    Attributes:
        ffn_prune_ratio: fraction of FFN neurons left out per layer (r_p), in [0, 1). Needs a plan when above 0.
        full_network_steps: the last steps that run the whole network (tau): a count, or a fraction of
            ``steps`` in (0, 1), rounded half up. An evaluation runs it when its number exceeds ``steps - tau``.
        layer_skip_ratio: fraction of LLM layers skipped (r_LS), rounded down, in [0, 1).
        layer_skip_interval: evaluations between two measurements of layer importance (T_LS); 0 = never skip.
        head_cache_interval: the head's state is computed and kept every this many evaluations (T_cache); 0 = no cache.
        head_forecast_order: how a cached head state is carried forward: 0 reuses it, 1 and 2 extrapolate by
            finite differences.
        steps: grid points of the ODE, or None: as the caller says.
        guidance: phases ``(evaluations, scale)`` of the guidance scale, or None: the caller's scale throughout.
            After the last phase the caller's scale holds.
        guidance_relative: the scales in ``guidance`` multiply the caller's scale instead of replacing it.
        token_prune_ratio: fraction of an image's tokens dropped while answering, the count rounded down, in [0, 1).
        token_prune_layer: LLM layer, from 0, that scores them; it and the layers after it go on without the dropped ones.
        token_prune_score: who is dropped. 'value_norm': the largest value vectors (the paper's); for comparison
            'value_norm_small': the smallest, 'attention': least looked at by the question's last token, 'random' (seeded).
        answer_layer_skip_ratio: fraction of LLM layers, rounded down, that an answer's tokens skip: those that turned the
            prompt's last token least (r_LS while understanding). The prompt itself runs through all layers. In [0, 1).
        prune_multiple: kept neurons per layer are a multiple of this.
        token_skip: image tokens whose state a layer hardly changes are carried past it by the residual path while the
            others are gathered, computed and scattered back. Drawing only.
        token_skip_ratio: fraction of the image tokens carried past every layer, rounded down, in [0, 1). The time token
            is always computed.
        token_skip_interval: evaluations between two measurements of token importance, >= 1; a measuring evaluation
            skips nothing, so 1 skips never.
        token_skip_forecast: between measurements importance is extrapolated linearly from the last two; False takes
            the last one.
        head_residual_reuse: a cached evaluation runs the language model and replaces the head's blocks by what they
            added to their input when they last ran; False carries their output forward and runs no language model.
        adaptive_cache: whether an evaluation outside the full-network steps is cached is decided while running, by how
            far a cheap early signal has moved since the head last ran. `head_cache_interval` then is the largest
            distance between two computations (0: any). Measuring evaluations are never cached; images of one batch share
            every decision, so here a result does depend on its batch.
        adaptive_cache_budget: the sum of relative L1 changes of that signal at which the head is computed again, >= 0;
            0 computes always.
        encoder_cache: features of the SigLIP encoder are reused across evaluations, never in full-network steps.
        encoder_cache_interval: evaluations that share them, >= 1.
        skip_unit_guidance: an evaluation whose guidance scale is exactly 1 runs the conditional branch alone, as
            v_null + 1 (v - v_null) = v. Only rounding changes.
        ffn_kernels, routing_kernels, norm_kernels, step_kernels: use this library's kernels of that family; False
            runs plain torch instead, so that a difference can be bisected.
        step_graphs: on a GPU evaluations are captured in CUDA graphs and replayed; False launches every operator anew.

    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    ffn_prune_ratio: float = 0.0
    full_network_steps: int | float = 0
    layer_skip_ratio: float = 0.0
    layer_skip_interval: int = 0
    head_cache_interval: int = 0
    head_forecast_order: int = 0
    steps: int | None = None
    guidance: Sequence[GuidancePhase] | None = None
    guidance_relative: bool = False
    token_prune_ratio: float = 0.0
    token_prune_layer: int = 2
    token_prune_score: str = "value_norm"
    answer_layer_skip_ratio: float = 0.0
    prune_multiple: int = 64
    token_skip: bool = False
    token_skip_ratio: float = 0.0
    token_skip_interval: int = 5
    token_skip_forecast: bool = False
    head_residual_reuse: bool = False
    adaptive_cache: bool = False
    adaptive_cache_budget: float = 0.0
    encoder_cache: bool = False
    encoder_cache_interval: int = 2
    skip_unit_guidance: bool = False
    ffn_kernels: bool = True
    routing_kernels: bool = True
    norm_kernels: bool = True
    step_kernels: bool = True
    step_graphs: bool = True

    def __post_init__(self) -> None:
        ratios = (
            "ffn_prune_ratio",
            "layer_skip_ratio",
            "token_prune_ratio",
            "answer_layer_skip_ratio",
            "token_skip_ratio",
        )
        for name in ratios:
            value = getattr(self, name)
            if not _is_real(value) or not 0 <= value < 1:
                raise _fail(name, "a number in [0, 1)", value)
        tau = self.full_network_steps
        if not (_is_int(tau) and tau >= 0) and not (isinstance(tau, float) and 0 <= tau < 1):
            raise _fail("full_network_steps", "a count of steps >= 0 or a fraction in [0, 1)", tau)
        for name in ("layer_skip_interval", "head_cache_interval", "token_prune_layer"):
            value = getattr(self, name)
            if not _is_int(value) or value < 0:
                raise _fail(name, "an integer >= 0", value)
        for name in ("prune_multiple", "token_skip_interval", "encoder_cache_interval"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise _fail(name, "an integer >= 1", value)
        if not _is_real(self.adaptive_cache_budget) or self.adaptive_cache_budget < 0:
            raise _fail("adaptive_cache_budget", "a finite number >= 0", self.adaptive_cache_budget)
        if not _is_int(self.head_forecast_order) or self.head_forecast_order not in (0, 1, 2):
            raise _fail("head_forecast_order", "0, 1 or 2", self.head_forecast_order)
        if self.steps is not None and (not _is_int(self.steps) or self.steps < 2):
            raise _fail("steps", "None or an integer >= 2 (grid points)", self.steps)
        if self.token_prune_score not in TOKEN_SCORES:
            raise _fail("token_prune_score", f"one of {', '.join(TOKEN_SCORES)}", self.token_prune_score)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _fail(name, "True or False", getattr(self, name))
        object.__setattr__(self, "guidance", self._checked_guidance())
        if self.guidance is None and self.guidance_relative:
            raise _fail("guidance_relative", "False when guidance is None", True)

    def _checked_guidance(self) -> tuple[GuidancePhase, ...] | None:
        if self.guidance is None:
            return None
        expected = "None or a list of (evaluations >= 1, scale > 0)"
        if isinstance(self.guidance, (str, bytes)) or not isinstance(self.guidance, Sequence) or not self.guidance:
            raise _fail("guidance", expected, self.guidance)
        phases = []
        for phase in self.guidance:
            if isinstance(phase, (str, bytes)) or not isinstance(phase, Sequence) or len(phase) != 2:
                raise _fail("guidance", expected, phase)
            count, scale = phase
            if not _is_int(count) or count < 1 or not _is_real(scale) or scale <= 0:
                raise _fail("guidance", expected, phase)
            phases.append((count, float(scale)))
        return tuple(phases)

    # ---- presets

    @classmethod
    def exact(cls, **overrides: Any) -> FlashUConfig:
        """Nothing is approximated: outputs equal the unmodified model's up to rounding. Overrides may not change that."""
        config = cls(**overrides)
        if config.approximates:
            raise ValueError(
                f"FlashUConfig.exact: expected no approximating field, got {', '.join(config.approximates)}"
            )
        return config

    @classmethod
    def paper(cls, **overrides: Any) -> FlashUConfig:
        """Flash-Unified's own settings for Show-o2 1.5B (paper Table 7 and its reference code).

        35 grid points instead of 50; 20 % of the FFN neurons and of the layers left out; the last 0.3 * 35 = 11 steps
        run the whole network; guidance at 0.75 of the caller's scale before that and at the caller's scale after.
        """
        steps = overrides.get("steps", 35)
        settings: dict[str, Any] = {
            "ffn_prune_ratio": 0.20,
            "full_network_steps": 0.3,
            "layer_skip_ratio": 0.20,
            "layer_skip_interval": 10,
            "head_cache_interval": 5,
            "steps": steps,
        }
        settings.update(overrides)
        if "guidance" not in overrides and _is_int(steps) and steps >= 2:
            tail = cls(full_network_steps=settings["full_network_steps"]).full_steps(steps)
            phases = [(steps - tail, 0.75), (tail, 1.0)]
            settings["guidance"] = tuple(p for p in phases if p[0] >= 1)
            settings["guidance_relative"] = True
        return cls(**settings)

    @classmethod
    def fast(cls, fidelity: float = 0.99, **overrides: Any) -> FlashUConfig:
        """The cheapest settings known to keep `fidelity` of the dense model's right drawings and right answers.

        They were found by `flashu-ext tune` on the embedded model and are shipped in tuned.json, with what was measured. They
        carry over to another model only as a starting point: calibrate it, and tune on it.

        Args:
            fidelity: what must be left, in (0, 1]. The settings tuned for the least fidelity that is not below it are taken;
                where there are none, nothing is approximated.

        Raises:
            ValueError: fidelity is out of range, or an override is.
        """
        if not _is_real(fidelity) or not 0 < fidelity <= 1:
            raise ValueError(f"fidelity: expected a number in (0, 1], got {fidelity!r}")
        found = [entry for entry in _tuned() if entry["fidelity"] >= fidelity]
        if not found:
            return cls(**overrides)
        best = min(found, key=lambda entry: float(entry["fidelity"]))
        return cls(**(best["config"] | overrides))

    # ---- derived

    @property
    def approximates(self) -> tuple[str, ...]:
        """Names of the fields whose values change the outputs."""
        adaptive = self.adaptive_cache and self.adaptive_cache_budget > 0
        fixed = not self.adaptive_cache and self.head_cache_interval > 1
        active = {
            "ffn_prune_ratio": self.ffn_prune_ratio > 0,
            "layer_skip_ratio": self.layer_skip_ratio > 0 and self.layer_skip_interval > 0,
            "token_skip": self.token_skip and self.token_skip_ratio > 0 and self.token_skip_interval > 1,
            "head_cache_interval": fixed,
            "adaptive_cache": adaptive,
            "head_residual_reuse": self.head_residual_reuse and (fixed or adaptive),
            "encoder_cache": self.encoder_cache and self.encoder_cache_interval > 1,
            "guidance": self.guidance is not None,
            "token_prune_ratio": self.token_prune_ratio > 0,
            "answer_layer_skip_ratio": self.answer_layer_skip_ratio > 0,
        }
        return tuple(name for name, on in active.items() if on)

    def full_steps(self, steps: int) -> int:
        """tau as a count for `steps` grid points (a fraction is rounded half up, as 0.3 * 35 = 10.5 -> 11)."""
        if isinstance(self.full_network_steps, float):
            return math.floor(self.full_network_steps * steps + 0.5)
        return self.full_network_steps

    def guidance_at(self, step: int, scale: float) -> float:
        """Guidance scale of evaluation `step` (from 1) where the caller asked for `scale`."""
        last = 0
        for count, value in self.guidance or ():
            last += count
            if step <= last:
                return value * scale if self.guidance_relative else value
        return scale

    def replace(self, **overrides: Any) -> FlashUConfig:
        """A copy with other values; unknown names raise TypeError."""
        return dataclasses.replace(self, **overrides)

    # ---- JSON

    def to_json(self) -> str:
        """All fields as a JSON object, readable by `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FlashUConfig:
        """Read what `to_json` wrote. Unknown or repeated fields, NaN and Infinity are refused.

        Raises:
            ValueError: not a JSON object of known fields, or a value is out of range.
        """
        data = strict_json(text, "FlashUConfig")
        if not isinstance(data, dict):
            raise ValueError(f"FlashUConfig: expected a JSON object, got {type(data).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"FlashUConfig: unknown field {unknown[0]!r}; known fields: {', '.join(sorted(known))}")
        return cls(**data)


def preset(name: str, **overrides: Any) -> FlashUConfig | None:
    """A preset by its name; 'dense' is None.

    Raises:
        ValueError: no such preset, or an override is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    make = {"exact": FlashUConfig.exact, "paper": FlashUConfig.paper, "fast": FlashUConfig.fast}.get(name)
    return make(**overrides) if make is not None else None


@functools.cache
def _tuned() -> list[dict[str, Any]]:
    text = (Path(__file__).parent / "tuned.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = strict_json(text, "tuned.json")["settings"]
    return entries


def strict_json(text: str, name: str) -> Any:
    """`json.loads` that refuses repeated keys, NaN and Infinity; errors begin with `name`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise ValueError(f"{name}: key {key!r} appears twice")
            result[key] = value
        return result

    def constant(token: str) -> Callable[[], Any]:
        raise ValueError(f"{name}: {token} is not allowed")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from error
