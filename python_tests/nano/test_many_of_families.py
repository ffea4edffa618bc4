"""Images drawn, and questions answered, together with others that began at other times: every family's, on its embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flashu_ext as fx
from flashu_ext.nano.subject import FAMILIES

PROMPTS = ["a red circle", "a blue square left of a green circle", "a green square"]
QUESTIONS = ["what color is the circle ?", "is there a square ?", "describe the image"]


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return fx.load_pipeline("nano", family=request.param)


@pytest.fixture(params=["dense", "exact", "paper"])
def either(request: pytest.FixtureRequest, pipe: Any) -> Iterator[Any]:
    config, plan = pipe.preset(request.param)
    if config is None:
        yield pipe
        return
    with pipe.accelerate(config.replace(steps=None), plan):
        yield pipe


REQUESTS: list[dict[str, Any]] = [
    {"prompt": PROMPTS[0], "seed": 3, "steps": 6},
    {"prompt": PROMPTS[1], "seed": 4, "steps": 9, "guidance_scale": 1.5},
    {"prompt": PROMPTS[2], "seed": 5, "steps": 7, "guidance_scale": 4.0},
]


def test_images_are_those_drawn_alone(either: Any) -> None:
    expected = []
    for asked in REQUESTS:
        settings = ([asked["seed"]], asked["steps"], asked.get("guidance_scale"))
        expected += either.generate_batch([asked["prompt"]], *settings)
    told: list[tuple[int, tuple[int, ...]]] = []
    many = either.generate_many(at_once=2)
    first = many.add({**REQUESTS[0], "on_step": lambda step, latents: told.append((step, tuple(latents.shape)))})
    results = [*many.step(), *many.step()]  # the others come later
    wrong = many.add({"prompt": PROMPTS[0], "steps": 0})
    later = [many.add(request) for request in REQUESTS[1:]]
    results += list(many)
    by_index = {result.index: result for result in results}
    assert sorted(by_index) == sorted([first, wrong, *later])
    assert isinstance(by_index[wrong].error, ValueError) and by_index[wrong].image is None
    for index, image in zip([first, *later], expected, strict=True):
        got = by_index[index]
        assert got.error is None and np.array_equal(np.asarray(got.image), np.asarray(image))
        assert either.pictures(got.latents[None])[0].tobytes() == got.image.tobytes()
    evaluations = 6 - (either.family != "janusflow")
    assert told == [(step + 1, (1, *by_index[first].latents.shape)) for step in range(evaluations)]


def test_answers_are_those_given_alone(either: Any) -> None:
    pictures = [Image.effect_noise((48, 48), 40 + each).convert("RGB") for each in range(3)]
    asked = [{"images": image, "question": text} for image, text in zip(pictures, QUESTIONS, strict=True)]
    asked.append({"images": [pictures[0]], "question": QUESTIONS[1], "temperature": 0.8, "top_p": 0.9, "seed": 7})
    expected = [either.answer(each["images"], each["question"], 6) for each in asked[:3]]
    expected.append(either.answer(pictures[0], QUESTIONS[1], 6, temperature=0.8, top_p=0.9, seed=7))
    words: list[int] = []
    many = either.answer_many(({**each, "max_new_tokens": 6} for each in asked), at_once=3)
    many.add({"images": pictures[0], "question": " "})
    many.add({"images": "a.png", "question": "what ?"})
    last = many.add({**asked[1], "max_new_tokens": 6, "on_token": words.append})
    results = {result.index: result for result in many}
    assert [type(results[index].error) for index in (0, 1)] == [ValueError, TypeError]
    assert results[last].answer == expected[1] and either.layout.answer(words) == expected[1]
    assert [results[index].answer for index in range(last + 1, last + 5)] == expected


def test_a_preset_of_one_image(pipe: Any) -> None:
    config, plan = pipe.preset("paper")
    with pipe.accelerate(config.replace(steps=None), plan):
        alone = pipe.generate(PROMPTS[0], 3, 6)
        results = list(pipe.generate_many([{**REQUESTS[0], "preset": config.replace(steps=None, guidance=None)},
                                           REQUESTS[0]]))  # fmt: skip
    images = {result.index: result.image for result in results}
    assert images[1].tobytes() == alone.tobytes() != images[0].tobytes()
    with pytest.raises(ValueError, match="preset: expected None for a dense model"):
        raise next(pipe.generate_many([{**REQUESTS[0], "preset": "exact"}])).error


@torch.no_grad()
def test_what_is_wrong_is_the_results(pipe: Any) -> None:
    wrong = [3, {"prompt": 3}, {"prompt": "a", "seed": -1}, {"prompt": "a", "size": 50}, {"prompt": "a", "guidance_scale": -1.0},
             {"prompt": "a", "colour": 1}]  # fmt: skip
    results = list(pipe.generate_many(wrong))
    assert all(isinstance(each.error, (TypeError, ValueError)) and each.image is None for each in results)
    for name, result in zip(("prompt", "seed", "size", "guidance_scale"), results[1:5], strict=True):
        assert str(result.error).startswith(f"{name}")
