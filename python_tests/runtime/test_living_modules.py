"""Modules that are hooked, adapted or replaced before or while a model is accelerated: what comes is right, or a named error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conformance import relative
from support.living import CALLS, LIMIT, NEW, PRUNED, UP, accelerated, equal, outputs, plan, pruned_outputs, same, state
from support.models import question_inputs, small_model
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.models.accelerated import handle_of

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKED = {
    "showo.model.layers.2.mlp": ("showo.model.layers.2.mlp", "has a forward hook"),
    "showo.model.layers.2.mlp.gate_proj": ("showo.model.layers.2.mlp", "gate_proj has a forward hook"),
    "showo.model.layers.3.input_layernorm": ("showo.model.layers.3.input_layernorm", "has a forward hook"),
    "showo.model.layers.4.post_attention_layernorm": (
        "showo.model.layers.4.post_attention_layernorm", "has a forward hook",
    ),
    "showo.model.norm": ("showo.model.norm", "has a forward hook"),
    "diffusion_head_a.1.mlp.down_proj": ("diffusion_head_a.1.mlp", "down_proj has a forward hook"),
    "diffusion_head_a.0.input_layernorm": ("diffusion_head_a.0.input_layernorm", "has a forward hook"),
    "diffusion_head_b.norm_final": ("diffusion_head_b.norm_final", "has a forward hook"),
}  # fmt: skip


class Doubled(nn.Linear):
    """A projection that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Other(fx.showo2.Showo2):
    """A subclass that generates images in another way."""

    def t2i_generate(self, *arguments: Any, **options: Any) -> Tensor:
        return super().t2i_generate(*arguments, **options) * 0


def changed(module: Any, arguments: Any, result: Tensor) -> Tensor:
    return result * 1.5


@pytest.mark.parametrize("when", ["before", "while accelerated"])
@pytest.mark.parametrize("path", HOOKED)
def test_a_hooked_module_runs_as_itself_and_is_named(path: str, when: str) -> None:
    model, dense = small_model(), small_model()
    plain = outputs(dense)
    dense.get_submodule(path).register_forward_hook(changed)
    expected = outputs(dense)
    hook = model.get_submodule(path).register_forward_hook(changed) if when == "before" else None
    itself, why = HOOKED[path]
    with fx.accelerate(model, fx.FlashUConfig.exact()) as handle:
        if hook is None:
            assert relative(outputs(model)[0], plain[0]) < LIMIT
            hook = model.get_submodule(path).register_forward_hook(changed)
        got = outputs(model)
        assert relative(got[0], expected[0]) < LIMIT and torch.equal(got[1], expected[1])
        assert handle.summary().fallbacks == {f"model.{itself}: {why}": 1}
        hook.remove()
        got = outputs(model)
        assert relative(got[0], plain[0]) < LIMIT and torch.equal(got[1], plain[1])
        assert not handle.summary().fallbacks
    assert relative(expected[0], plain[0]) > 10 * LIMIT, "the hook must change the outputs"


def test_a_hooked_ffn_of_a_plan_gets_its_own_order_back_and_uses_all_neurons() -> None:
    model, handle, before = accelerated()
    seen: list[Tensor] = []
    outputs(model)
    hook = model.showo.model.layers[2].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    outputs(model)
    assert seen and torch.equal(model.get_parameter(UP), before[UP])
    assert handle.summary().fallbacks == {"model.showo.model.layers.2.mlp: has a forward pre-hook": 1}
    hook.remove()
    assert equal(outputs(model), pruned_outputs(before)) and not torch.equal(model.get_parameter(UP), before[UP])
    handle.remove()
    assert same(state(model), before)


@torch.no_grad()
def with_a_bias(model: Any) -> str:
    linear = model.showo.model.layers[1].mlp.gate_proj
    linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))
    return "gate_proj has a bias"


def with_another_activation(model: Any) -> str:
    model.showo.model.layers[1].mlp.act_fn = nn.GELU()
    return "act_fn is a torch.nn.modules.activation.GELU"


def with_another_class(model: Any) -> str:
    model.showo.model.layers[1].mlp.up_proj.__class__ = Doubled
    return f"up_proj is a {__name__}.Doubled"


@pytest.mark.parametrize("prepare", [with_a_bias, with_another_activation, with_another_class])
def test_an_ffn_that_the_kernel_does_not_compute_runs_as_itself(prepare: Callable[[Any], str]) -> None:
    model, dense = small_model(), small_model()
    plain = outputs(dense)
    why = prepare(dense)
    expected = outputs(dense)
    prepare(model)
    with fx.accelerate(model, fx.FlashUConfig.exact()) as handle:
        got = outputs(model)
        assert handle.summary().fallbacks == {f"model.showo.model.layers.1.mlp: {why}": 1}
    assert relative(got[0], expected[0]) < LIMIT and torch.equal(got[1], expected[1])
    assert relative(expected[0], plain[0]) > 10 * LIMIT


# ---- modules that cannot be accelerated


def hooked_layer(model: Any) -> None:
    model.showo.model.layers[3].register_forward_hook(changed)


def hooked_attention(model: Any) -> None:
    model.diffusion_head_a[1].self_attn.register_forward_pre_hook(lambda module, inputs: None)


def hooked_stack(model: Any) -> None:
    model.showo.model.register_forward_hook(lambda module, arguments, result: None)


def another_forward(model: Any) -> None:
    block = model.diffusion_head_a[0]
    block.forward = lambda *arguments, **options: type(block).forward(block, *arguments, **options)


def subclass(model: Any) -> None:
    model.__class__ = Other


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "hooked layer": (hooked_layer, r"model.showo.model.layers.3: has a forward hook"),
    "hooked attention": (hooked_attention, r"model.diffusion_head_a.1.self_attn: has a forward pre-hook"),
    "hooked stack": (hooked_stack, r"model.showo.model: has a forward hook"),
    "another forward": (another_forward, r"model.diffusion_head_a.0: its forward is replaced"),
    "subclass": (subclass, rf"model: is a {__name__}.Other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_loop_would_pass_over_is_refused_by_name(case: str) -> None:
    model = small_model()
    prepare, message = REFUSED[case]
    prepare(model)
    before, modules, attributes = state(model), dict(model.named_modules()), dict(vars(model))
    expected = outputs(model)
    with pytest.raises(TypeError, match=message):
        fx.accelerate(model, PRUNED, plan())
    assert same(state(model), before) and handle_of(model) is None
    assert dict(model.named_modules()) == modules and vars(model) == attributes
    assert equal(outputs(model), expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", [case for case in REFUSED if case != "another forward"])
def test_what_comes_while_accelerated_is_refused_at_the_next_call(case: str, call: str) -> None:
    model, handle, before = accelerated()
    CALLS[call](model)
    prepare, message = REFUSED[case]
    prepare(model)
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            CALLS[call](model)
    handle.remove()
    assert same(state(model), before) and handle_of(model) is None


def test_nothing_is_used_again_that_a_hook_may_have_changed():
    """A hook's own state is nobody's weight: the second answer must not reuse what the first one's hook computed."""
    model, dense = small_model(), small_model()
    factor = [1.0]
    for each in (model, dense):
        for path in ("und_trans.layers.0.mlp", "showo.model.layers.1.self_attn.v_proj"):
            each.get_submodule(path).register_forward_hook(lambda _m, _i, output: output * factor[0])
    with fx.accelerate(model):
        for factor[0] in (1.0, -3.0):
            ask = question_inputs()
            expected = fx.showo2.answer_tokens(dense, **ask, max_new_tokens=NEW)
            assert torch.equal(fx.showo2.answer_tokens(model, **ask, max_new_tokens=NEW), expected)


def test_an_epsilon_is_followed_too():
    model, dense = small_model(), small_model()
    with fx.accelerate(model):
        outputs(model)
        for each in (model, dense):
            for layer in each.showo.model.layers:
                layer.input_layernorm.variance_epsilon = 30.0
        assert relative(outputs(model)[0], outputs(dense)[0]) < LIMIT and torch.equal(
            outputs(model)[1], outputs(dense)[1]
        )


@pytest.mark.parametrize("name", ["velocity", "backbone", "embed_sequence", "forward"])
@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("late", [False, True])
def test_a_method_of_the_model_that_is_replaced_is_refused(name, where, late, monkeypatch):
    model = small_model()
    owner = model if where == "instance" else type(model)
    original = getattr(owner, name)

    def louder(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords)

    if late:
        with fx.accelerate(model):
            outputs(model)
            monkeypatch.setattr(owner, name, louder)
            with pytest.raises(TypeError, match=f"{name} is replaced"):
                outputs(model)
    else:
        monkeypatch.setattr(owner, name, louder)
        with pytest.raises(TypeError, match=f"{name} is replaced"):
            fx.accelerate(model)
    assert handle_of(model) is None


def test_attention_that_another_library_replaces_is_called(monkeypatch):
    model = small_model()
    real = nn.functional.scaled_dot_product_attention
    with fx.accelerate(model):
        before = outputs(model)[0]
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *a, **k: real(*a, **k) * 0.5)
        assert relative(outputs(model)[0], before) > LIMIT


def test_what_one_pass_cannot_compute_is_refused():
    def other_epsilon(model: Any) -> None:
        model.diffusion_head_a[0].self_attn.k_norm.variance_epsilon = 0.5

    def other_frequencies(model: Any) -> None:
        model.diffusion_head_a[1].self_attn.rotary_emb.inv_freq.mul_(2)

    def other_attention(model: Any) -> None:
        model.showo.config._attn_implementation = "paged|somebody's"

    for change, message in (
        (other_epsilon, "different epsilons"),
        (other_frequencies, "frequencies are not those"),
        (other_attention, "its attention function is"),
    ):
        model = small_model()
        change(model)
        with pytest.raises(TypeError, match=message):
            fx.accelerate(model)
        model = small_model()
        with fx.accelerate(model):
            outputs(model)
            change(model)
            with pytest.raises(TypeError, match=message):
                outputs(model)


def test_weights_that_are_not_contiguous_and_compiled_parts_run_as_themselves():
    model, dense = small_model(), small_model()
    for each in (model, dense):
        up = each.showo.model.layers[2].mlp.up_proj
        up.weight = nn.Parameter(up.weight.detach().t().contiguous().t())
        each.und_trans = torch.compile(each.und_trans, backend="eager")
    with fx.accelerate(model) as handle:
        assert relative(outputs(model)[0], outputs(dense)[0]) < LIMIT
        assert any("not contiguous" in reason for reason in handle.summary().fallbacks)


@pytest.mark.parametrize("late", [False, True])
def test_a_replaced_function_that_attention_calls_is_refused(monkeypatch, late):
    from transformers.models.qwen2 import modeling_qwen2

    def unrotated(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q, k

    model = small_model()
    if not late:
        monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", unrotated)
        with pytest.raises(TypeError, match="self_attn: its class's forward"):
            fx.accelerate(model)
        return
    with fx.accelerate(model):
        outputs(model)
        monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", unrotated)
        with pytest.raises(TypeError, match="self_attn: its class's forward"):
            outputs(model)


def hook_on_model(model: Any) -> None:
    model.register_forward_hook(lambda module, inputs, output: None)


def fewer_layers(model: Any) -> None:
    model.showo.config.num_hidden_layers = 2


def long_rope(model: Any) -> None:
    model.showo.model.rotary_emb.rope_type = "longrope"


@pytest.mark.parametrize(
    "change, message",
    [
        (hook_on_model, "model: has a forward hook"),
        (fewer_layers, "its config says 2 layers, and it has 8"),
        (long_rope, "type 'longrope', which depends on the length"),
    ],
)
def test_what_changes_the_whole_model_is_refused(change, message):
    model = small_model()
    with fx.accelerate(model):
        outputs(model)
        change(model)
        with pytest.raises(TypeError, match=message):
            outputs(model)
    assert handle_of(model) is None
    with pytest.raises(TypeError, match=message):
        fx.accelerate(model)
