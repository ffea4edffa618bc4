"""The groups of a `FlashUConfig`: one frozen, self-validating record for each approximation or switch.

Docstrings name the symbols of the Flash-Unified paper (arXiv 2603.15271). Counts of skipped layers, tokens and neurons are
rounded down.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard

from .reading import shown

__all__ = [
    "TOKEN_SCORES",
    "Answers",
    "EncoderSharing",
    "Execution",
    "FfnPruning",
    "Guidance",
    "GuidancePhase",
    "HeadCaching",
    "LayerSkip",
    "TokenSkip",
]

GuidancePhase = tuple[int, float]

TOKEN_SCORES = ("value_norm", "value_norm_small", "attention", "random")
"""Rules that choose the visual tokens to drop; see `Answers.token_prune_score`."""

MAX_STEPS = 10_000
"""Grid points of an image. More are a mistake, for which a plan of every step would be made first."""

Check = Callable[[str, Any], Any]
"""(name, value) -> the value as stored; raises a ValueError with the name, what was expected and what was given."""


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(value: Any) -> int | None:
    """An integer as Python's, also NumPy's; None for a bool and for all that is no integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):
        return None


def is_real(value: object) -> bool:
    """Also of whole numbers that no float can hold, for which `math.isfinite` raises."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def real(value: Any) -> float | None:
    """A finite number as Python's float, also NumPy's; None for a bool and for all that is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def steps_of(name: str, value: Any, least: int, unit: str) -> int | None:
    """A caller's number of steps; None where there is none.

    Args:
        least: 2 of grid points, 1 of evaluations, of which there is one less.
        unit: which of them, for messages.

    Raises:
        ValueError: anything else.
    """
    number, most = whole(value), MAX_STEPS - 2 + least
    if value is not None and (number is None or not least <= number <= most):
        raise ValueError(f"{name}: expected an integer in [{least}, {most}] ({unit}), got {shown(value)}")
    return number


def expect(expected: str, holds: Callable[[Any], bool]) -> Check:
    def check(name: str, value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
        return value

    return check


PHASES = "a list of (evaluations >= 1, scale > 0)"


def check_phases(name: str, value: Any, expected: str = PHASES) -> tuple[GuidancePhase, ...]:
    phases = expect(expected, lambda v: _is_list(v) and len(v) > 0)(name, value)
    is_phase = expect(expected, _is_phase)
    return tuple((phase[0], float(phase[1])) for phase in phases if is_phase(name, phase))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_phase(value: Any) -> bool:
    if not _is_list(value) or len(value) != 2:
        return False
    count, scale = value
    return is_int(count) and count >= 1 and is_real(scale) and scale > 0


Ratio = Annotated[float, expect("a number in [0, 1)", lambda v: is_real(v) and 0 <= v < 1)]
Count = Annotated[int, expect("an integer >= 0", lambda v: is_int(v) and v >= 0)]
Positive = Annotated[int, expect("an integer >= 1", lambda v: is_int(v) and v >= 1)]
Budget = Annotated[float, expect("a finite number >= 0", lambda v: is_real(v) and v >= 0)]
Order = Annotated[int, expect("an integer from 0 to 8", lambda v: is_int(v) and 0 <= v <= 8)]
Score = Annotated[str, expect(f"one of {', '.join(TOKEN_SCORES)}", lambda v: v in TOKEN_SCORES)]
Switch = Annotated[bool, expect("True or False", lambda v: isinstance(v, bool))]
KernelChoice = Annotated[bool | str, expect("True, False or 'flashu'", lambda v: isinstance(v, bool) or v == "flashu")]
Phases = Annotated[tuple[GuidancePhase, ...], check_phases]


@functools.cache
def checks(record: type) -> Mapping[str, Check]:
    """The checks in the annotations of a dataclass's fields."""
    hints = typing.get_type_hints(record, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def brief(record: Any) -> str:
    """A dataclass's repr without the fields that have their defaults."""
    shown = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(record)
        if (value := getattr(record, field.name)) != field.default
    ]
    return f"{type(record).__name__}({', '.join(shown)})"


class _Group:
    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, check in checks(kind).items():
            object.__setattr__(self, name, check(f"{kind.__name__}.{name}", getattr(self, name)))

    def __repr__(self) -> str:
        return brief(self)

    @property
    def approximates(self) -> tuple[str, ...]:
        """Names of the fields whose values change the outputs."""
        return ()

    @property
    def idle(self) -> dict[str, str]:
        """Fields that ask for an approximation which another field keeps off -> that field."""
        return {}


@dataclass(frozen=True, repr=False)
class FfnPruning(_Group):
    """FFN neurons pruned in every layer, by a task plan.

    Attributes:
        ratio: fraction of the neurons (r_p), in [0, 1). Needs a plan when above 0.
        multiple: kept neurons per layer are a multiple of this.
    """

    ratio: Ratio
    multiple: Positive = 64

    @property
    def approximates(self) -> tuple[str, ...]:
        return ("ratio",) if self.ratio > 0 else ()


@dataclass(frozen=True, repr=False)
class LayerSkip(_Group):
    """Layers of the language model skipped in generation: the least important ones by the last measurement.

    Attributes:
        ratio: fraction of the layers (r_LS), in [0, 1).
        interval: evaluations between two measurements (T_LS); 0 = never skip.
    """

    ratio: Ratio
    interval: Count

    def count(self, layers: int) -> int:
        """How many of `layers` are skipped."""
        return int(layers * self.ratio)

    @property
    def approximates(self) -> tuple[str, ...]:
        return ("ratio",) if self.ratio > 0 and self.interval > 0 else ()

    @property
    def idle(self) -> dict[str, str]:
        return {"ratio": "interval"} if self.ratio > 0 and self.interval == 0 else {}


@dataclass(frozen=True, repr=False)
class TokenSkip(_Group):
    """Image tokens skipped in generation: those whose state a layer hardly changes bypass it on the residual path; the others
    are gathered, computed and scattered back.

    Attributes:
        ratio: fraction of the image tokens skipped in every layer, in [0, 1). The time token is always computed.
        interval: evaluations between two measurements of token importance; a measuring evaluation skips nothing, so 1 never
            skips.
        forecast: between measurements importance is extrapolated linearly from the last two; False uses the last one.
        on: False computes every token, whatever the fields above.
    """

    ratio: Ratio
    interval: Positive = 5
    forecast: Switch = False
    on: Switch = True

    def count(self, image_tokens: int) -> int:
        """How many of `image_tokens` (time token excluded) a layer skips."""
        return int(image_tokens * self.ratio)

    @property
    def approximates(self) -> tuple[str, ...]:
        return ("on",) if self.on and self.ratio > 0 and self.interval > 1 else ()

    @property
    def idle(self) -> dict[str, str]:
        if self.ratio == 0 or self.approximates:
            return {}
        return {"ratio": "interval" if self.on else "on"}


@dataclass(frozen=True, repr=False)
class HeadCaching(_Group):
    """The diffusion head's state, stored in some evaluations and reused in others.

    Attributes:
        interval: evaluations between two updates of the stored state (T_cache); 0 = no cache.
        order: how the state is predicted for a later evaluation: 0 reuses it, others (to 8) extrapolate by finite differences.
        residual: a cached evaluation runs the language model and replaces the head's blocks by what they last added to their
            input; False reuses their output and runs no language model.
        adaptive: decide while running which evaluations are cached, by the drift of a cheap early signal since the head last
            ran. `interval` is then the largest distance between two computations (0: any). Full-network and measuring
            evaluations are never cached. Images of a batch share every decision, so a result depends on its batch.
        budget: if adaptive, the sum of relative L1 changes of that signal at which the head is computed again, >= 0; 0
            always computes.
    """

    interval: Count = 0
    order: Order = 0
    residual: Switch = False
    adaptive: Switch = False
    budget: Budget = 0.0

    @property
    def approximates(self) -> tuple[str, ...]:
        if self.adaptive:
            how = ("adaptive",) if self.budget > 0 else ()
        else:
            how = ("interval",) if self.interval > 1 else ()
        return (*how, "residual") if how and self.residual else how


@dataclass(frozen=True, repr=False)
class EncoderSharing(_Group):
    """Features of the SigLIP encoder, shared by several evaluations; full-network steps always encode.

    Attributes:
        interval: evaluations that share them.
        on: False encodes in every evaluation, whatever the interval.
    """

    interval: Positive = 2
    on: Switch = True

    @property
    def approximates(self) -> tuple[str, ...]:
        return ("on",) if self.on and self.interval > 1 else ()


@dataclass(frozen=True, repr=False, eq=False)
class Guidance(_Group, Sequence[GuidancePhase]):
    """Guidance scale by phases; after the last one the caller's scale applies. Behaves as the tuple of its phases.

    Attributes:
        phases: (evaluations, scale) of each, at least one.
        relative: the scales multiply the caller's instead of replacing it.
    """

    phases: Phases
    relative: Switch = False

    def at(self, step: int, scale: float) -> float:
        """Scale of evaluation `step` (from 1), given the caller's `scale`."""
        last = 0
        for count, value in self.phases:
            last += count
            if step <= last:
                return value * scale if self.relative else value
        return scale

    @property
    def approximates(self) -> tuple[str, ...]:
        return ("phases",)

    def __len__(self) -> int:
        return len(self.phases)

    def __getitem__(self, index: Any) -> Any:
        return self.phases[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Guidance):
            return (self.phases, self.relative) == (other.phases, other.relative)
        return self.phases == other

    def __hash__(self) -> int:
        return hash(self.phases)


@dataclass(frozen=True, repr=False)
class Answers(_Group):
    """Approximations while a question is answered.

    Attributes:
        token_prune_ratio: fraction of an image's tokens dropped, in [0, 1).
        token_prune_layer: LLM layer, from 0, that scores the tokens; dropped ones are missing from its attention on.
        token_prune_score: which tokens are dropped. 'value_norm': those with the largest value vectors (the paper's); for
            comparison 'value_norm_small': the smallest, 'attention': least attended by the question's last token, 'random'
            (seeded).
        layer_skip_ratio: fraction of LLM layers that an answer's tokens skip, in [0, 1): those that changed the direction of
            the prompt's last token least (r_LS for understanding). The prompt runs through all layers.
    """

    token_prune_ratio: Ratio = 0.0
    token_prune_layer: Count = 2
    token_prune_score: Score = "value_norm"
    layer_skip_ratio: Ratio = 0.0

    def layers_skipped(self, layers: int) -> int:
        """How many of `layers` an answer's tokens skip."""
        return int(layers * self.layer_skip_ratio)

    @property
    def approximates(self) -> tuple[str, ...]:
        return tuple(name for name in ("token_prune_ratio", "layer_skip_ratio") if getattr(self, name) > 0)


@dataclass(frozen=True, repr=False)
class Execution(_Group):
    """How the same results are computed; only rounding depends on it.

    Attributes:
        ffn_kernels, linear_kernels, attention_kernels, routing_kernels, norm_kernels, step_kernels: use this library's kernels
            of that family. True: where there are any, else plain torch, and `handle.summary()` says why. 'flashu': everywhere,
            or `accelerate` raises `fx.kernel_sets.KernelUnavailableError`. False runs plain torch instead, so that a difference
            can be bisected.
        batch_invariant: an image's or an answer's bits do not depend on what else is in its batch, on threads or on what was
            asked before. True: or `accelerate` raises. None: on the CPU, where every kernel is this library's.
        step_graphs: on a GPU, evaluations are captured in CUDA graphs and replayed; False launches every operator each time.
        skip_unit_guidance: an evaluation whose guidance scale is exactly 1 runs the conditional branch alone, as
            v_null + 1 (v - v_null) = v.
    """

    ffn_kernels: KernelChoice = True
    linear_kernels: KernelChoice = True
    attention_kernels: KernelChoice = True
    routing_kernels: KernelChoice = True
    norm_kernels: KernelChoice = True
    step_kernels: KernelChoice = True
    step_graphs: Switch = True
    skip_unit_guidance: Switch = False
    batch_invariant: Annotated[
        bool | None, expect("True, False or None", lambda v: v is None or isinstance(v, bool))
    ] = None

    def invariant_on(self, device_type: str) -> bool:
        """`batch_invariant` on a kind of device ('cpu', 'cuda')."""
        return device_type == "cpu" if self.batch_invariant is None else self.batch_invariant
