"""The cost of an image under a step plan: floating-point operations from shapes, and seconds measured on this machine.

A machine's cost model is a table of measured evaluations by kind of work. A plan costs the sum over its steps, so a search can
predict the cost of settings that it never ran.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import FlashUConfig
from .groups import FfnPruning, LayerSkip, TokenSkip
from .schedule import Step, StepPlan

__all__ = [
    "CostModel",
    "EncoderShape",
    "Geometry",
    "LayerShape",
    "ModelShape",
    "dense_flops",
    "image_flops",
    "llm_layer_flops",
]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a transformer layer; a multiply-add is two operations.

    Attributes:
        key_value: operations per token of the key and value projections.
        attention: operations per token of the query and output projections.
        ffn: operations per token of the FFN.
        modulation: operations per row.
        heads, head_dim: of the queries.
        width: of the hidden state.
        key_value_width: of all key heads together.
    """

    key_value: float
    attention: float
    ffn: float
    heads: int
    head_dim: int
    width: int
    key_value_width: int
    modulation: float = 0.0

    @property
    def neurons(self) -> int:
        """Of the FFN."""
        return round(self.ffn / (6 * self.width))

    def products(self, queries: float, keys: float) -> float:
        """Operations of both attention products for one row."""
        return 4.0 * self.heads * self.head_dim * queries * keys


@dataclass(frozen=True)
class EncoderShape:
    """The image encoder.

    Attributes:
        linear: operations per patch, embeddings and fusion included.
        layers, width, heads: of its attention.
    """

    linear: float
    layers: int
    width: int
    heads: int = 1


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its cost depends on (`Adapter.shape`).

    Attributes:
        layers: of the language model.
        blocks: of the diffusion head.
        head_input: operations per token between the two.
        final: operations per token of the final layer.
        final_modulation: operations per row of its modulation.
        lm_head: operations per token.
        time_token: the image span begins with a time token.
        asked: the encoder of a question's images, where it is another one.
    """

    layers: tuple[LayerShape, ...]
    blocks: tuple[LayerShape, ...]
    encoder: EncoderShape
    head_input: float
    final: float
    final_modulation: float
    lm_head: float
    time_token: bool
    asked: EncoderShape | None = None


@dataclass(frozen=True)
class Geometry:
    """Tokens of one row. prefix: text before the image. span: image tokens, time token included. length: with padding."""

    prefix: int
    span: int
    length: int


def llm_layer_flops(
    layer: LayerShape, tokens: float, keys: float, kept: float = 1.0, active: float | None = None
) -> float:
    """Operations of one language-model layer on a row of `tokens`.

    Args:
        keys: that a query attends to.
        kept: fraction of the FFN's neurons.
        active: tokens that are computed (default: all); of the others only keys and values.
    """
    queries = tokens if active is None else active
    return layer.key_value * tokens + (layer.attention + layer.ffn * kept) * queries + layer.products(queries, keys)


def _encoder(shape: ModelShape, geometry: Geometry) -> float:
    """The encoder on one image, without the time token."""
    encoder, patches = shape.encoder, geometry.span - shape.time_token
    return encoder.linear * patches + encoder.layers * 4.0 * encoder.width * patches * patches


def _head(shape: ModelShape, queries: int, keys: float) -> float:
    flops = shape.head_input * queries
    for block in shape.blocks:
        flops += (block.key_value + block.attention + block.ffn) * queries + block.modulation
        flops += block.products(queries, keys)
    return flops


def _final(shape: ModelShape, queries: int) -> float:
    return shape.final * queries + shape.final_modulation


def dense_flops(shape: ModelShape, geometry: Geometry, evaluations: int, guided: bool = True) -> float:
    """Operations of one image as unmodified Show-o2 computes it: every token, in both branches, logits included."""
    rows, n = (2 if guided else 1), geometry.length
    one = _encoder(shape, geometry) + _head(shape, n, n) + _final(shape, n) + shape.lm_head * n
    one += sum(llm_layer_flops(layer, n, n) for layer in shape.layers)
    return evaluations * rows * one


def _in_force(config: FlashUConfig, step: Step) -> tuple[FfnPruning, LayerSkip, TokenSkip]:
    """The approximations of the language model in a step. A new setting that changes the cost must be read here."""
    return (
        (step.pruned and config.ffn) or FfnPruning(0.0),
        (step.skip_from is not None and config.layers) or LayerSkip(0.0, 0),
        (step.tokens_from != () and config.tokens) or TokenSkip(0.0),
    )


def image_flops(shape: ModelShape, plan: StepPlan, geometry: Geometry, guided: bool = True) -> float:
    """Operations of one image as the runtime executes `plan`.

    The prompt is counted once per network variant, and again where a variant that ran one branch later runs both. Measuring
    steps run the whole padded sequence. The head's modulation is counted where it is used; in fact it is computed once for
    all steps, one row per step, which is negligible.
    """
    layer, layers = shape.layers[0], len(shape.layers)
    total = 0.0
    prompts: dict[tuple[bool, int | None], int] = {}
    prefix, span, keys = geometry.prefix, geometry.span, geometry.prefix + geometry.span
    for step in plan.steps:
        rows = 2 if guided and step.guided else 1
        if step.encode:
            total += _encoder(shape, geometry)
        if step.backbone:
            ffn, skipped, tokens = _in_force(plan.config, step)
            used, kept = layers - skipped.count(layers), 1.0 - ffn.ratio
            queries, seen = (geometry.length, geometry.length) if step.measure else (span, keys)
            active = queries - tokens.count(span - shape.time_token)
            total += rows * used * llm_layer_flops(layer, queries, seen, kept, active)
            variant = (step.pruned, step.skip_from)
            if not step.measure and prompts.get(variant, 0) < rows:
                prompts[variant] = rows
                total += rows * used * llm_layer_flops(layer, prefix, prefix, kept)
                total += rows * _head(shape, prefix, prefix)
        if step.head:
            total += rows * _head(shape, span, keys)
        total += rows * _final(shape, span)
    return total


Kind = tuple[Any, ...]


def _kind(step: Step, config: FlashUConfig) -> Kind:
    """What the duration of an evaluation depends on; equal for steps that run the same work."""
    return (
        step.backbone,
        step.measure,
        step.head,
        *(group.ratio for group in _in_force(config, step)),
        config.head.order if config.head is not None and not step.head else 0,
        step.guided,
        step.residual,
        step.encode,
        step.measure_tokens,
        # It waits for the answer whether it is cached, and how often that is yes hangs on the budget.
        config.head.budget if config.head is not None and step.adaptive else None,
    )


@dataclass
class CostModel:
    """Seconds per evaluation by kind of work, measured with one model, batch and machine.

    Attributes:
        generate: runs one image under a config and calls back after every evaluation.
        layers: of the language model.
        guidance_scale: used by `generate`.
        image_tokens: of its image.
        rounds: images per measurement.
    """

    generate: Callable[[FlashUConfig, Callable[[int, Any], None]], None]
    layers: int
    guidance_scale: float
    image_tokens: int
    rounds: int = 3
    table: dict[Kind, float] = field(default_factory=dict)

    def plan(self, config: FlashUConfig) -> StepPlan:
        return StepPlan.build(config, None, self.layers, self.guidance_scale, self.image_tokens)

    def seconds(self, config: FlashUConfig) -> float:
        """Predicted seconds of one image; unknown kinds of work are measured first."""
        plan = self.plan(config)
        if any(_kind(step, config) not in self.table for step in plan.steps):
            self._measure(config, plan)
        return sum(self.table[_kind(step, config)] for step in plan.steps)

    def _measure(self, config: FlashUConfig, plan: StepPlan) -> None:
        samples: dict[Kind, list[float]] = {}
        for turn in range(self.rounds + 1):
            marks = [_now()]

            def mark(_step: int, _latents: Any, marks: list[float] = marks) -> None:
                marks.append(_now())

            self.generate(config, mark)
            if turn == 0:
                continue  # caches, allocator and threads warm up
            for step, begin, end in zip(plan.steps, marks, marks[1:], strict=False):
                samples.setdefault(_kind(step, config), []).append(end - begin)
        for kind, times in samples.items():
            self.table.setdefault(kind, statistics.median(times))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
