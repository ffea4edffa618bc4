"""What requests leave behind when they end, and requests that would take others with them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from flashu_ext.showo2 import ImageRequest, QuestionRequest
from PIL import Image
from support.models import question_inputs, small_model

import flashu_ext as fx
from flashu_ext.runtime.image_memory import ImageMemory

PICTURE = Image.new("RGB", (48, 48), "red")


@pytest.fixture
def pipe() -> Any:
    return fx.showo2.Pipeline.from_pretrained("nano")


def question(**changes: Any) -> QuestionRequest:
    return QuestionRequest(**{"images": PICTURE, "question": "what shape ?", "max_new_tokens": 4, **changes})


def test_a_list_is_numbered_before_what_is_added(pipe: Any) -> None:
    many = pipe.generate_many([ImageRequest("a", steps=2), ImageRequest("b", steps=2)], at_once=1)
    assert many.add(ImageRequest("c", steps=2)) == 2
    many.cancel(1)  # before it has begun
    assert [(result.index, result.request.prompt) for result in many] == [(0, "a"), (2, "c")]


def test_answers_leave_no_memory(pipe: Any) -> None:
    with pipe.accelerate() as handle:
        held, kept = [], []
        for _ in range(4):
            kept.append(pipe.answer_many([question(), question(question="where is it ?")]))
            assert [result.error for result in kept[-1]] == [None] * 2
            gc.collect()
            held.append((len(handle.runner.understanding.pool._leased), handle.summary().cache_bytes))
        assert held[0] == held[-1] and held[0][0] <= 1
        many = pipe.answer_many([question()])
        assert [result.error for result in many] == [None]
        many.add(question())  # it goes on after a rest
        assert [result.error for result in many] == [None]


def test_loops_that_are_left_leave_no_memory(pipe: Any) -> None:
    with pipe.accelerate() as handle:
        for _ in range(3):
            for _result in pipe.generate_many([ImageRequest("a", steps=2), ImageRequest("b", steps=9)]):
                break
            for _answer in pipe.answer_many([question(max_new_tokens=1), question(max_new_tokens=9)]):
                break
        gc.collect()
        assert not len(handle.runner.generation.pool._leased)
        assert len(handle.runner.understanding.pool._leased) <= 1


def test_errors_hold_no_memory(pipe: Any) -> None:
    def fail(step: int, latents: Any) -> None:
        raise ValueError("of the caller's")

    with pipe.accelerate():
        results = list(pipe.generate_many([ImageRequest("a", steps=4, on_step=fail) for _ in range(3)]))
        gc.collect()
        assert len(results) == 3 and not any(type(each) is ImageMemory for each in gc.get_objects())
    error = results[0].error
    assert str(error) == "of the caller's"
    assert error.__traceback__ is not None and error.__traceback__.tb_frame.f_code is fail.__code__


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, float("nan")), (torch.float32, 1e38), (torch.float16, 1e6)]
)
@pytest.mark.parametrize("together", [False, True])
def test_a_question_that_is_not_finite_spoils_no_other(dtype: torch.dtype, value: float, together: bool) -> None:
    model = small_model().to(dtype)
    asked = [question_inputs(seed) for seed in range(3)]
    # The same system prompt, as in every pipeline; of more than half a question, it is shared within a batch too.
    system = asked[0]["tokens_before_image"].repeat(1, 12 if together else 1)
    for each in asked:
        each["tokens_before_image"] = system
    bad = asked[0] | {"image_latents": torch.full_like(asked[0]["image_latents"], value)}

    def answers(questions: list[Any]) -> list[list[int]]:
        latents, before, after = (
            [each[name] for each in questions] for name in ("image_latents", "tokens_before_image", "tokens_after_boi")
        )
        got = fx.showo2.answer_tokens_batch(model, latents, before, after, max_new_tokens=6, eos_token=None)
        return [each.tolist() for each in got]

    with fx.accelerate(model) as handle:
        alone = []
        for each in asked:
            handle.runner.reset()
            alone += answers([each])
        handle.runner.reset()
        if together:
            assert answers([bad, *asked])[1:] == alone
        else:
            answers([bad])
        for _ in range(2):
            assert [answers([each])[0] for each in asked] == alone


@pytest.mark.parametrize("temperature", [10**20, 10**400])
def test_a_number_that_no_float_can_hold_spoils_no_other(pipe: Any, temperature: int) -> None:
    with pipe.accelerate():
        asked = [question(), question(temperature=temperature, seed=0), question()]
        results = sorted(pipe.answer_many(asked), key=lambda result: result.index)
        assert results[0].error is results[2].error is None
        if temperature > 1e300:
            assert "temperature: expected a finite number" in str(results[1].error)
        else:
            assert results[1].error is None
        (drawn,) = pipe.generate_many([ImageRequest("a", steps=2, guidance_scale=10**400)])
        assert "guidance_scale: expected a finite number" in str(drawn.error)


def test_tokens_may_come_in_any_mode(pipe: Any) -> None:
    with pipe.accelerate():
        expected = pipe.answer(PICTURE, "what shape ?", 6)
        many, got = pipe.answer_many([question(max_new_tokens=6)]), []
        for step in range(12):
            with torch.inference_mode(step % 2 == 1):
                got += many.step()
    assert [result.error for result in got] == [None] and got[0].answer == expected


def test_an_image_that_began_dense_does_not_end_accelerated(pipe: Any) -> None:
    many = pipe.generate_many([ImageRequest("a", steps=6)])
    many.step()
    with pipe.accelerate(*pipe.preset("paper")):
        (result,) = many
    assert "it was accelerated while this image was being generated" in str(result.error)


def test_what_cannot_be_accelerated_is_not_described() -> None:
    hooked = small_model()
    hooked.showo.model.layers[0].register_forward_hook(lambda *_: None)
    deep = fx.FlashUConfig(token_prune_ratio=0.5, token_prune_layer=99)
    for model, config, error in ((hooked, fx.FlashUConfig.exact(), TypeError), (small_model(), deep, ValueError)):
        for each in (fx.kernel_sets.describe, fx.accelerate):
            with pytest.raises(error):
                each(model, config)
