"""Parts of a model besides its layers that change or run as themselves: embedders, encoder, chains, vectors, output head."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conformance import relative
from support.living import LIMIT, outputs
from support.models import generation_inputs, question_inputs, small_model
from torch import Tensor, nn

import flashu_ext as fx

KernelUnavailableError = fx.kernel_sets.KernelUnavailableError


def agree(model: Any) -> None:
    """The accelerated model's outputs are those of the dense one as it is."""
    handle = fx.handle_of(model)
    got = outputs(model)
    handle.remove()
    expected = outputs(model)
    assert relative(got[0], expected[0]) < LIMIT and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("where", ["image_embedder_gen.proj", "image_embedder_und.proj"])
@pytest.mark.parametrize("method", ["_conv_forward", "_call_impl", "forward"])
@pytest.mark.parametrize("late", [False, True])
def test_a_private_method_that_computes_is_honoured(where: str, method: str, late: bool) -> None:
    model = small_model()
    convolution = model.get_submodule(where)
    real = getattr(convolution, method)

    def change() -> None:
        setattr(convolution, method, types.MethodType(lambda self, *a, **k: real(*a, **k) * 1.5, convolution))

    if not late:
        change()
    with fx.accelerate(model) as handle:
        before = outputs(model)
        if late:
            change()
            assert not torch.equal(outputs(model)[0], before[0])
        assert any(name.startswith(f"model.{where.split('.')[0]}") for name in handle.summary().fallbacks)
        agree(model)


def test_an_embedder_that_runs_as_itself_may_give_columns() -> None:
    """A convolution's output is strided, which the kernels behind it cannot read."""
    model = small_model()
    model.image_embedder_und.register_forward_hook(lambda module, inputs, output: output * 1.1)
    model.image_embedder_gen.register_forward_hook(lambda module, inputs, output: output * 0.9)
    fx.accelerate(model)
    agree(model)


@pytest.mark.parametrize(
    ("activation", "change"),
    [
        (nn.LeakyReLU(0.1), lambda a: setattr(a, "negative_slope", 0.7)),
        (nn.ELU(), lambda a: setattr(a, "alpha", 3.0)),
        (nn.GELU(), lambda a: setattr(a, "approximate", "tanh")),
        (nn.Softplus(), lambda a: setattr(a, "beta", 4)),
    ],
)
@pytest.mark.parametrize("place", ["und_trans.layers.0.mlp.activation_fn", "fusion_proj.2"])
def test_an_activation_s_settings_that_change_are_noticed(
    activation: nn.Module, change: Callable[[nn.Module], Any], place: str
) -> None:
    model = small_model()
    owner, _, name = place.rpartition(".")
    parent = model.get_submodule(owner)
    if name.isdigit():
        parent[int(name)] = activation
    else:
        setattr(parent, name, activation)
    fx.accelerate(model)
    outputs(model)
    change(activation)
    agree(model)


def test_an_activation_s_function_that_changes_is_noticed() -> None:
    model = small_model()
    activation = model.und_trans.layers[0].mlp.activation_fn
    activation.act = F.gelu
    fx.accelerate(model)
    outputs(model)
    activation.act = torch.relu
    agree(model)


@pytest.mark.parametrize(
    "name",
    [
        "showo.model.norm.weight",
        "showo.model.layers.1.input_layernorm.weight",
        "showo.model.layers.0.self_attn.q_proj.bias",
        "und_trans.layers.0.layer_norm1.bias",
        "fusion_proj.0.weight",
    ],
)
def test_vectors_written_by_data_leave_no_stale_answer(name: str) -> None:
    model = small_model()
    fx.accelerate(model)
    outputs(model)
    model.get_parameter(name).data.mul_(3)
    agree(model)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize("place", ["fusion_proj", "diff_proj"])
def test_an_unknown_member_of_a_chain_is_named(place: str) -> None:
    model = small_model()
    index = next(i for i, each in enumerate(getattr(model, place)) if isinstance(each, nn.GELU))
    getattr(model, place)[index] = Odd()
    with pytest.raises(KernelUnavailableError, match=rf"model.{place}.{index}: FlashUConfig.batch_invariant is True"):
        fx.accelerate(model, fx.FlashUConfig(batch_invariant=True))
    assert fx.handle_of(model) is None
    with fx.accelerate(model) as handle:
        outputs(model)
        assert any(name.startswith(f"model.{place}.{index}: is a ") for name in handle.summary().fallbacks)
        agree(model)


class Scaled(nn.Module):
    """Wraps a linear layer and has no weight of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2 + x.sum(-1, keepdim=True) * 0.01


def test_an_output_head_may_be_wrapped() -> None:
    model = small_model()
    model.showo.lm_head = Scaled(model.showo.lm_head)
    fx.accelerate(model)
    agree(model)


@pytest.mark.parametrize("norm", ["layer_norm1", "layer_norm2"])
@pytest.mark.parametrize("what", ["hook", "class"])
def test_an_encoder_s_norm_that_is_not_known_runs(norm: str, what: str) -> None:
    model = small_model()
    layer = model.und_trans.layers[0]
    if what == "hook":
        getattr(layer, norm).register_forward_hook(lambda module, inputs, output: output * 2)
    else:
        setattr(layer, norm, nn.Sequential(getattr(layer, norm), nn.Tanh()))
    with fx.accelerate(model) as handle:
        outputs(model)
        assert any(name.startswith("model.und_trans: layers.0") for name in handle.summary().fallbacks)
        agree(model)


def test_what_is_asked_is_what_is_generated() -> None:
    """The helpers above compare something."""
    model = small_model()
    assert generation_inputs(model)["noise"].shape[0] >= 1 and question_inputs()
    first = outputs(model)
    model.showo.model.norm.weight.data.mul_(3)
    assert not torch.equal(outputs(model)[0], first[0])
