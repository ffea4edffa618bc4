"""What an image costs under a step plan: floating-point operations by shapes, and seconds as measured here.

The cost model of a machine is a table of measured evaluations by kind of work; a plan's price is the sum over its steps,
so a search can price settings that it never ran.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..models.parts import Showo2Parts
from .config import FlashUConfig
from .schedule import Step, StepPlan

__all__ = ["CostModel", "Geometry", "dense_flops", "image_flops", "llm_layer_flops"]


@dataclass(frozen=True)
class Geometry:
    """Tokens of one row. prefix: text before the image. span: image tokens (time token included). length: padded whole."""

    prefix: int
    span: int
    length: int


def _linear(module: nn.Module) -> float:
    """Multiply-adds per token of all linear layers inside, counted as two operations."""
    return sum(2.0 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _attention(heads: int, head_dim: int, queries: float, keys: float) -> float:
    return 4.0 * heads * head_dim * queries * keys


def _encoder(parts: Showo2Parts, patches: int) -> float:
    """SigLIP, patch embeddings and fusion for one image."""
    config = getattr(parts.vision, "config", None)
    width = parts.position_embedding.weight.shape[1]
    layers = getattr(config, "num_hidden_layers", 0) if config is not None else 0
    flops = _linear(parts.vision) * patches + _linear(parts.fusion) * patches
    flops += layers * 4.0 * width * patches * patches
    convolution = parts.patch_gen.proj
    return flops + 2 * 2.0 * convolution.weight.numel() * patches


def llm_layer_flops(
    parts: Showo2Parts, layer: int, tokens: float, keys: float, kept: float = 1.0, active: float | None = None
) -> float:
    """Operations of one language-model layer on a row of `tokens`.

    Args:
        keys: that a query attends to. kept: share of the FFN's neurons.
        active: tokens that are computed (default: all); the others give their keys and values only.
    """
    module, shape = parts.layers[layer], parts.llm_attention
    queries = tokens if active is None else active
    key_value = _linear(module.self_attn.k_proj) + _linear(module.self_attn.v_proj)
    flops = key_value * tokens + (_linear(module.self_attn) - key_value + _linear(module.mlp) * kept) * queries
    return flops + _attention(shape.heads, shape.head_dim, queries, keys)


def _head(parts: Showo2Parts, queries: int, keys: float) -> float:
    flops = 0.0
    for block in parts.blocks:
        flops += (_linear(block.self_attn) + _linear(block.mlp)) * queries + _linear(block.adaLN_modulation)
        flops += _attention(parts.head_attention.heads, parts.head_attention.head_dim, queries, keys)
    if parts.diff_proj is not None:
        flops += _linear(parts.diff_proj) * queries
    return flops


def _final(parts: Showo2Parts, queries: int) -> float:
    return _linear(parts.final_layer.linear) * queries + _linear(parts.final_layer.adaLN_modulation)


def dense_flops(parts: Showo2Parts, geometry: Geometry, evaluations: int, guided: bool = True) -> float:
    """Operations of one image as unmodified Show-o2 computes it: every token, in both branches, logits included."""
    rows, n = (2 if guided else 1), geometry.length
    one = _encoder(parts, geometry.span) + _head(parts, n, n) + _final(parts, n) + _linear(parts.lm_head) * n
    one += sum(llm_layer_flops(parts, i, n, n, 1.0) for i in range(len(parts.layers)))
    return evaluations * rows * one


def image_flops(parts: Showo2Parts, plan: StepPlan, geometry: Geometry, guided: bool = True) -> float:
    """Operations of one image as the runtime executes `plan`.

    The prompt is counted once for each network variant, and measuring steps run the whole padded sequence. The head's
    modulation is counted where it is used; it is computed for all steps together, one row a step, which is next to nothing.
    """
    config = plan.config
    layers = len(parts.layers)
    skip = int(layers * config.layer_skip_ratio)
    total = 0.0
    variants: set[tuple[bool, int | None]] = set()
    keys = geometry.prefix + geometry.span
    for step in plan.steps:
        rows = 2 if guided and step.guided else 1
        kept = 1.0 - config.ffn_prune_ratio if step.pruned else 1.0
        if step.encode:
            total += _encoder(parts, geometry.span)
        if step.backbone:
            queries = geometry.length if step.measure else geometry.span
            seen = geometry.length if step.measure else keys
            used = layers - (skip if step.skip_from is not None else 0)
            active = queries - int((queries - 1) * config.token_skip_ratio) if step.tokens_from else None
            total += rows * used * llm_layer_flops(parts, 0, queries, seen, kept, active)
            variant = (step.pruned, step.skip_from)
            if not step.measure and variant not in variants:
                variants.add(variant)
                total += rows * used * llm_layer_flops(parts, 0, geometry.prefix, geometry.prefix, kept)
                total += rows * _head(parts, geometry.prefix, geometry.prefix)
        if step.head:
            total += rows * _head(parts, geometry.span, keys)
        total += rows * _final(parts, geometry.span)
    return total


Kind = tuple[Any, ...]


def _kind(step: Step, config: FlashUConfig) -> Kind:
    """What decides how long an evaluation takes; equal for steps that run the same work."""
    return (
        step.backbone,
        step.measure,
        step.head,
        config.ffn_prune_ratio if step.pruned else 0.0,
        config.layer_skip_ratio if step.skip_from is not None else 0.0,
        config.head_forecast_order if not step.head else 0,
        step.guided,
        step.residual,
        step.encode,
        step.measure_tokens,
        config.token_skip_ratio if step.tokens_from else 0.0,
    )


@dataclass
class CostModel:
    """Seconds per evaluation by kind of work, measured with one model, batch and machine.

    Attributes:
        draw: runs one image under a config and calls back after every evaluation. rounds: images per measurement.
    """

    draw: Callable[[FlashUConfig, Callable[[int, Any], None]], None]
    layers: int
    rounds: int = 3
    table: dict[Kind, float] = field(default_factory=dict)

    def plan(self, config: FlashUConfig) -> StepPlan:
        return StepPlan.build(config, None, self.layers)

    def seconds(self, config: FlashUConfig) -> float:
        """Predicted seconds of one image; kinds of work never seen before are measured first."""
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

            self.draw(config, mark)
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
