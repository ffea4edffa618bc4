"""Weights of an accelerated model that are saved, loaded, copied and edited: what comes is right, or a named error."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.conformance import relative
from support.living import (
    CALLS,
    LIMIT,
    NEW,
    PRUNED,
    STEPS,
    UP,
    State,
    accelerated,
    equal,
    halved,
    outputs,
    plan,
    pruned_outputs,
    same,
    state,
)
from support.models import generation_inputs, question_inputs, small_model
from torch import nn
from torch.nn.utils import prune

import flashu_ext as fx
from flashu_ext.models.accelerated import handle_of
from flashu_ext.runtime.order import EditedWeightsError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- in: loaded


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_pruned_as_a_fresh_model_would_be(assign: bool) -> None:
    model, handle, _ = accelerated()
    outputs(model)
    other = state(small_model(seed=1))
    expected = pruned_outputs(other)
    model.load_state_dict(copy.deepcopy(other), assign=assign)
    assert equal(outputs(model), expected)
    assert same(state(model), other)
    handle.remove()
    assert same(state(model), other)


@pytest.mark.parametrize("assign", [False, True])
def test_hooks_of_one_projection_that_load_and_save_get_its_own_order(assign: bool) -> None:
    model, handle, before = accelerated()
    generated = outputs(model)
    linear = model.get_submodule(UP.removesuffix(".weight"))
    assert torch.equal(linear.state_dict()["weight"], before[UP])
    seen: list[torch.Tensor] = []
    louder = torch.linspace(0.5, 2, before[UP].shape[0])[:, None]

    def loading(module: Any, values: State, prefix: str, *_: Any) -> None:
        seen.append(values[f"{prefix}weight"].clone())
        values[f"{prefix}weight"] = values[f"{prefix}weight"] * louder

    def saving(module: Any, values: State, prefix: str, *_: Any) -> None:
        seen.append(values[f"{prefix}weight"].clone())

    hooks = [linear.register_load_state_dict_pre_hook(loading), linear.register_state_dict_post_hook(saving)]
    model.load_state_dict(copy.deepcopy(before), assign=assign)
    changed = {**before, UP: before[UP] * louder}
    assert same(state(model), changed) and equal(outputs(model), pruned_outputs(changed))
    assert torch.equal(seen[0], before[UP]) and torch.equal(seen[1], changed[UP]) and len(seen) == 2
    for hook in hooks:
        hook.remove()
    linear.load_state_dict({"weight": before[UP].clone()}, assign=assign)
    assert equal(outputs(model), generated) and not linear._load_state_dict_pre_hooks
    handle.remove()
    assert same(state(model), before)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_of_one_ffn_leave_the_others(assign: bool) -> None:
    model, handle, before = accelerated()
    outputs(model)
    other = {UP: state(small_model(seed=1))[UP]}
    expected = pruned_outputs(before | other)
    model.load_state_dict(copy.deepcopy(other), strict=False, assign=assign)
    assert equal(outputs(model), expected)
    handle.remove()
    assert same(state(model), before | other)


def test_a_file_that_does_not_fit_is_an_error_and_changes_no_answer() -> None:
    model, handle, before = accelerated()
    generated = outputs(model)
    with pytest.raises(RuntimeError, match=f"size mismatch for {UP}"):
        model.load_state_dict({**before, UP: torch.zeros(3, 3)})
    assert equal(outputs(model), generated)
    handle.remove()
    assert same(state(model), before)


# ---- edited


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
def test_an_edit_in_plan_order_is_an_error_at_the_next_call(call: str) -> None:
    model, handle, before = accelerated()
    CALLS[call](model)
    weight, edited = model.get_parameter(UP), before[UP] * 2
    weight.copy_(edited)
    for _ in range(2):
        with pytest.raises(
            EditedWeightsError, match=r"FFN weights of 1 layers were written to .* `with handle\.editing\(\):`"
        ):
            CALLS[call](model)
    with handle.editing():
        weight.copy_(edited)
        with pytest.raises(RuntimeError, match=r"inside handle.editing\(\); leave it first"):
            CALLS[call](model)
    expected = pruned_outputs(before | {UP: edited})
    assert equal(outputs(model), expected)
    handle.remove()
    assert same(state(model), before | {UP: edited})


@torch.no_grad()
@pytest.mark.parametrize("change", [1.0, 0.001])
def test_a_replaced_parameter_is_an_edit_too(change: float) -> None:
    """Also where it differs so little that its memory could merely have been moved to another dtype."""
    model, handle, before = accelerated()
    noise = torch.randn(before[UP].shape, generator=torch.Generator().manual_seed(0))
    linear = model.showo.model.layers[2].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight * (1 + change * noise))
    with pytest.raises(EditedWeightsError):
        CALLS["sample"](model)
    with pytest.raises(EditedWeightsError):
        CALLS["answer_tokens"](model)
    handle.remove()
    after = state(model)
    assert not handle.active and all(torch.equal(after[name], before[name]) for name in before if name != UP)


@torch.no_grad()
def test_removing_tells_of_an_edit_that_no_call_has_told_of() -> None:
    model, handle, _ = accelerated()
    model.get_parameter(UP).mul_(2)
    with pytest.raises(EditedWeightsError):
        handle.remove()
    assert handle_of(model) is None and not handle.active
    handle.remove()


@torch.no_grad()
def test_editing_shows_the_models_own_order_and_ends_with_an_error_too() -> None:
    model, handle, before = accelerated()
    with pytest.raises(KeyError, match="half way"), handle.editing() as inside:
        assert inside is model and all(torch.equal(model.get_parameter(name), before[name]) for name in (UP,))
        model.get_parameter(UP).add_(1)
        raise KeyError("half way")
    assert equal(outputs(model), pruned_outputs(before | {UP: before[UP] + 1}))
    handle.remove()
    with pytest.raises(RuntimeError, match="no longer accelerated"), handle.editing():
        pass


def loaded(model: Any, name: str) -> None:
    model.load_state_dict({name: model.state_dict()[name] * 0.5}, strict=False)


def replaced(model: Any, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(model.get_parameter(name) * 0.5))


@torch.no_grad()
@pytest.mark.parametrize("change", [halved, loaded, replaced])
@pytest.mark.parametrize("name", ["showo.model.layers.7.self_attn.v_proj.weight", UP, "fusion_proj.0.weight"])
def test_images_and_answers_follow_weights(name: str, change: Callable[[Any, str], None]) -> None:
    """A question asked before is prefilled again: the stored keys and values belong to the old weights."""
    model, dense = small_model(), small_model()
    halved(dense, name)
    expected = [outputs(small_model()), outputs(dense)]
    with fx.accelerate(model, fx.FlashUConfig.exact()) as handle:
        first = outputs(model)
        change(model, name)
        reused = handle.summary().tokens["reused"]
        second = outputs(model)
        assert handle.summary().tokens["reused"] == reused == 0
        again = outputs(model)
        assert handle.summary().tokens["reused"] > 0
    for (latents, tokens), (generated, answered) in zip((first, second, again), (*expected, expected[1]), strict=True):
        assert relative(latents, generated) < LIMIT and torch.equal(tokens, answered)
    assert relative(expected[1][0], expected[0][0]) > 10 * LIMIT, "the edit must change the outputs"


"""Path of the hooked module -> path of the one that runs as itself, and why."""


def test_layers_that_come_to_share_their_ffn_read_its_neurons_where_they_are():
    model, other = small_model(), small_model()
    with fx.accelerate(model, PRUNED, plan()) as handle:
        outputs(model)
        for each in (model, other):
            layers = each.showo.model.layers
            layers[1].mlp = layers[0].mlp
        with fx.accelerate(other, PRUNED, plan()):
            assert equal(outputs(model), outputs(other))
        assert sum("shared" in reason for reason in handle.summary().fallbacks) == 2
    weights = small_model().state_dict()
    assert torch.equal(model.state_dict()[UP], weights[UP])
    name = "showo.model.layers.{}.mlp.gate_proj.weight"
    assert torch.equal(model.state_dict()[name.format(1)], weights[name.format(0)])


def test_an_ffn_of_another_size_uses_all_its_neurons():
    model = small_model()
    with fx.accelerate(model, PRUNED, plan()) as handle:
        outputs(model)
        ffn = model.showo.model.layers[2].mlp
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = nn.Linear(32, 48, bias=False) if dim == 0 else nn.Linear(48, 32, bias=False)
            setattr(ffn, name, linear)
        assert outputs(model)[0].isfinite().all()
        assert any("48 neurons, the plan 64" in reason for reason in handle.summary().fallbacks)


def test_layers_taken_away_are_noticed():
    model = small_model()
    with fx.accelerate(model, PRUNED, plan()):
        outputs(model)
        layers = model.showo.model.layers
        model.showo.model.layers = nn.ModuleList(layers[:-1])
        with pytest.raises(TypeError, match="its config says 8 layers, and it has 7"):
            outputs(model)
        model.showo.config.num_hidden_layers = 7
        with pytest.raises(RuntimeError, match="made for 8 layers, the model has 7 now"):
            outputs(model)
        model.showo.model.layers, model.showo.config.num_hidden_layers = layers, 8
        outputs(model)


def test_any_attribute_may_be_on_a_copied_model():
    model = small_model()
    model.numbers = model.showo.model.layers[0].mlp.gate_proj.numbers = np.arange(3)
    with fx.accelerate(model, PRUNED, plan()):
        copied = copy.deepcopy(model)
    assert copied.numbers.tolist() == copied.showo.model.layers[0].mlp.gate_proj.numbers.tolist() == [0, 1, 2]


def test_an_edit_is_told_even_after_a_refused_call():
    model = small_model()
    with pytest.raises(EditedWeightsError), fx.accelerate(model, PRUNED, plan()) as handle:
        hook = model.showo.model.layers[0].register_forward_hook(lambda _m, _i, output: output)
        with pytest.raises(TypeError, match="forward hook"):
            outputs(model)
        with torch.no_grad():
            model.get_parameter(UP).mul_(2)
        hook.remove()
        try:
            outputs(model)
        finally:
            handle.remove()


def test_a_projection_pruned_in_plan_order_is_not_saved_but_restored():
    model = small_model()
    weights = state(model)
    handle = fx.accelerate(model, PRUNED, plan())
    linear = model.showo.model.layers[2].mlp.up_proj
    prune.custom_from_mask(linear, "weight", torch.ones_like(linear.weight))
    for each in (outputs, copy.deepcopy, lambda model: model.state_dict()):
        with pytest.raises(EditedWeightsError, match=r"handle\.editing\(\)"):
            each(model)
    handle.remove()
    assert torch.equal(model.state_dict()[UP + "_orig"], weights[UP])
    prune.remove(linear, "weight")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_edit_is_told_each_time():
    """The error that was told and mended does not hide a later one."""
    model, handle, _ = accelerated()
    for _ in range(2):
        with torch.no_grad():
            model.get_parameter(UP).mul_(2)
        with pytest.raises(EditedWeightsError):
            outputs(model)
        with handle.editing():
            pass
        outputs(model)
    with torch.no_grad():
        model.get_parameter(UP).mul_(2)
    with pytest.raises(EditedWeightsError):
        handle.remove()
    assert not handle.active


def test_memory_in_another_plans_order_is_refused():
    model, _, before = accelerated()
    other = small_model(1)
    other.load_state_dict({name: value.detach() for name, value in model.named_parameters()}, assign=True, strict=False)
    with pytest.raises(RuntimeError, match="memory of another model that is accelerated with a plan"):
        fx.accelerate(other, PRUNED, plan())
    assert handle_of(other) is None
    handle_of(model).remove()
    with fx.accelerate(other, PRUNED, plan()) as handle:
        assert any("share memory" in reason for reason in handle.summary().fallbacks)
    assert same(state(model), before)


def test_an_optimizer_copied_with_its_model_trains_the_copy():
    model, _, before = accelerated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for pair in ((model, optimizer), (optimizer, model)):
        copies = copy.deepcopy(pair)
        copied = next(each for each in copies if isinstance(each, nn.Module))
        held = next(each for each in copies if not isinstance(each, nn.Module))
        own = {id(parameter) for parameter in copied.parameters()}
        assert {id(p) for group in held.param_groups for p in group["params"]} == own
        assert same(state(copied), before)


def test_a_state_dict_taken_while_editing_stays_as_it_is():
    model, handle, before = accelerated()
    with handle.editing():
        kept = model.state_dict()
    assert same(dict(kept), before)
    assert any("share memory" in reason for reason in handle.summary().fallbacks)
    del kept
    with handle.editing():
        pass
    assert not any("share memory" in reason for reason in handle.summary().fallbacks)


def test_a_model_synchronised_through_data_uses_nothing_from_before():
    model, other = small_model(), small_model(1)
    fx.accelerate(model)
    outputs(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    fx.accelerate(other)
    assert equal(outputs(model), outputs(other))


@pytest.mark.parametrize("call", CALLS)
def test_ffns_merged_through_data_are_an_error_at_every_call(call: str) -> None:
    model, handle, _ = accelerated()
    CALLS[call](model)
    for layer in model.showo.model.layers:
        layer.mlp.down_proj.weight.data += 0.01
    for _ in range(3):
        with pytest.raises(EditedWeightsError, match=r"editing\(\)"):
            CALLS[call](model)
    handle.remove()


def write_items(model: Any) -> None:
    for value in model.state_dict().values():
        value.mul_(0.5)


def write_kept(model: Any) -> None:
    kept = model.state_dict()
    kept[UP].view(-1)[:3].zero_()
    kept[UP] = kept[UP].clone()  # the one that was written to is gone


@pytest.mark.parametrize("write", [write_items, write_kept])
def test_writes_to_what_state_dict_gave_are_not_lost_silently(write: Callable[[Any], None]) -> None:
    model, handle, before = accelerated()
    outputs(model)
    write(model)
    for _ in range(2):
        with pytest.raises(EditedWeightsError, match="state_dict"):
            outputs(model)
    model.load_state_dict(before)
    assert equal(outputs(model), pruned_outputs(before))
    handle.remove()


def test_a_state_dict_edited_and_loaded_is_right():
    model, handle, _ = accelerated()
    edited = model.state_dict()
    edited[UP] += 0.01
    model.load_state_dict(edited)
    assert equal(outputs(model), pruned_outputs(state(model)))
    handle.remove()


def test_one_matrix_edited_through_data_is_told_of():
    model, handle, _ = accelerated()
    answer = CALLS["answer_tokens"]
    answer(model)
    model.showo.model.layers[7].mlp.down_proj.weight.data += 0.01
    with pytest.raises(EditedWeightsError):
        answer(model)
    handle.remove()


def ffn_parameters(model: Any) -> list[nn.Parameter]:
    return [weight for layer in model.showo.model.layers for weight in layer.mlp.parameters()]


def test_a_step_of_a_fused_optimizer_is_an_edit():
    """It writes without a new version."""
    model, handle, _ = accelerated()
    outputs(model)
    weights = [weight.requires_grad_() for weight in ffn_parameters(model)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=0.01, fused=True).step()
    for _ in range(2):
        with pytest.raises(EditedWeightsError):
            outputs(model)
    handle.remove()


def test_a_fused_step_on_one_weight_drops_what_was_computed_from_it():
    model, twin = small_model(), small_model()
    for each in (model, twin):
        if each is model:
            fx.accelerate(model)
            outputs(model)
        weight = each.fusion_proj[-1].weight.requires_grad_()
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.05, fused=True).step()
        weight.requires_grad_(False).grad = None
    fx.accelerate(twin)
    assert equal(outputs(model), outputs(twin))


def test_weights_written_by_another_thread_end_the_image(monkeypatch):
    model = small_model()
    weight = model.showo.model.layers[5].self_attn.q_proj.weight
    with fx.accelerate(model) as handle:
        step = handle.runner.generation.step

        def meanwhile(state: Any) -> None:
            step(state)
            with torch.no_grad():
                weight.mul_(1.01)

        monkeypatch.setattr(handle.runner.generation, "step", meanwhile)
        with pytest.raises(RuntimeError, match="changed while this image was being generated"):
            outputs(model)
        decode = handle.runner.understanding.decode

        def answered_meanwhile(*arguments: Any) -> Any:
            answers = decode(*arguments)
            with torch.no_grad():
                weight.mul_(1.01)
            return answers

        monkeypatch.setattr(handle.runner.understanding, "decode", answered_meanwhile)
        with pytest.raises(RuntimeError, match="changed while this question was being answered"):
            CALLS["answer_tokens"](model)


def test_loading_a_models_own_parameters_changes_nothing():
    model, handle, before = accelerated()
    expected = outputs(model)
    model.load_state_dict(dict(model.named_parameters()), strict=False)
    assert equal(outputs(model), expected) and same(state(model), before)
    handle.remove()
    assert same(state(model), before)


def test_views_of_one_tensor_stay_where_they_are():
    """They have one version together."""
    model, fresh = small_model(), small_model()
    for each in (model, fresh):
        weights = [layer.mlp.up_proj.weight for layer in each.showo.model.layers]
        flat = torch.cat([weight.detach().flatten() for weight in weights])
        for layer, values in zip(each.showo.model.layers, flat.split(weights[0].numel()), strict=True):
            layer.mlp.up_proj.weight = nn.Parameter(values.view_as(weights[0]), requires_grad=False)
    expected = pruned_outputs(state(fresh))
    with fx.accelerate(model, PRUNED, plan()) as handle:
        assert all(torch.allclose(a, b, atol=LIMIT) for a, b in zip(outputs(model), expected, strict=True))
        assert any("views of one tensor" in reason for reason in handle.summary().fallbacks)


def test_memory_that_cannot_be_written_to_is_left_alone(tmp_path):
    model = small_model()
    linear = model.showo.model.layers[3].mlp.down_proj
    linear.weight.detach().numpy().tofile(tmp_path / "weight")
    mapped = np.memmap(tmp_path / "weight", np.float32, "r", shape=tuple(linear.weight.shape))
    expected = pruned_outputs(state(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of such memory
        linear.weight = nn.Parameter(torch.from_numpy(mapped), requires_grad=False)
    with fx.accelerate(model, PRUNED, plan()) as handle:
        assert all(torch.allclose(a, b, atol=LIMIT) for a, b in zip(outputs(model), expected, strict=True))
        assert any("cannot be written to" in reason for reason in handle.summary().fallbacks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_shared_memory_in_its_order():
    model, handle, before = accelerated()
    model.share_memory()
    expected = outputs(model)
    child = os.fork()
    if child == 0:
        try:
            handle.remove()
            os._exit(1)
        except RuntimeError:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(outputs(model), expected)
    handle.remove()
    assert same(state(model), before)


@pytest.mark.parametrize("name", ["showo.model.layers.5.self_attn.q_proj.weight", "fusion_proj.1.weight"])
def test_a_matrix_written_to_through_data_is_noticed(name):
    """As by adapters that are merged, and by some optimizers."""
    model, twin = small_model(), small_model()
    fx.accelerate(model)
    outputs(model)
    for each in (model, twin):
        each.get_parameter(name).data.mul_(1.5)
    fx.accelerate(twin)
    assert equal(outputs(model), outputs(twin))


@pytest.mark.parametrize("change", [lambda w: w.mul_(2), lambda w: w.data.mul_(2)])
def test_a_model_changed_by_a_callback_ends_the_answer_and_the_image(change):
    model = small_model()
    weight = model.showo.model.layers[5].self_attn.q_proj.weight
    with fx.accelerate(model):
        with pytest.raises(RuntimeError, match="changed while this question was being answered"):
            fx.showo2.answer_tokens(
                model, **question_inputs(), max_new_tokens=NEW, on_token=lambda _, token: change(weight)
            )
        with pytest.raises(RuntimeError, match="changed while this image was being generated"):
            fx.showo2.sample(
                model, **generation_inputs(model), steps=STEPS, callback=lambda step, latents: change(weight)
            )
        after = outputs(model)
    with fx.accelerate(model):
        assert equal(after, outputs(model))
