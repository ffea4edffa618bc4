"""Small models of several shapes: images and answers compared with the dense model, the choice of skipped layers, and the
limits of an answer's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.answers import batch
from support.answers import oracle as answer_oracle
from support.models import GRID, LENGTH, VOCABULARY, generation_inputs, question_inputs, small_model
from support.oracle import Oracle, recorded_tokens
from support.tape import TapeCapture
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.showo2.understanding import prompt_embeds
from flashu_ext.ops.kernel_sets import resolve
from flashu_ext.planning.schedule import least_important
from flashu_ext.runtime import generation, understanding
from flashu_ext.runtime.answer_memory import CAPACITY_STEP, AnswerShape
from flashu_ext.runtime.modules.attention import HeadNorms, RowGeometry, SpanPass

pytestmark = pytest.mark.usefixtures("one_thread", "shared_state")

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "one key head": {"heads": (4, 1)},
    "as many key heads": {"heads": (2, 2)},
    "no projection before the head": {"hidden": 48, "heads": (3, 1), "head_hidden": 48},
    "no time token": {"time_token": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_images_and_answers_equal_the_dense_model(shape: str) -> None:
    model = small_model(**SHAPES[shape])
    image, question = generation_inputs(model), question_inputs()
    latents = fx.showo2.sample(model, **image, steps=6)
    answer = fx.showo2.answer_tokens(model, **question, max_new_tokens=6)
    with fx.accelerate(model, fx.FlashUConfig.exact(steps=6)):
        torch.testing.assert_close(fx.showo2.sample(model, **image), latents, rtol=1e-3, atol=1e-3)
        assert torch.equal(fx.showo2.answer_tokens(model, **question, max_new_tokens=6), answer)


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 1), (0.3, 2), (0.49, 3)])
def test_the_least_important_layers_are_skipped_wherever_they_are(ratio: float, count: int) -> None:
    order = (3, 0, 5, 1, 7, 2, 6, 4)
    model = small_model(order=order)
    config = fx.FlashUConfig(steps=6, layer_skip_ratio=ratio, layer_skip_interval=4)
    with fx.accelerate(model, config) as handle:
        fx.showo2.sample(model, **generation_inputs(model))
        skipped = handle.summary().layers_skipped
    assert skipped and all(layers == tuple(sorted(order[:count])) for _, layers in skipped), skipped


@torch.no_grad()
def turning_norm(model: Any) -> Any:
    """The model with a final norm that turns a vector, which one with weights of one does not."""
    weight = model.showo.model.norm.weight
    weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) * 4)
    return model


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The importance of the layers at every choice."""
    seen: list[Tensor] = []

    def choose(scores: Sequence[float], count: int) -> tuple[int, ...]:
        seen.append(torch.tensor(scores))
        return least_important(scores, count)

    for module in (generation, understanding):
        monkeypatch.setattr(module, "least_important", choose)
    return seen


@pytest.mark.parametrize("more", [{}, {"token_skip": True, "token_skip_ratio": 0.5, "token_skip_interval": 4}])
def test_measured_layer_importance_equals_plain_torch(measured: list[Tensor], more: dict[str, Any]) -> None:
    """Over all positions of all rows, the padding after the image too; the last layer's output after the final norm."""
    model, dense = turning_norm(small_model()), turning_norm(small_model())
    inputs = generation_inputs(model)
    config = fx.FlashUConfig(steps=9, layer_skip_ratio=0.3, layer_skip_interval=4, **more)
    chosen: dict[int, Tensor] = {}
    with fx.accelerate(model, config), recorded_tokens(chosen):
        fx.showo2.sample(model, **inputs)
    oracle = Oracle(dense, inputs, config, chosen)
    oracle.generate()
    assert sorted(oracle.of_layers) == [1, 5] and len(measured) == 2
    for got, expected in zip(measured, oracle.of_layers.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_measured_layer_importance_of_a_question_equals_plain_torch(measured: list[Tensor]) -> None:
    """Importance of the prompt's last token, one per row of a batch."""
    model, questions = small_model(), [question_inputs(1), question_inputs(2)]
    with fx.accelerate(model, fx.FlashUConfig(answer_layer_skip_ratio=0.3)):
        fx.showo2.answer_tokens_batch(model, *batch(questions), max_new_tokens=1)
    for got, question in zip(measured, questions, strict=True):
        expected: list[Tensor] = []
        answer_oracle(small_model(), **question, max_new_tokens=1, importance=expected)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("time_token", "late"), [(True, 1), (False, 0)])
def test_the_span_of_a_question_with_and_without_a_time_token(time_token: bool, late: int) -> None:
    """It covers the image and the token behind it. In models with a time token, which stands before the image and looks at
    no later token, it starts behind that."""
    asked = question_inputs()
    _, allowed = prompt_embeds(small_model(time_token=time_token), **asked)
    first = asked["tokens_before_image"].shape[1] + 1 + late
    last = first + GRID * GRID - 1 + late
    expected = torch.ones_like(allowed).tril()
    expected[first : last + 1, first : last + 1] = True
    assert torch.equal(allowed, expected)


def test_an_image_span_that_ends_with_its_row_is_drawn_and_one_token_more_is_refused() -> None:
    model = small_model()
    inputs = generation_inputs(model)
    span = GRID * GRID + 1
    inputs["modality_positions"] = torch.tensor([[[LENGTH - span, span]], [[2, span]]])
    latents = fx.showo2.sample(model, **inputs, steps=4)
    with fx.accelerate(model):
        torch.testing.assert_close(fx.showo2.sample(model, **inputs, steps=4), latents, rtol=1e-3, atol=1e-3)
        inputs["modality_positions"][0, 0, 0] += 1
        with pytest.raises(IndexError, match=rf"modality_positions\[0\]: span \[10, {LENGTH + 1}\) is outside"):
            fx.showo2.sample(model, **inputs, steps=4)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("changes", [{}, {"token_prune_ratio": 0.5, "token_prune_layer": 3}])
@pytest.mark.parametrize("slots", [CAPACITY_STEP, CAPACITY_STEP + 1])
def test_an_answer_that_fills_its_memory_and_one_that_needs_one_slot_more(
    slots: int, changes: dict[str, Any], captured: bool
) -> None:
    """Captured memory is rounded up. The answer's last token is never written: prompt and answer may be one token longer."""
    question = question_inputs()
    prompt = 3 + 5 + GRID * GRID + 1  # tokens before and after the span, and the span
    new = slots - prompt + 1
    expected, _, _ = answer_oracle(
        small_model(), **question, max_new_tokens=8, ratio=changes.get("token_prune_ratio", 0.0), layer=3
    )
    model = small_model()
    with fx.accelerate(model, fx.FlashUConfig(**changes)):
        whole = fx.showo2.answer_tokens(model, **question, max_new_tokens=new)
    with fx.accelerate(model, fx.FlashUConfig(**changes)) as handle:
        if captured:
            handle.runner.capture.make = TapeCapture
        answer = fx.showo2.answer_tokens(model, **question, max_new_tokens=new)
        short = fx.showo2.answer_tokens(model, **question, max_new_tokens=8)
    assert answer.shape == (new,) and answer[:8].tolist() == expected == short.tolist()
    assert torch.equal(answer, whole)


@pytest.mark.parametrize(("slots", "capacity"), [(255, 256), (256, 256), (257, 512), (512, 512), (513, 768)])
def test_the_capacity_of_captured_answers(slots: int, capacity: int) -> None:
    shape = AnswerShape(2, (slots, slots), 8, torch.float32)
    rounded = shape.rounded()
    assert rounded.capacities == (capacity, capacity) and rounded.holds(shape)
    one_more = AnswerShape(2, (capacity, capacity + 1), 8, torch.float32)
    assert not rounded.holds(one_more) and not rounded.holds(AnswerShape(1, (slots, slots), 8, torch.float32))


def test_a_token_id_equal_to_the_vocabulary_is_refused() -> None:
    model, question = small_model(), question_inputs()
    question["tokens_after_boi"][0, -1] = VOCABULARY
    with pytest.raises(IndexError, match=f"tokens_after_boi: expected token ids in .0, {VOCABULARY}"):
        fx.showo2.answer_tokens(model, **question)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_survives_its_files(tied: bool, tmp_path: Any) -> None:
    model = small_model(tied=tied)
    model.save_pretrained(tmp_path)
    again = fx.showo2.Showo2.from_pretrained(tmp_path)
    assert (again.showo.lm_head.weight is again.showo.model.embed_tokens.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_routed_queries_of_normed_heads_are_those_of_all_tokens() -> None:
    """Every token active: the routed pass computes what the whole span's does, norms of the heads included."""
    kernels = next(iter(resolve(fx.FlashUConfig.exact(), torch.device("cpu"), torch.float32).sets.values()))
    query, key, value = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
    rope = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    norms = HeadNorms(torch.rand(8) + 0.5, torch.rand(8) + 0.5, 1e-6)
    geometry = RowGeometry((3, 1), 5)
    cache = torch.randn(1, 2, 2, 8, 2, 8)
    whole = SpanPass(cache.clone(), geometry, kernels)(0, query, key, value, rope, norms)
    active = torch.arange(5).expand(2, 5)
    routed = SpanPass(cache.clone(), geometry, kernels).routed(0, query, key, value, rope, rope, active, norms)
    assert torch.equal(routed, whole)
    plain = SpanPass(cache.clone(), geometry, kernels).routed(0, query, key, value, rope, rope, active, None)
    assert not torch.equal(plain, whole)
