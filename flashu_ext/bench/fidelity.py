"""Measures how far skipping and caching change the embedded model's images, and the operations that they save.

Fidelity is the relative L2 distance of the final latents from those of the exact model with the same noise. Operations are
counted from what ran, for one conditional and one unconditional row; times are not measured.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import adapter_of
from ..ops.machine import command_line, facts
from ..planning.config import FlashUConfig
from ..planning.cost import llm_layer_flops
from ..planning.tables import text_table
from ..runtime.handle import accelerate

__all__ = ["Row", "llm_flops", "measure", "table", "to_json", "token_ratio_within"]


@dataclass(frozen=True)
class Row:
    """One setting. `distance` is a mean over prompts, `worst` the maximum, `right` the number of correct images."""

    name: str
    changes: Mapping[str, Any]
    llm_gflops: float
    backbone: int
    head: int
    encoder: int
    distance: float
    worst: float
    right: int
    prompts: int

    def cells(self) -> tuple[str, ...]:
        return (
            self.name, f"{self.llm_gflops:.3f}", str(self.backbone), str(self.head), str(self.encoder),
            f"{self.distance:.4f}", f"{self.worst:.4f}", f"{self.right}/{self.prompts}",
        )  # fmt: skip


HEADER = ("setting", "LLM GFLOP", "backbone", "head", "encoder", "rel. L2", "worst", "right")


def llm_flops(model: Any, image: Any, tail: bool = True) -> float:
    """Floating-point operations (a multiply-add is two) of the language model for one finished image of a batch.

    Counts every linear layer and both attention products: a routed layer's keys and values for all tokens, the rest for the
    active ones; a layer measurement over the whole sequence, as it is run; the prompt once per choice of layers.

    Args:
        tail: False counts a layer measurement as if it, too, ran on the image span alone.
    """
    shape = adapter_of(model).shape()
    layers = len(shape.layers)
    geometry, count = image.geometry, len(image.geometry.prefix)
    length, prefix = image.length, sum(geometry.prefix) / count

    def layer(tokens: float, active: float, keys: float) -> float:
        return llm_layer_flops(shape.layers[0], tokens, keys, active=active)

    total = 0.0
    skipped: Mapping[int, tuple[int, ...]] = dict(image.choices)
    # A measurement over the whole sequence leaves the whole network's prompt behind.
    prompts: set[tuple[int, ...]] = {()} if skipped and tail else set()
    for step in image.ran:
        rows = image.branches if step.guided else 1
        if step.measure and tail:
            total += rows * layers * layer(length, length, length)
        elif step.backbone:
            out = skipped[step.skip_from] if step.skip_from is not None else ()
            active = geometry.span - (image.skipped_tokens if step.tokens_from else 0)
            total += rows * (layers - len(out)) * layer(geometry.span, active, prefix + geometry.span)
            if out not in prompts:
                prompts.add(out)
                total += 2 * (layers - len(out)) * layer(prefix, prefix, prefix)
    return total


def token_ratio_within(tokens: int, budget: float, cost: Callable[[float], float]) -> float:
    """The smallest fraction of `tokens` to skip with `cost(fraction)`, which falls with it, at most `budget`."""

    def fraction(skipped: int) -> float:
        return (skipped + 0.5) / tokens  # between two counts, so that rounding down gives this one

    skipped = bisect.bisect_left(range(tokens), True, key=lambda n: cost(fraction(n)) <= budget)
    if skipped == tokens:
        raise ValueError(
            f"budget: expected at least the cost of skipping {tokens - 1} of {tokens} tokens, got {budget:.3g}"
        )
    return fraction(skipped)


class _Images:
    """Held-out prompts of the embedded model with their noise, generated under each setting."""

    def __init__(self, prompts: int, seed: int, steps: int):
        from ..models.showo2 import Pipeline
        from ..nano.world import captions, scenes

        self.pipe = Pipeline.from_pretrained("nano")
        self.steps = steps
        self.scenes = random.Random(seed).sample(scenes(held_out=True), prompts)
        self.inputs = vars(self.pipe.layout.generation([captions(scene)[0] for scene in self.scenes]))
        self.config = config = self.pipe.model.config
        self.tokens = config.image_latent_height * config.image_latent_width
        shape = (config.image_latent_height * config.patch_size, config.image_latent_width * config.patch_size)
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(prompts, config.image_latent_dim, *shape, generator=generator)
        self.exact, _, _ = self._latents(prompts)

    def _latents(self, prompts: int, **changes: Any) -> tuple[Tensor, Any, Any]:
        from ..models.showo2 import sample
        from ..nano.showo2 import SHIFT, SUBJECT

        inputs = {name: value[:prompts] for name, value in self.inputs.items()}
        with accelerate(self.pipe.model, FlashUConfig(steps=self.steps, **changes)) as handle:
            latents = sample(
                self.pipe.model,
                self.noise[:prompts],
                **inputs,
                guidance_scale=SUBJECT.guidance,
                time_shifting_factor=SHIFT,
            )
            return latents, handle.runner.last_images, handle.summary()

    def cost(self, **changes: Any) -> float:
        """Operations under a setting without any tail; they depend on shapes alone, so one prompt tells them."""
        return llm_flops(self.pipe.model, self._latents(1, **changes)[1][0], tail=False)

    def row(self, name: str, **changes: Any) -> Row:
        from ..nano import codec
        from ..nano.judge import judge

        latents, images, summary = self._latents(len(self.scenes), **changes)
        far = (latents - self.exact).flatten(1).norm(dim=1) / self.exact.flatten(1).norm(dim=1)
        right = [
            judge(picture, scene).right for picture, scene in zip(codec.pictures(latents), self.scenes, strict=True)
        ]
        return Row(
            name=name,
            changes=changes,
            llm_gflops=sum(llm_flops(self.pipe.model, image) for image in images) / 1e9,
            backbone=summary.backbone_evaluations,
            head=summary.head_evaluations,
            encoder=summary.encoder_evaluations,
            distance=float(far.mean()),
            worst=float(far.max()),
            right=sum(right),
            prompts=len(right),
        )


def measure(prompts: int = 8, seed: int = 0, steps: int = 50) -> list[Row]:
    """Generate held-out prompts under every setting."""
    drawings = _Images(prompts, seed, steps)
    return [drawings.row("exact"), *_skipping(drawings), *_caching(drawings)]


def _skipping(drawings: _Images) -> Iterator[Row]:
    """Whole layers, each followed by routed tokens that cost at most as much.

    The tail that a layer measurement runs over is left out of this comparison, which favours the layers: a measurement
    on the span would do, and only differs from the reference's.
    """
    depth, tokens = drawings.config.llm["num_hidden_layers"], drawings.tokens
    for layers, interval in ((1, 2), (1, 5), (1, 10), (2, 5)):
        whole = {"layer_skip_ratio": (layers + 0.5) / depth, "layer_skip_interval": interval}
        yield drawings.row(f"layers: {layers} of {depth}, every {interval}", **whole)
        for forecast in (False, True):
            routed = {"token_skip": True, "token_skip_interval": interval, "token_skip_forecast": forecast}
            cost = functools.partial(_cost_of_ratio, drawings, routed)
            ratio = token_ratio_within(tokens, drawings.cost(**whole), cost)
            said = f"{int(ratio * tokens)} of {tokens}, every {interval}{', forecast' if forecast else ''}"
            yield drawings.row(f"tokens: {said}", token_skip_ratio=ratio, **routed)


def _cost_of_ratio(drawings: _Images, routed: dict[str, Any], ratio: float) -> float:
    return drawings.cost(token_skip_ratio=ratio, **routed)


def _caching(drawings: _Images) -> Iterator[Row]:
    for interval in (2, 4):
        fixed = {"head_cache_interval": interval}
        yield drawings.row(f"head state, every {interval}", **fixed)
        for order in (1, 2):
            yield drawings.row(f"head forecast {order}, every {interval}", head_forecast_order=order, **fixed)
        yield drawings.row(f"head residual, every {interval}", head_residual_reuse=True, **fixed)
    for budget in (0.05, 0.1, 0.2, 0.4):
        yield drawings.row(f"adaptive, budget {budget:g}", adaptive_cache=True, adaptive_cache_budget=budget)
    for interval in (2, 4, 8):
        yield drawings.row(f"encoder, every {interval}", encoder_cache=True, encoder_cache_interval=interval)


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    return text_table([HEADER, *(row.cells() for row in rows)])


def to_json(rows: Sequence[Row]) -> str:
    """The rows with the command and the machine that made them."""
    record = {"command": command_line(), "machine": facts(), "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
