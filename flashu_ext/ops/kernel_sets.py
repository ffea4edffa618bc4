"""Chooses the implementation of every op of the runtime, for each phase of each task.

Two tables decide. `USES` has a row for each (task, phase, op) that the runtime calls. `KERNELS` has a row for each
implementation of an op, the preferred ones first; the first that serves device, dtype, sizes and settings is taken. Another
kernel is another row of `KERNELS`.

An explicit setting that no row can meet raises `KernelUnavailableError`. Otherwise plain torch runs (the reference functions),
and `describe` and `handle.summary()` say why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..planning.config import FlashUConfig
from ..planning.cost import LayerShape
from ..planning.groups import Answers, HeadCaching
from ..planning.op_cost import OP_COSTS, OpCost, PhaseShape
from . import reference
from .selection import Selection

__all__ = [
    "FAMILIES",
    "KERNELS",
    "ONE_BY_ONE",
    "PHASES",
    "USES",
    "Case",
    "Choice",
    "Kernel",
    "KernelSet",
    "KernelSets",
    "KernelUnavailableError",
    "Use",
    "resolve",
]

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "ffn": ("gathered_ffn",),
    "linear": ("linear", "linears"),
    "attention": ("attention",),
    "routing": ("cosine_importance", "value_norms", "select_topk", "gather_rows", "scatter_rows_"),
    "norm": ("rms_norm", "add_rms_norm_", "gate_add_", "rotary_cache_"),
    "step": ("guided_euler_step_", "feature_delta", "taylor_update_", "taylor_predict"),
}
"""Op names by family; FlashUConfig has one switch per family."""

FAMILY_OF: Mapping[str, str] = {op: family for family, ops_ in FAMILIES.items() for op in ops_}

PHASES: Mapping[str, tuple[str, ...]] = {
    "generation": ("embed", "backbone", "head", "measuring"),
    "understanding": ("embed", "prefill", "decode"),
}
"""The phases of each task. embed: images and times to embeddings. backbone, head: a drawing's language model and diffusion head,
the prompt before the image included. measuring: a pass that measures layers, and the measuring of tokens. prefill: a question.
decode: an answer's tokens."""

ONE_BY_ONE = "one by one"
"""The implementation of `linears` that calls `linear` for each."""


class KernelUnavailableError(ValueError):
    """A setting asks for a kernel or a promise that cannot be had here; the message names the op, its phase and what is
    missing."""


# ---- which ops a phase calls


@dataclass(frozen=True)
class Use:
    """An op that the runtime calls in a phase of a task.

    Attributes:
        task, phase, op: which.
        when: whether it does so under a config.

    Raises:
        ValueError: an unknown task, phase or op; the message lists the known ones.
    """

    task: str
    phase: str
    op: str
    when: Callable[[FlashUConfig], bool] = lambda config: True

    def __post_init__(self) -> None:
        _check_phase(self.task, self.phase)
        _check("op", self.op, FAMILY_OF)

    def cost(self, shape: PhaseShape) -> OpCost:
        """Predicted, of one run of the phase."""
        return OP_COSTS[self.op](shape)


def _check(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name!r}")


def _check_phase(task: str, phase: str) -> None:
    _check("task", task, PHASES)
    _check(f"phase of {task}", phase, PHASES[task])


def _measures(config: FlashUConfig) -> bool:
    return config.layers is not None and bool(config.layers.approximates)


def _routes(config: FlashUConfig) -> bool:
    return config.tokens is not None and bool(config.tokens.approximates)


def _updates(config: FlashUConfig) -> bool:
    """Whether differences of the head's states are kept; a state that is reused as it is is copied."""
    head = config.head or HeadCaching()
    return head.order > 0 and (head.adaptive or head.interval > 1)


def _predicts(config: FlashUConfig) -> bool:
    return _updates(config) and config.head is not None and bool(config.head.approximates)


def _drops(config: FlashUConfig) -> bool:
    return (config.answers or Answers()).token_prune_ratio > 0


def _scores_values(config: FlashUConfig) -> bool:
    return _drops(config) and (config.answers or Answers()).token_prune_score != "attention"


def _skips_in_answers(config: FlashUConfig) -> bool:
    return (config.answers or Answers()).layer_skip_ratio > 0


_ATTENTION = ("linear", "linears", "rotary_cache_", "attention", "gathered_ffn", "rms_norm")

USES: tuple[Use, ...] = (
    *(Use(task, "embed", op) for task in PHASES for op in ("linear", "linears", "attention", "rms_norm")),
    *(Use("generation", "backbone", op) for op in (*_ATTENTION, "add_rms_norm_")),
    Use("generation", "backbone", "select_topk", _routes),
    Use("generation", "backbone", "gather_rows", _routes),
    Use("generation", "backbone", "scatter_rows_", _routes),
    Use("generation", "backbone", "feature_delta", lambda config: config.head is not None and config.head.adaptive),
    *(Use("generation", "head", op) for op in (*_ATTENTION, "gate_add_", "guided_euler_step_")),
    Use("generation", "head", "taylor_update_", _updates),
    Use("generation", "head", "taylor_predict", _predicts),
    *(Use("generation", "measuring", op, _measures) for op in (*_ATTENTION, "add_rms_norm_")),
    Use("generation", "measuring", "gather_rows", _measures),
    Use("generation", "measuring", "scatter_rows_", _measures),
    Use("generation", "measuring", "cosine_importance", lambda config: _measures(config) or _routes(config)),
    *(Use("understanding", "prefill", op) for op in (*_ATTENTION, "add_rms_norm_")),
    Use("understanding", "prefill", "value_norms", _scores_values),
    Use("understanding", "prefill", "select_topk", _drops),
    Use("understanding", "prefill", "gather_rows", _drops),
    Use("understanding", "prefill", "cosine_importance", _skips_in_answers),
    *(Use("understanding", "decode", op) for op in (*_ATTENTION, "add_rms_norm_")),
)
"""Every op that the runtime calls, by task and phase."""


# ---- which implementations there are

_ALL_PHASES = tuple(dict.fromkeys(phase for phases in PHASES.values() for phase in phases))


@dataclass(frozen=True)
class Case:
    """What the choice of an implementation depends on.

    Attributes:
        task, phase, op: for which it is chosen.
        config: its switches, and with them what the plan prunes.
        device, dtype: of the model's weights.
        layer: sizes of the phase's transformer layers; None: unknown.
        replaced: why torch's own function must run, as users replace it; or None.
    """

    task: str
    phase: str
    op: str
    config: FlashUConfig
    device: torch.device
    dtype: torch.dtype
    layer: LayerShape | None = None
    replaced: str | None = None

    @property
    def switch(self) -> bool | str:
        """The setting of the op's family."""
        return getattr(self.config.execution, f"{FAMILY_OF[self.op]}_kernels")

    def __str__(self) -> str:
        return f"{self.task}, {self.phase}, {self.op} for {self.dtype} on {self.device.type}"


@dataclass(frozen=True)
class Kernel:
    """An implementation of an op.

    Attributes:
        op: which.
        implementation: its name, 'flashu' and 'torch' among others.
        function: called as `ops.<op>`; None: that function itself, which also knows what this build supports.
        devices, dtypes: that it serves; None: all.
        tasks, phases: that it serves.
        switches: values of the family's switch under which it may run.
        invariant: a row's bits do not depend on the other rows of a call, nor on their number.
        why_not: a further condition on settings and sizes: why it does not serve a case, or None.
        reason: why it is taken.
        microseconds: predicted for one run of a phase on an idle H100; None: not known.

    Raises:
        ValueError: an unknown op, task, phase or device; the message lists the known ones.
    """

    op: str
    implementation: str
    function: Callable[..., Any] | None = None
    devices: tuple[str, ...] | None = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] | None = (torch.float32, torch.bfloat16, torch.float16)
    tasks: tuple[str, ...] = tuple(PHASES)
    phases: tuple[str, ...] = _ALL_PHASES
    switches: tuple[bool | str, ...] = (True, "flashu")
    invariant: bool = True
    why_not: Callable[[Case], str | None] = lambda case: None
    reason: str = "this library's kernel"
    microseconds: Callable[[PhaseShape, torch.dtype], float | None] = lambda shape, dtype: None

    def __post_init__(self) -> None:
        _check("op", self.op, FAMILY_OF)
        for task in self.tasks:
            _check("task", task, PHASES)
        for phase in self.phases:
            _check("phase", phase, _ALL_PHASES)
        for device in self.devices or ():
            _check("device", device, ("cpu", "cuda"))

    def refuses(self, case: Case) -> str | None:
        """Why it does not serve a case, or None."""
        execution, switch = case.config.execution, case.switch
        if switch not in self.switches:
            return f"FlashUConfig.{FAMILY_OF[self.op]}_kernels is {switch!r}"
        if self.function is None and case.replaced is not None:
            return case.replaced
        served = self.devices is None or case.device.type in self.devices
        served &= self.dtypes is None or case.dtype in self.dtypes
        if served and self.function is None:
            served = getattr(ops, self.op).is_supported(case.device, case.dtype)
        if not served:
            name = "" if self.implementation == "flashu" else f" {self.implementation!r}"
            return (
                f"no {self.op} kernel{name} for {case.dtype} on {case.device.type} in this build (see flashu-ext info)"
            )
        if execution.batch_invariant and not self.invariant:
            return f"{self.implementation}'s {self.op} is not batch-invariant (FlashUConfig.batch_invariant is True)"
        return self.why_not(case)


def _unless_cublas(case: Case) -> str | None:
    if case.device.type != "cuda" or case.config.execution.batch_invariant or case.switch == "flashu":
        return None
    return "cuBLAS runs; FlashUConfig.batch_invariant takes the kernel"


def _unless_cublas_or_few_rows_differ(case: Case) -> str | None:
    return _unless_cublas(case) or _unless_few_rows_differ(case)


def _where_asked(case: Case) -> str | None:
    return None if case.config.execution.batch_invariant else "FlashUConfig.batch_invariant is not True"


MANY = 17
"""Rows from which the CUDA kernels of linear layers and of the FFN sum in one order; fewer have kernels of their own (of the FFN
in 16 bits only)."""


def _of_many_rows(run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    """run(x, residual), of rows of zeros too where there are few."""
    count = x.shape[:-1].numel()
    if count >= MANY:
        return run(x, residual)

    def padded(t: Tensor) -> Tensor:
        return torch.cat([t.reshape(count, t.shape[-1]), t.new_zeros(MANY - count, t.shape[-1])])

    out = run(padded(x), None if residual is None else padded(residual))
    return out[:count].reshape(*x.shape[:-1], out.shape[-1])


def _ffn_of_many_rows(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    residual: Tensor | None = None,
    selection: Selection | None = None,
) -> Tensor:
    return _of_many_rows(
        lambda x, residual: ops.gathered_ffn(x, w_gate, w_up, w_down, residual=residual, selection=selection),
        x,
        residual,
    )


def _linear_of_many_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
) -> Tensor:
    return _of_many_rows(lambda x, residual: ops.linear(x, weight, bias, residual, epilogue), x, residual)


def _linears_of_many_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    epilogue: str = "none",
) -> Tensor:
    return _of_many_rows(lambda x, residual: ops.linears(x, weights, biases, residual, epilogue), x, residual)


_PADDED: Mapping[str, Callable[..., Tensor]] = {
    "gathered_ffn": _ffn_of_many_rows,
    "linear": _linear_of_many_rows,
    "linears": _linears_of_many_rows,
}
"""Ops with kernels of their own for few rows on CUDA, as they run without these."""


def _unless_few_rows_differ(case: Case) -> str | None:
    few_differ = case.device.type == "cuda" and (case.dtype != torch.float32 or case.op != "gathered_ffn")
    return f"fewer than {MANY} rows are summed in another order" if few_differ and _where_asked(case) is None else None


def _padded_where_asked(case: Case) -> str | None:
    if not getattr(ops, case.op).is_supported(case.device, case.dtype):
        return "this build has no such kernel"
    return _where_asked(case)


_STAR = re.compile(r"^ +\S+ +\* .* (\d+) us predicted", re.MULTILINE)


def _ffn_microseconds(shape: PhaseShape, dtype: torch.dtype) -> float | None:
    """As the CUDA kernels' own choice predicts it (`ops.explain.explain_ffn`)."""
    from .explain import explain_ffn

    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    halves = _STAR.findall(explain_ffn(shape.tokens, shape.layer.width, shape.neurons, name, False))
    return shape.layers * float(sum(map(int, halves))) if len(halves) == 2 else None


_EXACT = ("select_topk", "gather_rows", "scatter_rows_")
"""Ops that compare and move numbers, so that torch's functions have the same bits for any batch."""

KERNELS: tuple[Kernel, ...] = (
    Kernel("gathered_ffn", "flashu", why_not=_unless_few_rows_differ, microseconds=_ffn_microseconds),
    Kernel("linear", "flashu", why_not=_unless_cublas_or_few_rows_differ),
    Kernel("linears", "flashu", why_not=_unless_cublas_or_few_rows_differ),
    *(
        Kernel(
            op, "flashu padded", function, devices=("cuda",), why_not=_padded_where_asked,
            reason=f"with rows of zeros where there are fewer than {MANY}",
        )
        for op, function in _PADDED.items()
    ),
    Kernel("attention", "flashu"),
    *(Kernel(op, "flashu") for family in ("routing", "norm", "step") for op in FAMILIES[family]),
    Kernel(
        "linears", ONE_BY_ONE, reference.linears, devices=None, dtypes=None, switches=(True, False, "flashu"),
        reason="each by linear",
    ),
    Kernel(
        "attention", "torch by rows", reference.attention_by_rows, devices=("cuda",), switches=(True, False),
        why_not=_where_asked, reason="rows that are called one at a time do not depend on each other",
    ),
    *(
        Kernel(
            op, "torch", getattr(reference, op), devices=None, dtypes=None, switches=(True, False),
            invariant=op in _EXACT, reason="plain torch",
        )
        for op in FAMILY_OF
    ),
)  # fmt: skip
"""All implementations, the preferred ones of an op first."""


# ---- the choice


@dataclass(frozen=True)
class Choice:
    """The implementation of one op in one phase, and why it is that one.

    Attributes:
        use, kernel: rows of the two tables.
        reason: the kernel's own, or why the preferred one does not serve.
        fell_back: whether this library's kernel was wanted and does not serve.
    """

    use: Use
    kernel: Kernel
    reason: str
    fell_back: bool

    @property
    def implementation(self) -> str:
        """Its name."""
        return self.kernel.implementation


@dataclass(frozen=True)
class KernelSet:
    """The functions that a phase calls, with a reason for each that is not this library's kernel.

    Attributes:
        chosen: op -> name of the implementation.
        fallbacks: op -> reason for plain torch.
    """

    gathered_ffn: Callable[..., Any]
    linear: Callable[..., Any]
    linears: Callable[..., Any]
    attention: Callable[..., Any]
    cosine_importance: Callable[..., Any]
    value_norms: Callable[..., Any]
    select_topk: Callable[..., Any]
    gather_rows: Callable[..., Any]
    scatter_rows_: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_rms_norm_: Callable[..., Any]
    gate_add_: Callable[..., Any]
    rotary_cache_: Callable[..., Any]
    guided_euler_step_: Callable[..., Any]
    feature_delta: Callable[..., Any]
    taylor_update_: Callable[..., Any]
    taylor_predict: Callable[..., Any]
    chosen: Mapping[str, str] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelSets:
    """The kernel set of every phase. Phases with the same functions have the same set.

    Attributes:
        sets: by (task, phase).
        choices: of the ops that the config makes each phase call.
    """

    sets: Mapping[tuple[str, str], KernelSet]
    choices: tuple[Choice, ...]

    def of(self, task: str, phase: str) -> KernelSet:
        """The set of a phase.

        Raises:
            ValueError: an unknown task or phase; the message lists the known ones.
        """
        _check_phase(task, phase)
        return self.sets[task, phase]

    @property
    def chosen(self) -> dict[str, str]:
        """op -> name of the implementation, or of all where phases differ."""
        names = {op: dict.fromkeys(each.chosen[op] for each in self.sets.values()) for op in FAMILY_OF}
        return {op: ", ".join(each) for op, each in names.items()}

    @property
    def fallbacks(self) -> dict[str, str]:
        """op -> reason for plain torch in any phase."""
        return {op: why for each in self.sets.values() for op, why in each.fallbacks.items()}


Layers = Mapping[tuple[str, str], LayerShape]
"""Sizes of the transformer layers of a (task, phase)."""


def resolve(
    config: FlashUConfig,
    device: torch.device,
    dtype: torch.dtype,
    why_not_attention: str | None = None,
    layers: Layers | None = None,
) -> KernelSets:
    """Choose an implementation for every op in every phase. Nothing runs.

    Args:
        config: its `*_kernels` switches turn whole families off, or ask for them.
        device, dtype: of the model's weights.
        why_not_attention: why attention must run torch's function, or None.
        layers: the phases' transformer layers, where known.

    Raises:
        KernelUnavailableError: no implementation meets an explicit setting (a switch that is 'flashu', `batch_invariant=True`)
            for an op that the config makes a phase call.
    """
    sets: dict[tuple[str, str], KernelSet] = {}
    choices: list[Choice] = []
    unmet: dict[str, str] = {}
    for task, phase in ((task, phase) for task, phases in PHASES.items() for phase in phases):
        found: dict[str, Choice] = {}
        called = {use.op: use for use in USES if (use.task, use.phase) == (task, phase) and use.when(config)}
        for op in FAMILY_OF:
            replaced = why_not_attention if op == "attention" else None
            case = Case(task, phase, op, config, device, dtype, (layers or {}).get((task, phase)), replaced)
            found[op], why = _choose(case)
            if why is not None and op in called:
                unmet.setdefault(op, f"{case}: expected an implementation that meets the settings, got none ({why})")
        choices += (found[op] for op in called)
        own = _kernel_set(found)
        sets[task, phase] = next((each for each in sets.values() if each == own), own)
    if unmet:
        raise KernelUnavailableError("; ".join(unmet.values()))
    return KernelSets(sets, tuple(choices))


def _choose(case: Case) -> tuple[Choice, str | None]:
    """The first implementation that serves; where none does, any, and why none does."""
    rows = [each for each in KERNELS if each.op == case.op and case.task in each.tasks and case.phase in each.phases]
    refused: dict[str, str] = {}
    use = Use(case.task, case.phase, case.op)
    for kernel in rows:
        why = kernel.refuses(case)
        if why is None:
            fell_back = "flashu" in refused and not kernel.implementation.startswith("flashu")
            return Choice(use, kernel, next(iter(refused.values()), kernel.reason), fell_back), None
        refused[kernel.implementation] = why
    why_none = ", ".join(f"{name}: {why}" for name, why in refused.items())
    return Choice(use, rows[-1], why_none, False), why_none


def _kernel_set(found: Mapping[str, Choice]) -> KernelSet:
    functions = {op: each.kernel.function or getattr(ops, op) for op, each in found.items()}
    assert functions.keys() == {each.name for each in fields(KernelSet)} - {"chosen", "fallbacks"}
    return KernelSet(
        **functions,
        chosen={op: each.implementation for op, each in found.items()},
        fallbacks={op: each.reason for op, each in found.items() if each.fell_back},
    )
