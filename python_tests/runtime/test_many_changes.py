"""Many requests under way while the model, its handle or the list of requests changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flashu_ext.showo2 import ImageRequest, QuestionRequest
from PIL import Image
from torch import nn

import flashu_ext as fx

STEPS, WORDS = 5, 6
PICTURE = Image.new("RGB", (32, 32), "red")
ASKED = [QuestionRequest(PICTURE, text, WORDS) for text in ("what shape ?", "what colour ?", "how many ?")]


@pytest.fixture
def pipe() -> Iterator[Any]:
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    yield pipe
    handle = fx.handle_of(pipe.model)
    if handle is not None:
        handle.remove()


def answers(pipe: Any) -> list[str]:
    return [pipe.answer(each.images, each.question, max_new_tokens=WORDS) for each in ASKED]


def wide(request: QuestionRequest, told: Any = None) -> QuestionRequest:
    return QuestionRequest(request.images, request.question, WORDS, on_token=told)


# ---- answers


@pytest.mark.parametrize("again", [False, True])
def test_a_handle_that_is_removed_midway_ends_its_answers_by_name(pipe: Any, again: bool) -> None:
    """Those that had not begun are answered by what the model is then."""
    expected = answers(pipe)
    pipe.accelerate(fx.FlashUConfig.exact())
    many = pipe.answer_many([*ASKED, *ASKED], at_once=2)
    results = {each.index: each for each in many.step()}
    fx.handle_of(pipe.model).remove()
    if again:
        pipe.accelerate(fx.FlashUConfig.exact())
    results |= {each.index: each for each in many}
    assert sorted(results) == list(range(6))
    lost = [index for index, each in results.items() if each.error is not None]
    assert lost == [0, 1] and all("its handle was removed" in str(results[index].error) for index in lost)
    assert all(results[index].answer == expected[index % 3] for index in range(2, 6))


def test_a_model_that_is_accelerated_midway_goes_on(pipe: Any) -> None:
    expected = answers(pipe)
    many = pipe.answer_many(ASKED, at_once=1)
    results = {each.index: each for each in many.step()}
    pipe.accelerate(fx.FlashUConfig.exact())
    results |= {each.index: each for each in many}
    assert [results[index].answer for index in range(3)] == expected


def test_a_model_that_cannot_answer_any_more_is_an_error_of_each(pipe: Any) -> None:
    pipe.accelerate(fx.FlashUConfig.exact())
    many = pipe.answer_many([*ASKED, *ASKED], at_once=1)
    many.step()
    hook = pipe.model.showo.register_forward_hook(lambda module, inputs, output: output)
    results = {each.index: each for each in many}
    assert sorted(results) == list(range(6)) and all(each.error is not None for each in results.values())
    assert any("has a forward hook" in str(each.error) for each in results.values())
    hook.remove()
    assert pipe.answer_many(ASKED[:1]).__next__().error is None


# ---- images


def changes() -> dict[str, Any]:
    return {
        "hook": lambda model: model.diffusion_head_a[0].self_attn.q_proj.register_forward_hook(lambda m, i, o: o * 2),
        "module": lambda model: setattr(
            model.showo.model.layers[1], "mlp", copy.deepcopy(model.showo.model.layers[0].mlp)
        ),
        "forward": lambda model: setattr(
            model.fusion_proj, "forward", lambda x: x[..., : model.fusion_proj[-1].out_features]
        ),
        "weight": lambda model: model.showo.model.layers[1].mlp.up_proj.weight.data.mul_(2),
        "parameter": lambda model: setattr(
            model.showo.model.norm, "weight", nn.Parameter(model.showo.model.norm.weight * 2)
        ),
    }


@pytest.mark.parametrize("change", changes())
def test_a_change_between_two_steps_ends_the_images_under_way(pipe: Any, change: str) -> None:
    """Else an image would be of two models, half each, and nobody would know."""
    pipe.accelerate(fx.FlashUConfig.exact())
    many = pipe.generate_many([ImageRequest(text, steps=STEPS, seed=1) for text in ("a red circle", "a square")])
    many.step()
    changes()[change](pipe.model)
    results = {each.index: each for each in many}
    assert sorted(results) == [0, 1]
    for each in results.values():
        assert each.latents is None and "model: it was changed while this image was being generated" in str(each.error)
    (after,) = pipe.generate_many([ImageRequest("a square", steps=STEPS, seed=1)])
    assert after.error is None
    fx.handle_of(pipe.model).remove()
    (dense,) = pipe.generate_many([ImageRequest("a square", steps=STEPS, seed=1)])
    torch.testing.assert_close(after.latents, dense.latents, rtol=1e-3, atol=1e-4)


# ---- the list of requests


@pytest.mark.parametrize("fast", [False, True])
def test_a_callback_cannot_step_the_list_that_calls_it(pipe: Any, fast: bool) -> None:
    if fast:
        pipe.accelerate(fx.FlashUConfig.exact())
    many: Any = None
    errors = []

    def step(*_: Any) -> None:
        try:
            many.step()
        except RuntimeError as error:
            errors.append(str(error))

    many = pipe.generate_many([ImageRequest("a square", steps=STEPS, on_step=step)])
    (result,) = many
    assert result.error is None and len(errors) == STEPS - 1
    assert all("another step is under way" in each for each in errors)
    errors.clear()
    many = pipe.answer_many([wide(ASKED[0], step)])
    (result,) = many
    assert result.error is None and errors


@pytest.mark.parametrize("index", [-1, 2, 10**9])
def test_an_index_that_nobody_has_cannot_be_cancelled(pipe: Any, index: int) -> None:
    many = pipe.generate_many()
    for _ in range(2):
        many.add(ImageRequest("a square", steps=STEPS))
    with pytest.raises(IndexError, match="index: expected one of the 2 requests so far"):
        many.cancel(index)
    many.add(ImageRequest("a square", steps=STEPS))
    assert sorted(each.index for each in many) == [0, 1, 2]


def test_a_closed_list_gives_nothing_more(pipe: Any) -> None:
    many = pipe.generate_many([ImageRequest("a square", steps=2, seed=seed) for seed in range(3)], at_once=3)
    assert next(many).error is None  # the others have ended too, and wait
    many.close()
    assert list(many) == []


def test_an_image_with_a_preset_of_its_own_is_what_that_preset_draws(pipe: Any) -> None:
    own = fx.FlashUConfig(head_cache_interval=2, steps=STEPS)
    request = ImageRequest("a square", preset=own, steps=STEPS, seed=1)
    pipe.accelerate(own)
    (alone,) = pipe.generate_many([ImageRequest("a square", steps=STEPS, seed=1)])
    fx.handle_of(pipe.model).remove()
    pipe.accelerate(fx.FlashUConfig.exact())
    plain, got = pipe.generate_many([ImageRequest("a square", steps=STEPS, seed=1), request])
    assert torch.equal(got.latents, alone.latents) and not torch.equal(plain.latents, alone.latents)
