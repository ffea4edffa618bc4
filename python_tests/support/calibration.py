"""Samples of the small fixture for calibration, and runs over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import flashu_ext as fx
from support.conformance import public

TIMES = (0.25, 0.75)


def generation_samples(count: int = 2, seed: int = 0) -> Iterator[fx.GenerationSample]:
    """Samples for the small random model with its fixture's prompts: one row each, padding after the image."""
    i = public().sample_inputs
    generator = torch.Generator().manual_seed(seed)
    for n in range(count):
        row = slice(n % 2, n % 2 + 1)
        yield fx.GenerationSample(
            torch.randn(1, 16, 12, 12, generator=generator),
            i["text_tokens"][row],
            i["text_tokens_null"][row],
            i["modality_positions"][row],
            i["modality_positions_null"][row],
        )


def questions(count: int = 2, seed: int = 1) -> Iterator[fx.UnderstandingSample]:
    i = public().answer_inputs
    generator = torch.Generator().manual_seed(seed)
    for n in range(count):
        after = torch.cat([i["tokens_after_boi"], torch.tensor([[5, 6, 7 + n]])], dim=1)
        yield fx.UnderstandingSample(
            torch.randn(1, 16, 12, 12, generator=generator), i["tokens_before_image"], after, answer_length=3
        )


def run(model: Any, *args: Any, **kwargs: Any) -> fx.TaskPlan:
    return fx.calibrate(model, *args, **{"times": TIMES, "progress": False, "multiple": 16, **kwargs})


def same(a: fx.TaskPlan, b: fx.TaskPlan) -> bool:
    """Bit-equal plans."""
    assert a.tasks == b.tasks and a.notes == b.notes and a.times == b.times
    for task in a.tasks:
        one, other = a.calibration.sums[task], b.calibration.sums[task]
        assert one.tokens == other.tokens
        assert torch.equal(one.total, other.total) and torch.equal(one.squares, other.squares)
        assert torch.equal(a.scores[task], b.scores[task])
        assert torch.equal(a.layer_importance[task], b.layer_importance[task])
    for task, mean in a.calibration.mean_layer_importance.items():
        assert torch.equal(mean, b.calibration.mean_layer_importance[task])
    return True
