"""Small models of several shapes: drawing and answering beside the dense model, what is skipped, and callers' tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import VOCABULARY, drawing_inputs, question_inputs, small_model
from torch import Tensor

import flashu_ext as fx

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "one key head": {"heads": (4, 1)},
    "as many key heads": {"heads": (2, 2)},
    "no projection before the head": {"hidden": 48, "heads": (3, 1), "head_hidden": 48},
    "no time token": {"time_token": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_and_answering_equal_the_dense_model(shape: str) -> None:
    model = small_model(**SHAPES[shape])
    drawn, asked = drawing_inputs(model), question_inputs()
    latents = fx.showo2.sample(model, **drawn, steps=6)
    answer = fx.showo2.answer_tokens(model, **asked, max_new_tokens=6)
    with fx.accelerate(model, fx.FlashUConfig.exact(steps=6)):
        torch.testing.assert_close(fx.showo2.sample(model, **drawn), latents, rtol=1e-3, atol=1e-3)
        assert torch.equal(fx.showo2.answer_tokens(model, **asked, max_new_tokens=6), answer)


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 1), (0.3, 2), (0.49, 3)])
def test_the_least_important_layers_are_skipped_wherever_they_are(ratio: float, count: int) -> None:
    order = (3, 0, 5, 1, 7, 2, 6, 4)
    model = small_model(order=order)
    config = fx.FlashUConfig(steps=6, layer_skip_ratio=ratio, layer_skip_interval=4)
    with fx.accelerate(model, config) as handle:
        fx.showo2.sample(model, **drawing_inputs(model))
        skipped = handle.summary().layers_skipped
    assert skipped and all(layers == tuple(sorted(order[:count])) for _, layers in skipped), skipped


def changed(inputs: dict[str, Any], others: dict[str, Any]) -> None:
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(others[name])


def call(model: Any, what: str, inputs: dict[str, Any]) -> Tensor:
    if what == "draw":
        return fx.showo2.sample(model, **inputs)
    return fx.showo2.answer_tokens(model, **inputs, max_new_tokens=5)


@pytest.mark.parametrize("what", ["draw", "answer"])
def test_callers_tensors_are_neither_changed_nor_kept(what: str) -> None:
    model, config = small_model(), fx.FlashUConfig.exact(steps=5)
    make = (lambda seed: drawing_inputs(model, seed)) if what == "draw" else question_inputs
    with fx.accelerate(model, config):
        fresh = call(model, what, make(2))
    inputs = make(1)
    with fx.accelerate(model, config):
        first = call(model, what, inputs)
        for name, value in make(1).items():
            assert not isinstance(value, Tensor) or torch.equal(inputs[name], value), f"{name} was changed"
        kept = first.clone()
        changed(inputs, make(2))
        assert torch.equal(call(model, what, inputs), fresh), "the answer is not that of a fresh handle"
        assert torch.equal(first, kept), "an earlier result was overwritten"


@pytest.mark.parametrize("count", [256, 257])
def test_an_answer_as_long_as_its_memory_and_one_longer(count: int) -> None:
    """Capacity is rounded up to 256: prompt and answer fill it to the last slot, then need one more."""
    model, asked = small_model(), question_inputs()
    prompt = 3 + 5 + 17  # what stands before, behind, and the span
    new = count - prompt
    expected = fx.showo2.answer_tokens(model, **asked, max_new_tokens=8)
    with fx.accelerate(model, fx.FlashUConfig.exact()):
        answer = fx.showo2.answer_tokens(model, **asked, max_new_tokens=new)
    assert answer.shape == (new,) and torch.equal(answer[:8], expected)


def test_a_token_id_equal_to_the_vocabulary_is_refused() -> None:
    model, asked = small_model(), question_inputs()
    asked["tokens_after_boi"][0, -1] = VOCABULARY
    with pytest.raises(IndexError, match=f"tokens_after_boi: expected token ids in .0, {VOCABULARY}"):
        fx.showo2.answer_tokens(model, **asked)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_survives_its_files(tied: bool, tmp_path: Any) -> None:
    model = small_model(tied=tied)
    model.save_pretrained(tmp_path)
    again = fx.showo2.Showo2.from_pretrained(tmp_path)
    assert (again.showo.lm_head.weight is again.showo.model.embed_tokens.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
