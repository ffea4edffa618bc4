"""No function keeps or changes a caller's tensor: arguments and results may be overwritten after a call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import generation_inputs, question_inputs, small_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

import flashu_ext as fx
from flashu_ext.models.showo2.understanding import prompt_embeds

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = fx.FlashUConfig(steps=8, head_cache_interval=2, encoder_cache=True, answer_layer_skip_ratio=0.3)


@dataclass(frozen=True)
class Case:
    """A call. make: seed -> arguments, tensors and lists of them. run: (model, arguments) -> tensors. dense: on a model
    that is not accelerated."""

    make: Callable[[int], dict[str, Any]]
    run: Callable[..., Any]
    dense: bool = False


def evaluations(seed: int) -> dict[str, Any]:
    """Arguments of `t2i_generate` under guidance: both halves of the rows have the same latents."""
    inputs = generation_inputs(small_model(), seed)
    return {
        "image_latents": inputs["noise"].repeat(2, 1, 1, 1),
        "text_tokens": torch.cat([inputs["text_tokens"], inputs["text_tokens_null"]]),
        "modality_positions": torch.cat([inputs["modality_positions"], inputs["modality_positions_null"]]),
        # Times continue from seed to seed, so only the tensors show that another image began.
        "times": 0.1 * seed + torch.tensor([0.0, 0.03, 0.06]),
    }


def evaluate(model: Any, times: Tensor, **inputs: Any) -> list[Tensor]:
    """Three steps of an image."""
    return [model.t2i_generate(t=t.expand(4), guidance_scale=3.0, **inputs) for t in times]


def embedded(seed: int) -> dict[str, Any]:
    """Arguments of `mmu_generate`."""
    with torch.no_grad():
        embeds, allowed = prompt_embeds(small_model(), **question_inputs(seed))
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return {"input_embeds": embeds, "attention_mask": mask[None, None]}


def several(seed: int) -> dict[str, Any]:
    """Arguments of `answer_tokens_batch`: three questions about two images."""
    asked = [question_inputs(seed), question_inputs(seed + 10), question_inputs(seed)]
    asked[2]["tokens_after_boi"] = question_inputs(seed + 20)["tokens_after_boi"]
    names = {"image_latents": "image_latents", "befores": "tokens_before_image", "afters": "tokens_after_boi"}
    return {name: [question[key] for question in asked] for name, key in names.items()}


def about_one_image(seed: int) -> dict[str, Any]:
    """The same, one image for all questions."""
    inputs = several(seed)
    return inputs | {"image_latents": inputs["image_latents"][:1]}


def samples(seed: int) -> dict[str, Any]:
    """Arguments of `calibrate`."""
    image, question = generation_inputs(small_model(), seed), question_inputs(seed)
    names = ("text_tokens", "text_tokens_null", "modality_positions", "modality_positions_null")
    return {
        "generation": [fx.GenerationSample(image["noise"], *(image[name] for name in names))],
        "understanding": [fx.UnderstandingSample(**question, answer_length=2)],
    }


def calibrated(model: Any, **given: Any) -> list[Tensor]:
    plan = fx.calibrate(model, **given, times=(0.25, 0.75), multiple=16, progress=False)
    return [*plan.scores.values(), *plan.layer_importance.values()]


def scores(seed: int, layers: int) -> dict[str, Any]:
    """Arguments of `TaskPlan.from_scores`."""
    generator = torch.Generator().manual_seed(seed)
    tasks = ("generation", "understanding")
    return {task: [torch.randn(64, generator=generator) for _ in range(layers)] for task in tasks}


def planned(model: Any, **given: Any) -> list[Tensor]:
    plan = fx.TaskPlan.from_scores(**given, multiple=16)
    return [*plan.scores.values(), *(plan.kept(task, 0) for task in plan.tasks)]


CASES = {
    "sample": Case(
        lambda seed: generation_inputs(small_model(), seed),
        lambda m, **i: fx.showo2.sample(m, **i, return_velocity=True),
    ),
    "sample, dense, unguided": Case(
        lambda seed: generation_inputs(small_model(), seed) | {"guidance_scale": 0.0},
        lambda m, **i: fx.showo2.sample(m, **i, steps=4, return_velocity=True),
        dense=True,
    ),
    "t2i_generate": Case(evaluations, evaluate),
    "answer_tokens": Case(question_inputs, lambda m, **i: fx.showo2.answer_tokens(m, **i, max_new_tokens=5)),
    "answer_tokens_batch": Case(several, lambda m, **i: fx.showo2.answer_tokens_batch(m, **i, max_new_tokens=5)),
    "answer_tokens_batch, one image": Case(
        about_one_image, lambda m, **i: fx.showo2.answer_tokens_batch(m, **i, max_new_tokens=5)
    ),
    "mmu_generate": Case(embedded, lambda m, **i: m.mmu_generate(**i, max_new_tokens=5, top_k=1)),
    "calibrate": Case(samples, calibrated, dense=True),
    "from_scores": Case(lambda seed: scores(seed, 8), planned, dense=True),
    "from_scores, one layer": Case(lambda seed: scores(seed, 1), planned, dense=True),
}


def leaves(value: Any) -> list[Any]:
    """The tensors in nested lists, dicts and samples."""
    flat = []
    for leaf in tree_leaves(value):
        flat += leaves(vars(leaf)) if hasattr(leaf, "__dataclass_fields__") else [leaf]
    return flat


def equal(a: Any, b: Any) -> bool:
    """Equal bit for bit, with equally many tensors."""
    ours, theirs = leaves(a), leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(ours, theirs, strict=True)
    )


def overwrite(value: Any, other: Any) -> None:
    """Overwrites the tensors of one value with those of another, in place."""
    for mine, theirs in zip(leaves(value), leaves(other), strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(theirs)


@contextlib.contextmanager
def ready(case: Case) -> Iterator[Any]:
    model = small_model()
    with contextlib.nullcontext() if case.dense else fx.accelerate(model, CONFIG):
        yield model


@pytest.mark.parametrize("name", CASES)
def test_arguments_and_results_belong_to_the_caller(name: str) -> None:
    case = CASES[name]
    with ready(case) as model:
        fresh = case.run(model, **case.make(2))
    inputs = case.make(1)
    with ready(case) as model:
        first = case.run(model, **inputs)
        assert equal(inputs, case.make(1)), "an argument was changed"
        kept = copy.deepcopy(first)
        assert not equal(first, fresh), "two seeds must give different results"
        overwrite(inputs, case.make(2))
        assert equal(first, kept), "a result changed with an argument"
        again = case.run(model, **inputs)
        assert equal(again, fresh), "differs from a fresh handle"
        assert equal(first, kept), "an earlier result was overwritten"
        for tensor in leaves(again):
            tensor.zero_()
        assert equal(case.run(model, **inputs), fresh), "memory of a result was reused"
        assert equal(inputs, case.make(2)), "an argument changed with a result"


def test_a_plan_and_its_file_have_nothing_in_common(tmp_path: Path) -> None:
    plan = fx.TaskPlan.from_scores(**scores(1, 3), multiple=16)
    before, path = copy.deepcopy(plan.scores), tmp_path / "plan.safetensors"
    plan.save(path)
    assert equal(plan.scores, before)
    loaded = fx.TaskPlan.load(path)
    overwrite(plan.scores, scores_of(2))
    assert equal(loaded.scores, before)
    overwrite(loaded.scores, scores_of(2))
    assert equal(fx.TaskPlan.load(path).scores, before)


def scores_of(seed: int) -> dict[str, Tensor]:
    return {task: torch.stack(rows) for task, rows in scores(seed, 3).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_and_its_files_have_nothing_in_common(tied: bool, tmp_path: Path) -> None:
    model = small_model(tied=tied)
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    assert equal(model.state_dict(), before) and list(model.state_dict()) == list(before)
    first, second = (fx.showo2.Showo2.from_pretrained(tmp_path) for _ in range(2))
    with torch.no_grad():
        for parameter in (*model.parameters(), *first.parameters()):
            parameter.zero_()
    assert equal(second.state_dict(), before)
    assert equal(fx.showo2.Showo2.from_pretrained(tmp_path).state_dict(), before)
