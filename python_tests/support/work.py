"""One of everything that a model does, as tensors by name: for tests that compare bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.masks import additive
from flashu_ext.models.showo2.sampling import DenseStepper, SampleInputs, integrate
from flashu_ext.models.showo2.understanding import prompt_embeds

from .generation import CASES
from .models import generation_inputs, question_inputs

STEPS = 6
PRUNED = {"ffn_prune_ratio": 0.25, "prune_multiple": 16}
ANSWERS = {"token_prune_ratio": 0.5, "token_prune_layer": 2, "answer_layer_skip_ratio": 0.2}
SWITCHES = ("ffn_kernels", "routing_kernels", "norm_kernels", "step_kernels")

SETTINGS: Mapping[str, dict[str, Any]] = {
    "exact": {},
    "paper": {**PRUNED, **ANSWERS, "head_cache_interval": 2, "layer_skip_ratio": 0.2, "layer_skip_interval": 2},
    "adaptive": {"adaptive_cache": True, "adaptive_cache_budget": 0.3},
    "all of it": {**CASES["all of it"], **PRUNED, **ANSWERS, "token_prune_score": "random", "guidance": None},
    "no kernels": {**PRUNED, **ANSWERS, **dict.fromkeys(SWITCHES, False)},
}


def settings(name: str) -> fx.FlashUConfig:
    return fx.FlashUConfig(steps=STEPS, **SETTINGS[name])


def plan(model: Any) -> fx.TaskPlan:
    """Random neurons for both tasks."""
    layers = len(model.showo.model.layers)
    rows = {
        task: list(torch.rand(layers, 64, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"))
        for seed, task in enumerate(("generation", "understanding"))
    }
    return fx.TaskPlan.from_scores(**rows, ratio=PRUNED["ffn_prune_ratio"], multiple=PRUNED["prune_multiple"])


def accelerate(model: Any, name: str) -> fx.Handle:
    return fx.accelerate(model, settings(name), plan(model))


def draw(model: Any, seed: int) -> Tensor:
    return fx.showo2.sample(model, **generation_inputs(model, seed), steps=STEPS)


def draw_as_upstream(model: Any, seed: int) -> Tensor:
    """Through `t2i_generate`, one call an evaluation."""
    return integrate(DenseStepper(model, SampleInputs.build(model, **generation_inputs(model, seed), steps=STEPS)))


def answer(model: Any, seed: int, **more: Any) -> Tensor:
    return fx.showo2.answer_tokens(model, **question_inputs(seed), max_new_tokens=5, **more)


@torch.no_grad()
def answer_as_upstream(model: Any, seed: int) -> Tensor:
    """Through `mmu_generate`."""
    asked = question_inputs(seed)
    embeds, allowed = prompt_embeds(model, *asked.values())
    mask = additive(allowed, embeds.dtype)[None, None]
    return torch.stack(model.mmu_generate(embeds, mask, max_new_tokens=5, top_k=1))


def everything(model: Any) -> dict[str, Tensor]:
    """Drawings and answers of the runtime, by upstream's methods, and sampled."""
    generator = torch.Generator("cpu").manual_seed(3)
    return {
        "drawn": draw(model, 1),
        "drawn by t2i_generate": draw_as_upstream(model, 2),
        "answered": answer(model, 1),
        "answered by mmu_generate": answer_as_upstream(model, 2),
        "answer sampled": answer(model, 3, temperature=0.8, top_p=0.9, generator=generator),
    }
