"""The settings of acceleration: a frozen, self-validating record of groups, independent of models."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar, overload

from .groups import (
    MAX_STEPS,
    PHASES,
    Answers,
    EncoderSharing,
    Execution,
    FfnPruning,
    Guidance,
    GuidancePhase,
    HeadCaching,
    LayerSkip,
    TokenSkip,
    brief,
    check_phases,
    checks,
    expect,
    is_int,
    is_real,
)
from .reading import read_json, refusal, shown, strict_json

__all__ = ["FLAT_KEYWORDS", "PRESETS", "FlashUConfig", "preset"]

PRESETS = ("dense", "exact", "paper", "fast")
"""Names of the presets; dense is the unmodified model."""

T = TypeVar("T")

_OWN_KERNELS = Execution()

Steps = Annotated[
    int | None,
    expect(
        f"None or an integer >= 2 (grid points), at most {MAX_STEPS}",
        lambda v: v is None or (is_int(v) and 2 <= v <= MAX_STEPS),
    ),
]
FullSteps = Annotated[
    int | float,
    expect(
        "a count of steps >= 0 or a fraction in [0, 1)",
        lambda v: (is_int(v) and v >= 0) or (isinstance(v, float) and 0 <= v < 1),
    ),
]


class _Flat(Generic[T]):
    """A flat keyword: one field of one group. As an attribute of a config it reads that field, or `off` where the group is
    None."""

    def __init__(self, group: str, field: str, off: T):
        self.group, self.field, self.off = group, field, off

    @overload
    def __get__(self, config: None, owner: type) -> Self: ...
    @overload
    def __get__(self, config: FlashUConfig, owner: type) -> T: ...
    def __get__(self, config: FlashUConfig | None, owner: type) -> Any:
        if config is None:
            return self
        group = getattr(config, self.group)
        return self.off if group is None else getattr(group, self.field)


@dataclass(frozen=True, init=False, repr=False)
class FlashUConfig:
    """Settings of an accelerated model. Start from a preset and override: ``FlashUConfig.paper(steps=35)``.

    Every group is None (off) or a record; see `flashu_ext.planning.groups`. Each field of a group also has a flat keyword:
    ``FlashUConfig(ffn_prune_ratio=0.2)`` is ``FlashUConfig(ffn=FfnPruning(0.2))``. Constructor, presets, `replace` and JSON
    accept both; given with its group, a flat keyword overrides that one field. A group whose flat keywords all have their
    defaults is None.

    Generation counts its evaluations from 1; ``steps`` grid points are ``steps - 1`` evaluations.

    Attributes:
        steps: grid points of the ODE; None: the caller's.
        full_network_steps: the last steps that run the whole network (tau): a count, or a fraction of
            ``steps`` in (0, 1), rounded half up. An evaluation runs it when its number exceeds ``steps - tau``.
        ffn: neuron pruning.
        layers: language-model layers skipped in generation.
        tokens: image tokens skipped in generation.
        head: caching of the diffusion head's state.
        encoder: sharing of encoder features.
        guidance: guidance scale by phases; None: the caller's throughout. A plain list of (evaluations, scale) works too.
        answers: token pruning and layer skipping in understanding.
        execution: kernels and graphs.

    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what was given.
        TypeError: an unknown keyword.
    """

    steps: Steps = None
    full_network_steps: FullSteps = 0
    ffn: FfnPruning | None = None
    layers: LayerSkip | None = None
    tokens: TokenSkip | None = None
    head: HeadCaching | None = None
    encoder: EncoderSharing | None = None
    guidance: Guidance | None = None
    answers: Answers | None = None
    execution: Execution = _OWN_KERNELS

    # Flat keywords: each with its group and field, and the value it has where that group is None.
    ffn_prune_ratio = _Flat("ffn", "ratio", 0.0)
    prune_multiple = _Flat("ffn", "multiple", 64)
    layer_skip_ratio = _Flat("layers", "ratio", 0.0)
    layer_skip_interval = _Flat("layers", "interval", 0)
    token_skip = _Flat("tokens", "on", False)
    token_skip_ratio = _Flat("tokens", "ratio", 0.0)
    token_skip_interval = _Flat("tokens", "interval", 5)
    token_skip_forecast = _Flat("tokens", "forecast", False)
    head_cache_interval = _Flat("head", "interval", 0)
    head_forecast_order = _Flat("head", "order", 0)
    head_residual_reuse = _Flat("head", "residual", False)
    adaptive_cache = _Flat("head", "adaptive", False)
    adaptive_cache_budget = _Flat("head", "budget", 0.0)
    encoder_cache = _Flat("encoder", "on", False)
    encoder_cache_interval = _Flat("encoder", "interval", 2)
    guidance_relative = _Flat("guidance", "relative", False)
    token_prune_ratio = _Flat("answers", "token_prune_ratio", 0.0)
    token_prune_layer = _Flat("answers", "token_prune_layer", 2)
    token_prune_score = _Flat("answers", "token_prune_score", "value_norm")
    answer_layer_skip_ratio = _Flat("answers", "layer_skip_ratio", 0.0)
    ffn_kernels = _Flat("execution", "ffn_kernels", True)
    linear_kernels = _Flat("execution", "linear_kernels", True)
    attention_kernels = _Flat("execution", "attention_kernels", True)
    routing_kernels = _Flat("execution", "routing_kernels", True)
    norm_kernels = _Flat("execution", "norm_kernels", True)
    step_kernels = _Flat("execution", "step_kernels", True)
    step_graphs = _Flat("execution", "step_graphs", True)
    skip_unit_guidance = _Flat("execution", "skip_unit_guidance", False)
    batch_invariant = _Flat("execution", "batch_invariant", None)

    def __init__(
        self,
        *,
        steps: int | None = None,
        full_network_steps: int | float = 0,
        ffn: FfnPruning | None = None,
        layers: LayerSkip | None = None,
        tokens: TokenSkip | None = None,
        head: HeadCaching | None = None,
        encoder: EncoderSharing | None = None,
        guidance: Guidance | Sequence[GuidancePhase] | None = None,
        answers: Answers | None = None,
        execution: Execution | None = None,
        **flat: Any,
    ) -> None:
        for name in flat:
            if name not in FLAT_KEYWORDS:
                raise TypeError(_unknown_keyword(name))
        groups = {"ffn": ffn, "layers": layers, "tokens": tokens, "head": head, "encoder": encoder, "answers": answers}
        for name, value in (("steps", steps), ("full_network_steps", full_network_steps)):
            object.__setattr__(self, name, checks(FlashUConfig)[name](f"FlashUConfig.{name}", value))
        for name, group in groups.items():
            object.__setattr__(self, name, _record(name, group, flat))
        object.__setattr__(self, "guidance", _guidance(guidance, flat))
        object.__setattr__(self, "execution", _record("execution", execution, flat) or _OWN_KERNELS)

    def __repr__(self) -> str:
        return brief(self)

    # ---- presets

    @classmethod
    def exact(cls, **overrides: Any) -> FlashUConfig:
        """No approximation: outputs equal the unmodified model's up to rounding. Overrides may not change that."""
        config = cls(**overrides)
        if config.approximates:
            raise ValueError(
                f"FlashUConfig.exact: expected no approximating field, got {', '.join(config.approximates)}"
            )
        return config

    @classmethod
    def paper(cls, **overrides: Any) -> FlashUConfig:
        """Flash-Unified's own settings for Show-o2 1.5B (paper Table 7 and its reference code).

        35 grid points instead of 50; 20 % of the FFN neurons pruned and 20 % of the layers skipped; the last
        0.3 * 35 = 11 steps run the whole network; guidance at 0.75 of the caller's scale before that and at the caller's
        scale after. Both scales are factors whatever `guidance_relative` is, unless `guidance` is given.
        """
        settings = {"steps": 35, "full_network_steps": 0.3} | overrides
        if "guidance" not in overrides and settings["steps"] is not None:
            counts = cls(steps=settings["steps"], full_network_steps=settings["full_network_steps"])
            tail = counts.full_steps(settings["steps"])
            phases = [(settings["steps"] - tail, 0.75), (tail, 1.0)]
            settings["guidance"] = Guidance(tuple(phase for phase in phases if phase[0] >= 1), relative=True)
            settings.pop("guidance_relative", None)
        return cls(ffn=FfnPruning(0.20), layers=LayerSkip(0.20, 10), head=HeadCaching(5)).replace(**settings)

    @classmethod
    def fast(cls, fidelity: float = 0.99, **overrides: Any) -> FlashUConfig:
        """The cheapest settings known to preserve `fidelity` of the dense model's correct images and answers.

        They were found by `flashu-ext tune` on the embedded model and are in tuned.json, with the measurements. For another
        model they are only a starting point: calibrate and tune it.

        Args:
            fidelity: in (0, 1]. Uses the settings tuned for the lowest fidelity that is at least this; without any, nothing
                is approximated.

        Raises:
            ValueError: fidelity is out of range, or an override is.
        """
        if not is_real(fidelity) or not 0 < fidelity <= 1:
            raise ValueError(f"fidelity: expected a number in (0, 1], got {fidelity!r}")
        found = [entry for entry in _tuned() if entry["fidelity"] >= fidelity]
        if not found:
            return cls(**overrides)
        best = min(found, key=lambda entry: float(entry["fidelity"]))
        return cls.from_json(json.dumps(best["config"])).replace(**overrides)

    # ---- derived

    @property
    def approximates(self) -> tuple[str, ...]:
        """Flat keywords of the fields whose values change the outputs."""
        return tuple(_FLAT[name, field] for name, record in self._records() for field in record.approximates)

    @property
    def idle(self) -> tuple[str, ...]:
        """'field=value has no effect with other=value', in flat keywords, for settings that another one keeps off."""
        found = []
        for name, record in self._records():
            for pair in record.idle.items():
                asked, off = (f"{_FLAT[name, field]}={getattr(record, field)!r}" for field in pair)
                found.append(f"{asked} has no effect with {off}")
        return tuple(found)

    def _records(self) -> list[tuple[str, Any]]:
        """The groups that are not None."""
        return [(name, record) for name in _GROUPS if (record := getattr(self, name)) is not None]

    @property
    def needs_plan(self) -> bool:
        """Whether FFN neurons are pruned, which requires a `TaskPlan`."""
        return self.ffn is not None and self.ffn.ratio > 0

    def full_steps(self, steps: int) -> int:
        """tau as a count for `steps` grid points; a fraction is rounded half up: 0.3 * 35 = 10.5 -> 11."""
        if isinstance(self.full_network_steps, float):
            return math.floor(self.full_network_steps * steps + 0.5)
        return self.full_network_steps

    def guidance_at(self, step: int, scale: float) -> float:
        """Guidance scale of evaluation `step` (from 1), given the caller's `scale`."""
        return scale if self.guidance is None else self.guidance.at(step, scale)

    def replace(self, **overrides: Any) -> FlashUConfig:
        """A copy with other values of groups or flat keywords; a flat keyword leaves the rest of its group unchanged.

        Raises:
            TypeError: an unknown name.
        """
        phases = overrides.get("guidance")
        if phases is not None and not isinstance(phases, Guidance):
            overrides.setdefault("guidance_relative", self.guidance_relative)
        return dataclasses.replace(self, **overrides)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat keyword; ``FlashUConfig(**config.flat())`` is this config."""
        phases = None if self.guidance is None else self.guidance.phases
        own = {"steps": self.steps, "full_network_steps": self.full_network_steps}
        return own | {name: getattr(self, name) for name in FLAT_KEYWORDS} | {"guidance": phases}

    # ---- JSON

    def to_json(self) -> str:
        """All settings as a JSON object of groups, readable by `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FlashUConfig:
        """Read the JSON of `to_json`, or an object of flat keywords. Unknown or repeated fields, NaN and Infinity are refused.

        Raises:
            ValueError: not a JSON object of known fields, a field both in its group and flat, or a value out of range.
        """
        data = strict_json(text, "FlashUConfig")
        if not isinstance(data, dict):
            raise ValueError(f"FlashUConfig: expected a JSON object, got {type(data).__name__}")
        _check_keys("FlashUConfig", data, {field.name for field in dataclasses.fields(cls)} | set(FLAT_KEYWORDS))
        for name in sorted(set(data) & set(FLAT_KEYWORDS) - {"guidance"}):
            group = FLAT_KEYWORDS[name][0]
            if group in data and (group != "guidance" or isinstance(data[group], dict)):
                raise ValueError(
                    f"FlashUConfig: expected either {group!r} or {name!r}, which is a field of it; got both"
                )
        return cls(**{name: _from_json(name, value) for name, value in data.items()})


_GROUPS: Mapping[str, type] = {
    "ffn": FfnPruning,
    "layers": LayerSkip,
    "tokens": TokenSkip,
    "head": HeadCaching,
    "encoder": EncoderSharing,
    "guidance": Guidance,
    "answers": Answers,
    "execution": Execution,
}

FLAT_KEYWORDS: Mapping[str, tuple[str, str]] = {
    name: (flat.group, flat.field) for name, flat in vars(FlashUConfig).items() if isinstance(flat, _Flat)
} | {"guidance": ("guidance", "phases")}
"""Flat keyword -> (group, field). The flat keyword of guidance phases is `guidance` itself, as a plain list."""

_FLAT: Mapping[tuple[str, str], str] = {where: name for name, where in FLAT_KEYWORDS.items()}

_OFF: Mapping[str, Any] = {
    name: kind(
        **{
            flat.field: flat.off
            for flat in vars(FlashUConfig).values()
            if isinstance(flat, _Flat) and flat.group == name
        }
    )
    for name, kind in _GROUPS.items()
    if kind is not Guidance
}
"""The record that None stands for, per group."""


def _unknown_keyword(name: str) -> str:
    own = {field.name for field in dataclasses.fields(FlashUConfig)}
    near = difflib.get_close_matches(name[:100], sorted(own | set(FLAT_KEYWORDS)), n=3)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"expected one of {', '.join(sorted(own))}, or a flat keyword; see help(FlashUConfig)"
    )
    return f"FlashUConfig: got an unexpected keyword argument {shown(name)}; {hint}"


def _record(name: str, group: Any, flat: Mapping[str, Any]) -> Any:
    """A group with its flat keywords applied; None where the result is what None stands for."""
    kind = _GROUPS[name]
    if group is not None and not isinstance(group, kind):
        raise ValueError(f"FlashUConfig.{name}: expected None or {kind.__name__}, got {shown(group)}")
    changes = {
        field: checks(kind)[field](f"FlashUConfig.{keyword}", flat[keyword])
        for keyword, (owner, field) in FLAT_KEYWORDS.items()
        if owner == name and keyword in flat
    }
    start: Any = _OFF[name] if group is None else group
    record = dataclasses.replace(start, **changes)
    return None if record == _OFF[name] else record


def _guidance(given: Any, flat: Mapping[str, Any]) -> Guidance | None:
    """Guidance from a record, a plain list of phases or None, and `guidance_relative`."""
    relative = {"relative": flat["guidance_relative"]} if "guidance_relative" in flat else {}
    for value in relative.values():
        checks(Guidance)["relative"]("FlashUConfig.guidance_relative", value)
    if given is None:
        if any(relative.values()):
            raise ValueError("FlashUConfig.guidance_relative: expected False when guidance is None, got True")
        return None
    if not isinstance(given, Guidance):
        given = Guidance(check_phases("FlashUConfig.guidance", given, f"None or {PHASES}"))
    return dataclasses.replace(given, **relative)


def _from_json(name: str, value: Any) -> Any:
    """A JSON value as an argument of the constructor."""
    kind = _GROUPS.get(name)
    if kind is None or not isinstance(value, dict):
        return value
    fields = dataclasses.fields(kind)
    _check_keys(kind.__name__, value, {field.name for field in fields})
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in value:
            raise ValueError(f"{kind.__name__}: expected a field {field.name!r}, got none")
    return kind(**value)


def _check_keys(name: str, data: Mapping[str, Any], known: set[str]) -> None:
    for key in sorted(set(data) - known):
        raise refusal(name, f"unknown field {shown(key)}; known fields: {', '.join(sorted(known))}")


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
    entries: list[dict[str, Any]] = read_json(Path(__file__).parent / "tuned.json")["settings"]
    return entries
