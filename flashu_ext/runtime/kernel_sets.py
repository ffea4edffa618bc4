"""Which kernel runs each op in each phase of each task, before anything runs: `fx.kernel_sets.describe(model, config, plan)`.

The two tables and the choice are in `ops.kernel_sets`, whose names are here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.accelerated import unwrapped
from ..models.adapter import Adapter, adapter_of
from ..models.known import check_model, why_not_attention_kernel
from ..models.shapes import layer_shapes
from ..ops.kernel_sets import (
    FAMILIES,
    KERNELS,
    PHASES,
    USES,
    Case,
    Choice,
    Kernel,
    KernelSet,
    KernelSets,
    KernelUnavailableError,
    Use,
    resolve,
)
from ..planning.config import FlashUConfig
from ..planning.cost import EncoderShape, LayerShape, ModelShape
from ..planning.groups import Answers, HeadCaching, LayerSkip, TokenSkip
from ..planning.op_cost import PhaseShape
from ..planning.plan import TaskPlan
from ..planning.schedule import StepPlan
from ..planning.tables import text_table
from .network import Network

__all__ = [
    "FAMILIES",
    "KERNELS",
    "PHASES",
    "USES",
    "Case",
    "Choice",
    "Description",
    "Kernel",
    "KernelSet",
    "KernelSets",
    "KernelUnavailableError",
    "Row",
    "Use",
    "describe",
    "resolve",
]


@dataclass(frozen=True)
class Row:
    """One op in one phase.

    Attributes:
        task, phase, op: what runs.
        implementation: 'flashu', 'torch' or another name of `KERNELS`.
        reason: why that one.
        runs: of the phase, per image, question or token.
        shape: of one call, or of most.
        gflop, gb: predicted for one run of the phase, all its calls together. gflop is 0 for ops that memory alone bounds.
        microseconds: the same, predicted for an idle H100; None where the project has no prediction.
    """

    task: str
    phase: str
    op: str
    implementation: str
    reason: str
    runs: int
    shape: str
    gflop: float
    gb: float
    microseconds: float | None


@dataclass(frozen=True)
class Description:
    """What `describe` found; `str()` is a table.

    Attributes:
        device, dtype: that the choice is for.
        rows: one per (task, phase, op).
        itself: path in the model -> why the module runs as itself instead of on a kernel.
    """

    device: torch.device
    dtype: torch.dtype
    rows: tuple[Row, ...]
    itself: Mapping[str, str]

    def __str__(self) -> str:
        timed = any(row.microseconds is not None for row in self.rows)
        table = [["task", "phase", "op", "kernel", "runs", "shape", "GFLOP", "GB", *["us"] * timed, "reason"]]
        for row in self.rows:
            us = "-" if row.microseconds is None else f"{row.microseconds:.0f}"
            cells = [row.task, row.phase, row.op, row.implementation, str(row.runs), row.shape]
            table.append([*cells, _number(row.gflop), _number(row.gb), *[us] * timed, row.reason])
        last = (
            f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}; GFLOP, GB{' and us' if timed else ''} are "
            "predicted for one run of the phase (an evaluation, a question, a token), all calls together"
        )
        itself = [f"model.{name} runs as itself: {why}" for name, why in self.itself.items()]
        return "\n".join([text_table(table, rule=True), *itself, last])


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "-"


def describe(
    model: Any,
    config: FlashUConfig | None = None,
    plan: TaskPlan | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    images: int = 1,
    prompt: int = 40,
    question: int = 24,
) -> Description:
    """What `accelerate` would run, op by op, with the reason and the predicted cost. Runs nothing and changes nothing.

    Costs are of images of the model's own size under guidance, and of a question about one image of the largest size. Skipped
    layers, tokens and neurons are left out; visual tokens that a prefill drops are counted.

    Args:
        model: a model of a known family, or its adapter; its weights may be on the meta device.
        config: the settings; None is `FlashUConfig.exact()`.
        plan: whose neurons are kept where the config prunes; None: as many as the config says, in every task.
        device, dtype: where and in what it would run; None: the model's, and for the meta device a GPU where torch sees one, else
            the CPU.
        steps: grid points; None: the config's, or the family's own.
        images: drawn at once.
        prompt: tokens of a prompt.
        question: tokens of a question without its image.

    Raises:
        KernelUnavailableError: a kernel that the config asks for, or batch invariance, cannot be had.
        TypeError: a model of no known family, or one that `accelerate` refuses; or config or plan of another type.
        ValueError: a number below 1, or a setting that means nothing to the model.
    """
    config = FlashUConfig.exact() if config is None else config
    for name, value, kind in (("config", config, FlashUConfig), ("plan", plan, TaskPlan | None)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {getattr(kind, '__name__', 'TaskPlan')}, got {type(value).__name__}")
    for name, count in (("images", images), ("prompt", prompt), ("question", question)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")
    parts = model if isinstance(model, Adapter) else adapter_of(unwrapped(model))
    parts.check_config(config)
    if parts.device.type != "meta":  # whose buffers have no values to compare
        check_model(parts)
    where = torch.device(device) if device is not None else parts.device
    if where.type == "meta":
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = resolve(config, where, dtype or parts.dtype, why_not_attention_kernel(), layer_shapes(parts))
    network = Network.build(parts, sets)
    network.check_explicit(config)
    shapes = _Shapes(parts, config, plan, steps, images, prompt, question)
    rows = tuple(_row(each, shapes, where, dtype or parts.dtype) for each in sets.choices if runs(each.use, parts))
    return Description(where, dtype or parts.dtype, rows, network.run_as_themselves())


_BLOCKS = frozenset({"linears", "rotary_cache_", "attention", "gathered_ffn", "gate_add_"})
"""What a head's blocks run."""


_ENCODER = frozenset({"linears", "attention"})
"""What only an encoder that several steps can share runs when a drawing is embedded."""


def runs(use: Use, parts: Adapter) -> bool:
    """Whether a model runs an op in a phase at all: a head without blocks is its last layers, and not every drawing is
    encoded."""
    if use.phase == "head":
        return bool(len(parts.blocks)) or use.op not in _BLOCKS
    encodes = use.task != "generation" or bool(parts.sizes(parts.latent_size).features)
    return encodes or use.phase != "embed" or use.op not in _ENCODER


def _row(choice: Choice, shapes: _Shapes, device: torch.device, dtype: torch.dtype) -> Row:
    use, kernel = choice.use, choice.kernel
    shape = shapes.of[use.task, use.phase]
    cost = use.cost(shape)
    return Row(
        task=use.task,
        phase=use.phase,
        op=use.op,
        implementation=choice.implementation,
        reason=choice.reason,
        runs=shapes.runs[use.task, use.phase],
        shape=cost.shape,
        gflop=cost.flops / 1e9,
        gb=cost.values * dtype.itemsize / 1e9,
        microseconds=kernel.microseconds(shape, dtype) if device.type == "cuda" else None,
    )


class _Shapes:
    """The size of every phase, and how often it runs.

    Attributes:
        of: by (task, phase).
        runs: of the phase per image, question or token.
    """

    def __init__(
        self,
        parts: Adapter,
        config: FlashUConfig,
        plan: TaskPlan | None,
        steps: int | None,
        images: int,
        prompt: int,
        question: int,
    ):
        shape = parts.shape()
        sizes = parts.sizes(parts.latent_size)
        patches, span = sizes.patches, parts.lead + sizes.patches + parts.trail
        layers, llm = len(shape.layers), shape.layers[0]
        block = shape.blocks[0] if shape.blocks else llm
        skipped = (config.layers or LayerSkip(0.0, 0)).count(layers) if config.layers else 0
        routed = (config.tokens or TokenSkip(0.0, on=False)).count(patches) if config.tokens else 0
        rows, keys, asked = 2 * images, prompt + span, parts.question_tokens + question
        drawing, answering = (_neurons(llm, config, plan, task) for task in PHASES)
        projected = ((rows * span, shape.head_input), (rows * patches, shape.final))
        tables = 1 + (config.head or HeadCaching()).order
        answered = layers - (config.answers or Answers()).layers_skipped(layers)
        self.of = {
            ("generation", "embed"): _embedding(shape, shape.encoder, images, patches),
            ("generation", "backbone"): PhaseShape(
                llm, layers - skipped, rows, span - routed, keys, drawing, layers + 1
            ),
            ("generation", "head"): PhaseShape(
                block,
                len(shape.blocks),
                rows,
                span,
                keys,
                block.neurons,
                2 * len(shape.blocks) + 1,
                projected,
                sizes.velocity,
                tables,
            ),
            ("generation", "measuring"): PhaseShape(llm, layers, rows, keys, keys, drawing, layers + 1),
            ("understanding", "embed"): _embedding(shape, shape.asked or shape.encoder, 1, parts.question_tokens),
            ("understanding", "prefill"): PhaseShape(llm, layers, 1, asked, asked, answering, layers + 1),
            ("understanding", "decode"): PhaseShape(
                llm, answered, 1, 1, asked + 1, answering, answered + 1, ((1, shape.lm_head),)
            ),
        }
        planned = StepPlan.build(config, steps or config.steps or parts.grid_points, layers, None, patches)
        measuring = sum(step.measure or step.measure_tokens for step in planned.steps)
        self.runs = {
            ("generation", "embed"): planned.backbone_evaluations,
            ("generation", "backbone"): sum(step.backbone and not step.measure for step in planned.steps),
            ("generation", "head"): planned.head_evaluations,
            ("generation", "measuring"): measuring,
            ("understanding", "embed"): 1,
            ("understanding", "prefill"): 1,
            ("understanding", "decode"): 1,
        }


def _neurons(layer: LayerShape, config: FlashUConfig, plan: TaskPlan | None, task: str) -> int:
    """FFN neurons of a layer that a task keeps."""
    if config.ffn is None or not config.needs_plan or (plan is not None and task not in plan.tasks):
        return layer.neurons
    if plan is not None:
        return plan.kept_neurons
    return int(layer.neurons * (1 - config.ffn.ratio)) // config.ffn.multiple * config.ffn.multiple


def _embedding(shape: ModelShape, encoder: EncoderShape, images: int, patches: int) -> PhaseShape:
    """An image encoder, and the times' layers: a head's modulation and the time token."""
    square = 4.0 * encoder.width**2
    layer = LayerShape(square, square, 0.0, encoder.heads, encoder.width // encoder.heads, encoder.width, encoder.width)
    modulation = sum(block.modulation for block in shape.blocks) + shape.final_modulation
    others = ((images * patches, encoder.linear - encoder.layers * 2 * square), (1, modulation))
    return PhaseShape(layer, encoder.layers, images, patches, patches, others=others)
