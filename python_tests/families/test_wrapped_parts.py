"""Parts of a model inside modules of somebody's own: run as themselves, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import flashu_ext as fx
from flashu_ext.cli.main import cli
from flashu_ext.nano.subject import FAMILIES

STACKS = {
    "showo2": "showo.model",
    "janusflow": "language_model.model",
    "bagel": "language_model.model",
}


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **more: Any) -> Any:
        return self.inner(*arguments, **more)


def wrapped(model: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, Wrapper(model.get_submodule(path)))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_norm_runs_as_itself(family: str, late: bool) -> None:
    pipe = fx.load_pipeline("nano", family=family)
    image = pipe.generate("a red circle", 0, 4)
    answer = pipe.answer(image, "what color is the circle ?", 4)
    path = f"{STACKS[family]}.layers.0.input_layernorm"
    if late:
        handle = fx.accelerate(pipe.model)
        wrapped(pipe.model, path)
    else:
        wrapped(pipe.model, path)
        handle = fx.accelerate(pipe.model)
    got = pipe.generate("a red circle", 0, 4)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= 1
    assert pipe.answer(image, "what color is the circle ?", 4) == answer
    assert any("input_layernorm" in reason for reason in handle.summary().fallbacks)


@pytest.mark.parametrize(
    ("family", "path", "named"),
    [
        *((family, f"{stack}.embed_tokens", "embed_tokens.weight") for family, stack in STACKS.items()),
        ("bagel", "vae2llm", "vae2llm.weight"),
        ("janusflow", "vision_und_enc_model.vision_tower.patch_embed", "patch_embed.proj"),
        ("janusflow", "vision_und_enc_model.vision_tower.blocks", r"blocks\.0\.attn"),
    ],
)
def test_a_wrapped_part_that_must_be_read_is_named(family: str, path: str, named: str) -> None:
    model = fx.load_pipeline("nano", family=family).model
    wrapped(model, path)
    with pytest.raises(TypeError, match=f"without .*{named}"):
        fx.accelerate(model)
    assert fx.handle_of(model) is None


@pytest.mark.parametrize("family", ["showo2", "janusflow"])
def test_a_layer_in_two_places_is_refused(family: str) -> None:
    """Transformers would cache the keys of both as one layer's."""
    model = fx.load_pipeline("nano", family=family).model
    layers = model.get_submodule(f"{STACKS[family]}.layers")
    layers[1] = layers[0]
    with pytest.raises(TypeError, match=r"layers\.1: its keys and values are cached with those of layer 0"):
        fx.accelerate(model)


def test_heads_of_an_image_encoder_are_its_own() -> None:
    pipe = fx.load_pipeline("nano", family="janusflow")
    image = pipe.generate("a red circle", 0, 4)
    for block in pipe.model.vision_und_enc_model.vision_tower.blocks:
        block.attn.heads = 2
    asked = pipe.question_inputs(image, "is there a red circle ?")
    with torch.no_grad():
        expected = pipe.model.embed_image(asked[0][0])
    with fx.accelerate(pipe.model) as handle:
        (got,) = handle.runner.understanding.image_embeds(asked[0])
    got = got[:, -expected.shape[1] :]
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_an_attention_that_is_not_causal_is_refused() -> None:
    model = fx.load_pipeline("nano", family="janusflow").model
    with fx.accelerate(model):
        model.language_model.model.layers[1].self_attn.is_causal = False
        with pytest.raises((TypeError, RuntimeError), match="is_causal is False"):
            fx.janusflow.sample(model, torch.zeros(1, 16, 12, 12), torch.tensor([1, 2, 3]), 2)


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_groups"])
def test_heads_that_are_not_its_weights_are_refused(name: str) -> None:
    """The dense model would raise in the middle of its own sums."""
    model = fx.load_pipeline("nano", family="janusflow").model
    attention = model.language_model.model.layers[1].self_attn
    setattr(attention, name, 2 * getattr(attention, name))
    with pytest.raises(TypeError, match=f"self_attn: its {name} is .*, expected .*, as its weights have"):
        fx.accelerate(model)


@pytest.mark.parametrize("name", ["q_norm_moe_gen", "k_norm_moe_gen"])
def test_a_drawing_experts_norm_of_another_epsilon_is_refused(name: str) -> None:
    model = fx.load_pipeline("nano", family="bagel").model
    getattr(model.language_model.model.layers[0].self_attn, name).variance_epsilon = 0.5
    with pytest.raises(TypeError, match="q_norm_moe_gen and k_norm_moe_gen have different epsilons"):
        fx.accelerate(model)


def test_a_family_needs_kernels() -> None:
    result = CliRunner().invoke(cli, ["schedule", "--family", "bagel"])
    assert result.exit_code == 2 and "--family: expected with --kernels only" in result.output
