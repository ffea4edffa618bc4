"""Requests that name a LoRA adapter each: beside each other they are what each is with that adapter active, alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import flashu_ext as fx
from flashu_ext.models.folders import load_pipeline
from flashu_ext.models.many import ImageRequest, QuestionRequest

peft = pytest.importorskip("peft")
from support.adapters import adapted, fill, second  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NAMES = ("default", "other", "__base__", None)


def pipeline(family: str = "showo2") -> tuple[Any, Any]:
    """The embedded model with two adapters: one beside every linear layer, which is active, and one that reaches fewer."""
    pipe = load_pipeline("nano", family=family)
    linear = [
        name for name, module in pipe.model.named_modules() if type(module) is nn.Linear and "attn_pool" not in name
    ]
    wrapped = adapted(pipe.model, linear, seed=1)
    second(wrapped, targets=["q_proj", "up_proj"])
    fill(wrapped, "default", seed=1, std=0.6)
    return pipe, wrapped


def activate(wrapped: Any, name: str | None) -> None:
    wrapped.base_model.enable_adapter_layers()
    if name == "__base__":
        wrapped.base_model.disable_adapter_layers()
    elif name is not None:
        wrapped.set_adapter(name)


def image(adapter: str | None, seed: int = 0) -> ImageRequest:
    return ImageRequest("a red circle above a blue square", seed, steps=4, adapter=adapter)


def question(picture: Any, adapter: str | None, seed: int = 0) -> QuestionRequest:
    return QuestionRequest(picture, "describe the image", 8, temperature=9.0, seed=seed, adapter=adapter)


@pytest.mark.parametrize(
    ("family", "preset"), [("showo2", "exact"), ("showo2", "paper"), ("janusflow", "exact"), ("bagel", "exact")]
)
def test_each_request_has_the_bits_of_its_adapter_alone(family: str, preset: str) -> None:
    pipe, wrapped = pipeline(family)
    picture = load_pipeline("nano", family=family).generate("a red circle above a blue square", 1, 8)
    settings = pipe.preset(preset)
    latents: dict[str | None, torch.Tensor] = {}
    answers: dict[tuple[str | None, int], str] = {}
    with pipe.accelerate(*settings):
        for name in NAMES:
            activate(wrapped, name or "default")
            (drawn,) = pipe.generate_many([image(None)])
            latents[name] = drawn.latents
            for seed in range(4):
                answers[name, seed] = pipe.answer(picture, "describe the image", 8, temperature=9.0, seed=seed)
        activate(wrapped, "default")
        assert len({each.sum().item() for each in latents.values()}) == 3, "adapters change the image"
        told = {name: [answers[name, seed] for seed in range(4)] for name in NAMES}
        assert told["default"] != told["__base__"], "and the answers"
        order = [*NAMES, *reversed(NAMES)]
        results = list(pipe.generate_many([image(name) for name in order]))
        assert all(result.error is None for result in results), [result.error for result in results]
        assert all(torch.equal(result.latents, latents[result.request.adapter]) for result in results)
        for at_once in (8, 2):
            asked = list(pipe.answer_many([question(picture, *each) for each in answers], at_once=at_once))
            got = {(each.request.adapter, each.request.seed): each.answer for each in asked}
            assert got == answers, [each.error for each in asked]
        assert wrapped.active_adapter == "default"
        (plain,) = pipe.generate_many([image(None)])
        assert torch.equal(plain.latents, latents["default"])


def test_an_adapter_that_is_written_to_later_counts() -> None:
    pipe, wrapped = pipeline()
    with pipe.accelerate(*pipe.preset("exact")):
        (before,) = pipe.generate_many([image("other")])
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if "lora_B.other" in name:
                    weight.mul_(2)
        (after,) = pipe.generate_many([image("other")])
        wrapped.set_adapter("other")
        (active,) = pipe.generate_many([image(None)])
        assert torch.equal(after.latents, active.latents) and not torch.equal(after.latents, before.latents)
        wrapped.set_adapter("default")
        wrapped.delete_adapter("other")
        (gone,) = pipe.generate_many([image("other")])
        assert "adapter: expected one of ['default', '__base__'] or None, got 'other'" in str(gone.error)


def dora(wrapped: Any) -> None:
    second(wrapped, "third", targets=["o_proj"], use_dora=True)


REFUSED: dict[str, tuple[Any, str, str]] = {
    "unknown": (
        lambda w: None,
        "third",
        r"adapter: expected one of \['default', 'other', '__base__'\] or None, got 'third'",
    ),
    "DoRA": (
        dora,
        "third",
        r"self_attn.o_proj runs as itself, .*its adapter 'third' is of another kind, DoraLinearVariant",
    ),
    "merged": (lambda w: w.merge_adapter(), "other", "adapter: expected none while adapters are merged"),
    "embeddings": (
        lambda w: second(w, "third", targets=["embed_tokens"]),
        "other",
        "embed_tokens runs as itself, with what is active: it is a peft.tuners.lora.layer.Embedding",
    ),
    "a hook on an FFN": (
        lambda w: w.base_model.model.showo.model.layers[1].mlp.register_forward_hook(lambda *_: None),
        "other",
        r"layers.1.mlp.gate_proj runs as itself, with what is active: it has a forward hook",
    ),
    "no name": (lambda w: None, 3, "adapter: expected None or a name, got int"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_named_is_refused_and_the_others_are_served(kind: str) -> None:
    change, name, message = REFUSED[kind]
    pipe, wrapped = pipeline()
    change(wrapped)
    picture = pipe.generate("a red circle", 1, 4)
    with pipe.accelerate(*pipe.preset("exact")):
        bad, good = pipe.generate_many([image(name), image(None)])
        with pytest.raises((TypeError, ValueError), match=message):
            raise bad.error
        assert good.error is None
        bad, good = pipe.answer_many([question(picture, name), question(picture, None)])
        with pytest.raises((TypeError, ValueError), match=message):
            raise bad.error
        assert good.error is None


def test_a_dense_model_computes_what_is_active() -> None:
    pipe, _ = pipeline()
    picture = pipe.generate("a red circle", 1, 4)
    for (result,) in (pipe.generate_many([image("other")]), pipe.answer_many([question(picture, "other")])):
        assert "adapter: expected None for a dense model" in str(result.error)
    (answered,) = pipe.answer_many([question(picture, None)])
    assert answered.error is None
    assert fx.handle_of(pipe.model) is None
