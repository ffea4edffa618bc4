"""A small model with a plan, and what it generates and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.accelerated import handle_of
from support.models import generation_inputs, question_inputs, small_model

LIMIT = 1e-4
STEPS, NEW = 4, 6
PRUNED = fx.FlashUConfig(steps=STEPS, ffn_prune_ratio=0.25, prune_multiple=16)
UP = "showo.model.layers.2.mlp.up_proj.weight"

State = dict[str, Tensor]


def plan() -> fx.TaskPlan:
    generator = torch.Generator().manual_seed(0)
    scores = {task: [torch.rand(64, generator=generator) for _ in range(8)] for task in ("generation", "understanding")}
    return fx.TaskPlan.from_scores(**scores, ratio=0.25, multiple=16)


def state(model: Any) -> State:
    """Copies, so that no other tensor shares the weights' memory."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """An image and an answer."""
    latents = fx.showo2.sample(model, **generation_inputs(model), steps=STEPS)
    return latents, fx.showo2.answer_tokens(model, **question_inputs(), max_new_tokens=NEW)


def pruned_outputs(weights: State) -> tuple[Tensor, Tensor]:
    """Outputs of a model that got these weights before it was accelerated."""
    model = small_model()
    model.load_state_dict(weights)
    with fx.accelerate(model, PRUNED, plan()):
        return outputs(model)


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def accelerated(seed: int = 0) -> tuple[Any, fx.Handle, State]:
    """A model with neurons in plan order, its handle, and its weights in the original order."""
    model = small_model(seed)
    before = state(model)
    handle = fx.accelerate(model, PRUNED, plan())
    assert not torch.equal(model.get_parameter(UP), before[UP]), "the plan is active"
    return model, handle, before


CALLS: dict[str, Callable[[Any], Any]] = {
    "sample": lambda model: fx.showo2.sample(model, **generation_inputs(model), steps=STEPS),
    "answer_tokens": lambda model: fx.showo2.answer_tokens(model, **question_inputs(), max_new_tokens=NEW),
    "t2i_generate": lambda model: model.t2i_generate(
        image_latents=generation_inputs(model)["noise"],
        t=torch.full((2,), 0.1),
        text_tokens=generation_inputs(model)["text_tokens"],
        modality_positions=generation_inputs(model)["modality_positions"],
    ),
}


def halved(model: Any, name: str) -> None:
    model.get_parameter(name).mul_(0.5)


def outputs_to(queue: Any, model: Any) -> None:
    """In a process that was started with the model as an argument."""
    torch.set_num_threads(1)
    latents, tokens = outputs(model)
    queue.put(
        (handle_of(model) is None, {n: v.numpy() for n, v in state(model).items()}, latents.numpy(), tokens.numpy())
    )
