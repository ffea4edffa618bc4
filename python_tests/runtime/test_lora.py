"""LoRA adapters of peft: beside the kernels where they are plain, by name where they are not, and noticed when they change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conformance import relative
from support.living import LIMIT, PRUNED, equal, outputs, plan
from support.models import small_model
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.ops.kernel_sets import resolve
from flashu_ext.runtime.modules.linear import Linear, Linears

peft = pytest.importorskip("peft")
from support.adapters import ATTENTION, FFN, adapted, as_peft, fill, second  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return relative(got[0], expected[0]) < LIMIT and torch.equal(got[1], expected[1])


def two_active(wrapped: Any) -> None:
    second(wrapped, targets=["q_proj", "up_proj", "down_proj"])
    wrapped.base_model.set_adapter(["default", "other"])


EVERY = r".*((q|k|v|o|out|gate|up|down)_proj|fc1|fc2|linear|lm_head|fusion_proj\.[13]|mlp\.[02]|adaLN_modulation\.1)"

KINDS: dict[str, Callable[[], Any]] = {
    "everywhere": lambda: adapted(small_model()),
    "attention": lambda: adapted(small_model(), ATTENTION),
    "one projection": lambda: adapted(small_model(), ["v_proj"]),
    "gate": lambda: adapted(small_model(), ["gate_proj"]),
    "down": lambda: adapted(small_model(), ["down_proj"]),
    "every linear layer": lambda: adapted(small_model(), EVERY),
    "rank-stabilised": lambda: adapted(small_model(), use_rslora=True),
    "with dropout": lambda: adapted(small_model(), lora_dropout=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_adapters_run_beside_the_kernels(kind: str) -> None:
    wrapped = KINDS[kind]()
    model = wrapped.base_model.model
    expected = outputs(model)
    assert relative(expected[0], outputs(small_model())[0]) > 10 * LIMIT, "the adapter must change the outputs"
    with fx.accelerate(wrapped) as handle:
        assert close(outputs(model), expected)
        assert handle.summary().fallbacks == {}
    assert equal(outputs(model), expected)


@pytest.mark.parametrize("state", ["several", "merged", "disabled"])
def test_states_of_adapters(state: str) -> None:
    wrapped = adapted(small_model())
    if state == "several":
        two_active(wrapped)
    elif state == "merged":
        wrapped.merge_adapter()
    else:
        wrapped.base_model.disable_adapter_layers()
    model = wrapped.base_model.model
    expected = outputs(model)
    with fx.accelerate(model) as handle:
        assert close(outputs(model), expected)
        summary = handle.summary()
        assert summary.fallbacks == {} and set(summary.adapters) == (
            {"default", "other"} if state == "several" else set()
        )
        assert ("layers beside adapters: default " in str(summary)) == (state == "several")


def dropped(wrapped: Any) -> None:
    for name, module in wrapped.named_modules():
        if "layers.0." in name and name.endswith("q_proj.lora_dropout.default"):
            module.train()


def biased(wrapped: Any) -> None:
    second(wrapped, targets=["q_proj"], lora_bias=True)
    wrapped.base_model.set_adapter(["default", "other"])


def hooked(wrapped: Any) -> None:
    layer = wrapped.base_model.model.showo.model.layers[0]
    layer.self_attn.q_proj.lora_B["default"].register_forward_hook(lambda m, i, o: 2 * o)


def merged_and_disabled(wrapped: Any) -> None:
    wrapped.merge_adapter()
    wrapped.base_model.disable_adapter_layers()


BY_NAME: dict[str, tuple[dict[str, Any], Callable[[Any], None], str]] = {
    "DoRA": ({"use_dora": True}, lambda w: None, "its adapter 'default' is of another kind, DoraLinearVariant"),
    "bias": ({}, biased, "its adapter 'other' has a B that has a bias"),
    "a hook on B": ({}, hooked, "its adapter 'default' has a B that has a forward hook"),
    "disabled while merged": (
        {},
        merged_and_disabled,
        "its adapters are merged and disabled, which its next call undoes",
    ),
}


@pytest.mark.parametrize("kind", BY_NAME)
def test_other_adapters_run_as_themselves_by_name(kind: str) -> None:
    config, change, why = BY_NAME[kind]
    wrapped = adapted(small_model(), [r"q_proj"], **config)
    change(wrapped)
    model = wrapped.base_model.model
    with fx.accelerate(model) as handle:
        reasons = handle.summary().fallbacks
        got = outputs(model)
    assert reasons.get(f"model.showo.model.layers.0.self_attn.q_proj: {why}") == 1
    assert close(got, outputs(model))


def test_dropout_in_train_mode_and_other_types_are_named() -> None:
    wrapped = adapted(small_model(), ["q_proj"], lora_dropout=0.5)
    dropped(wrapped)
    loha = peft.get_peft_model(small_model(), peft.LoHaConfig(r=2, target_modules=["up_proj"])).eval()
    with fx.accelerate(wrapped) as handle:
        (reason,) = (each for each in handle.summary().fallbacks if "showo.model.layers.0." in each)
        assert reason.endswith("its adapter 'default' is in train mode with dropout; call model.eval()")
    with fx.accelerate(loha.base_model.model) as handle:
        assert all("up_proj is a peft.tuners.loha" in each for each in handle.summary().fallbacks)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "B written": lambda w: fill(w, seed=11, std=0.1),
    "scaling set": lambda w: [m.set_scale("default", 3.0) for m in w.modules() if hasattr(m, "set_scale")],
    "scaling of one layer": lambda w: w.base_model.model.showo.model.layers[1].self_attn.v_proj.scaling.update(
        default=9.0
    ),
    "another active": lambda w: w.set_adapter("other"),
    "both active": lambda w: w.base_model.set_adapter(["default", "other"]),
    "none active": lambda w: w.base_model.disable_adapter_layers(),
    "merged": lambda w: w.merge_adapter(),
    "deleted": lambda w: w.delete_adapter("default"),
    "added and active": lambda w: (second(w, "third"), w.set_adapter("third")),
    "unloaded": lambda w: w.unload(),
    "merged and unloaded": lambda w: w.merge_and_unload(),
}


@pytest.mark.parametrize("planned", [False, True], ids=["exact", "pruned"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_adapters_while_accelerated_is_noticed(change: str, planned: bool) -> None:
    settings = (PRUNED, plan()) if planned else ()
    wrapped = adapted(small_model())
    second(wrapped)
    other = copy.deepcopy(wrapped)
    with fx.accelerate(wrapped, *settings):
        before = outputs(wrapped.base_model.model)
        CHANGES[change](wrapped)
        got = outputs(wrapped.base_model.model)
    CHANGES[change](other)
    if planned:
        with fx.accelerate(other.base_model.model, *settings):
            expected = outputs(other.base_model.model)
    else:
        expected = outputs(other.base_model.model)
    assert close(got, expected)
    assert relative(got[0], before[0]) > 10 * LIMIT or "merged" in change


@pytest.mark.parametrize("planned", [False, True], ids=["exact", "pruned"])
def test_adapters_may_come_and_go(planned: bool) -> None:
    """Before them, neurons of a plan lie in its order; with them in the model's own."""
    settings = (PRUNED, plan()) if planned else ()
    model = small_model()
    with fx.accelerate(model, *settings) as handle:
        plain = outputs(model)
        wrapped = adapted(model)
        got = outputs(model)
        assert planned == any("it has LoRA adapters" in each for each in handle.summary().fallbacks)
        base = wrapped.unload()
        assert close(outputs(base), plain) and not handle.summary().fallbacks
    fresh = adapted(small_model())
    with fx.accelerate(fresh, *settings):
        assert close(outputs(fresh.base_model.model), got)


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj"], ["down_proj"], FFN], ids=str)
def test_pruned_neurons_are_those_of_the_adapter_too(targets: list[str]) -> None:
    wrapped, chosen = adapted(small_model(), targets), plan()
    model = wrapped.base_model.model
    cut = copy.deepcopy(model)
    for layer, layout in zip(cut.showo.model.layers, chosen.layouts(), strict=True):
        gone = torch.ones(64, dtype=torch.bool)
        gone[layout.kept("understanding")] = False
        down = layer.mlp.down_proj
        weights = [down.base_layer.weight, down.lora_A["default"].weight] if "down_proj" in targets else [down.weight]
        with torch.no_grad():
            for weight in weights:
                weight[:, gone] = 0
    tokens = torch.arange(11)[None]
    with fx.prune_ffn(model.showo, chosen, "understanding") as handle, torch.no_grad():
        assert handle.fallbacks == {}
        got = model.showo(tokens).logits
    with torch.no_grad():
        assert relative(got, cut.showo(tokens).logits) < LIMIT
        assert relative(got, model.showo(tokens).logits) > 10 * LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=lambda d: f"adapter {d}")
def test_a_layer_is_as_accurate_as_peft_and_knows_no_company(dtype: torch.dtype, of: torch.dtype) -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({name: nn.Linear(96, 48, bias=name == "a") for name in "ab"}).to(dtype)
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b"]), block).eval()
    fill(wrapped)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(of)
    kernels = resolve(fx.FlashUConfig.exact(), torch.device("cpu"), dtype).of("understanding", "prefill")
    layers = [Linear(wrapped[name], kernels, wrapped["a"].base_layer.weight) for name in "ab"]
    assert [layer.why_itself for layer in layers] == [None, None]
    x = torch.randn(7, 96).to(dtype)
    together = Linears(layers, kernels)
    with torch.no_grad():
        for layer, y in zip(layers, together(x), strict=True):
            wide = as_peft(copy.deepcopy(layer.module).double(), x.double())
            own = layer.module(x)
            assert own.dtype == y.dtype == dtype
            assert (y.double() - wide).norm() <= 2 * (own.double() - wide).norm() + 1e-6
            assert torch.equal(torch.cat([layer(row[None]) for row in x]), y)
            raised = layer(x, "gelu", residual=y)
            assert torch.equal(
                torch.cat([layer(x[i : i + 1], "gelu", residual=y[i : i + 1]) for i in range(7)]), raised
            )


def test_a_plan_of_the_base_fits_the_adapted_model() -> None:
    model = small_model()
    fingerprint = fx.planning.fingerprint.model_fingerprint
    before = fingerprint(model)
    wrapped = adapted(model)
    assert fingerprint(wrapped.base_model.model) == before
    wrapped.merge_adapter()
    assert fingerprint(wrapped.base_model.model) != before


def test_adapters_of_convolutions_run_as_themselves() -> None:
    wrapped = adapted(small_model(), ["proj"])
    model = wrapped.base_model.model
    expected = outputs(model)
    assert relative(expected[0], outputs(small_model())[0]) > 10 * LIMIT
    with fx.accelerate(wrapped) as handle:
        assert close(outputs(model), expected)
        assert any("proj is a peft.tuners.lora.layer.Conv2d" in each for each in handle.summary().fallbacks)


def test_adapters_of_parameters_are_refused_unless_merged() -> None:
    wrapped = adapted(small_model(), [], target_parameters=["mlp.up_proj.weight"])
    model = wrapped.base_model.model
    expected = outputs(model)
    with pytest.raises(TypeError, match=r"layers\.0\.mlp\.up_proj: its adapter is of peft's target_parameters"):
        fx.accelerate(wrapped)
    assert equal(outputs(model), expected)
    wrapped.merge_adapter()
    merged = outputs(model)
    with fx.accelerate(wrapped):
        assert close(outputs(model), merged)
