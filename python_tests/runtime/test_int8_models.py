"""Models whose weights torchao has quantised to int8: on the int8 kernels, beside torchao's own result; other kinds by name."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from support.conformance import relative
from support.living import LIMIT, PRUNED, outputs, plan
from support.models import small_model
from torch import nn

import flashu_ext as fx
from flashu_ext.models.int8 import inner_tensors

pytest.importorskip("torchao")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

FFNS = ("gate_proj", "up_proj", "down_proj")
os.environ.setdefault("TORCHAO_SKIP_LOADING_SO_FILES", "1")  # its kernels, of which none is used here


def quantised(model: Any, config: Any = None, names: tuple[str, ...] = FFNS) -> Any:
    """The model with the language model's projections of these names in int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = Int8WeightOnlyConfig() if config is None else config
    quantize_(model, chosen, lambda module, name: name.startswith("showo.model.layers") and name.endswith(names))
    return model


def as_floats(model: Any) -> Any:
    """A copy with the numbers that the int8 weights stand for."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
            vars(module).pop("extra_repr", None)
    return model


@pytest.mark.parametrize("names", [FFNS, ("q_proj", "o_proj"), ("proj",)], ids=["FFN", "attention", "all"])
def test_int8_weights_take_their_kernels(names: tuple[str, ...]) -> None:
    model = quantised(small_model(), names=names)
    expected, exact = outputs(model), outputs(as_floats(model))
    with fx.accelerate(model) as handle:
        got = outputs(model)
        assert not [each for each in handle.summary().fallbacks if "int8" not in each]
        assert not any("runs" in each or "is a" in each for each in handle.summary().fallbacks)
        stored = [part for each in model.parameters() for part in (inner_tensors(each) or [each])]
        assert handle.summary().int8_weights == sum(bool(inner_tensors(each)) for each in model.parameters())
        assert handle.summary().weight_bytes == sum(part.nbytes for part in stored)
    assert relative(got[0], exact[0]) <= 2 * relative(expected[0], exact[0]) + LIMIT
    assert torch.equal(got[1], expected[1])


@torch.no_grad()
def test_a_bf16_decoder_is_as_accurate_as_torchao() -> None:
    model = quantised(small_model(order=(1, 0)).to(torch.bfloat16))
    exact, tokens = as_floats(model).double().showo, torch.arange(11)[None]
    truth = exact(tokens).logits
    theirs = (model.showo(tokens).logits.double() - truth).norm()
    with fx.prune_ffn(model.showo, everything(model), "understanding") as handle:
        assert handle.fallbacks == {}
        ours = (model.showo(tokens).logits.double() - truth).norm()
    assert 0 < ours <= 2 * theirs


def everything(model: Any) -> fx.TaskPlan:
    """A plan that keeps nearly all neurons: those that it drops give nothing."""
    layers = model.showo.model.layers
    for layer in layers:
        layer.mlp.down_proj.weight.qdata[:, :8] = 0
    scores = [torch.arange(64, dtype=torch.float32) for _ in layers]
    return fx.TaskPlan.from_scores(understanding=scores, ratio=0.125, multiple=8)


def test_a_plan_is_calibrated_on_the_quantised_model() -> None:
    model, dense = quantised(small_model()), small_model()
    samples = [fx.TokenSample(torch.arange(3, 14)[None])]
    made, other = (
        fx.calibrate(each.showo, understanding=samples, ratio=0.25, multiple=8, progress=False)
        for each in (model, dense)
    )
    with fx.prune_ffn(model.showo, made) as handle:
        assert handle.fallbacks == {}
    with pytest.raises(ValueError, match="made for another model"):
        fx.prune_ffn(model.showo, other)


def test_pruned_neurons_stay_where_they_are() -> None:
    model = quantised(small_model())
    same = as_floats(model)
    with fx.accelerate(model, PRUNED, plan()) as handle:
        got = outputs(model)
        reasons = handle.summary().fallbacks
    assert len(reasons) == 8 and all(
        each.endswith("its weights are int8; neurons read where they are") for each in reasons
    )
    with fx.accelerate(same, PRUNED, plan()):
        expected = outputs(same)
    assert relative(got[0], expected[0]) < LIMIT and torch.equal(got[1], expected[1])


def test_what_changes_in_int8_weights_is_noticed() -> None:
    model = quantised(small_model())
    other = copy.deepcopy(model)
    with fx.accelerate(model):
        before = outputs(model)
        for edit in ("written", "exchanged", "requantised"):
            for each in (model, other):
                weight = each.showo.model.layers[7].mlp.up_proj.weight
                if edit == "written":
                    weight.qdata.neg_()
                elif edit == "exchanged":
                    weight.scale = weight.scale * 3
                else:
                    each.showo.model.layers[7].mlp = quantised(small_model(seed=4)).showo.model.layers[7].mlp
            got, expected = outputs(model), outputs(other)
            assert relative(got[0], expected[0]) < LIMIT, edit
            assert relative(got[0], before[0]) > 10 * LIMIT, edit
            before = got


def test_zero_points_are_named() -> None:
    model = quantised(small_model())
    model.showo.model.layers[0].mlp.up_proj.weight.zero_point = torch.ones(64, 1, dtype=torch.int8)
    with fx.accelerate(model) as handle:
        (reason,) = handle.summary().fallbacks
    assert reason == "model.showo.model.layers.0.mlp: up_proj its weight is int8 with zero points"


def other_kinds() -> dict[str, tuple[Any, str]]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup, PerTensor

    return {
        "activations too": (Int8DynamicActivationInt8WeightConfig(), "int8 for activations that are quantised too"),
        "groups": (Int8WeightOnlyConfig(granularity=PerGroup(16)), "int8 with a scale for every [1, 16] of [64, 32]"),
        "one scale": (
            Int8WeightOnlyConfig(granularity=PerTensor()),
            "int8 with a scale for every [64, 32] of [64, 32]",
        ),
    }


@pytest.mark.parametrize("kind", ["activations too", "groups", "one scale"])
def test_other_kinds_run_as_themselves_by_name(kind: str) -> None:
    config, why = other_kinds()[kind]
    model = quantised(small_model(), config)
    expected = outputs(model)
    with fx.accelerate(model) as handle:
        got, reasons = outputs(model), list(handle.summary().fallbacks)
    assert len(reasons) == 8 and all(f".mlp: gate_proj its weight is {why}" in each for each in reasons)
    # A rounding of an activation to eight bits that falls on the other side is a visible difference.
    assert relative(got[0], expected[0]) < (0.1 if kind == "activations too" else LIMIT)


def test_some_int8_and_kernels_that_are_off_are_named() -> None:
    model = quantised(small_model(), names=("gate_proj",))
    with fx.accelerate(model) as handle:
        assert all("some of its weights are int8" in each for each in handle.summary().fallbacks)
    model = quantised(small_model())
    with fx.accelerate(model, fx.FlashUConfig(ffn_kernels=False)) as handle:
        outputs(model)
        assert any(
            "its weights are int8, for which only the CPU's FFN kernel is" in e for e in handle.summary().fallbacks
        )


def test_adapters_on_int8_weights_run_as_themselves() -> None:
    peft = pytest.importorskip("peft")
    from support.adapters import adapted

    model = quantised(small_model(order=(1, 0)))
    wrapped = adapted(model, ["up_proj"])
    expected = outputs(model)
    with fx.accelerate(wrapped) as handle:
        got = outputs(model)
        reasons = list(handle.summary().fallbacks)
    assert peft and reasons and all("up_proj" in each for each in reasons)
    assert relative(got[0], expected[0]) < LIMIT
