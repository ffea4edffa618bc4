"""An accelerated model that is saved, loaded, copied, edited or hooked gives right results or a named error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.conformance import relative
from support.models import generation_inputs, question_inputs, small_model
from torch import Tensor, nn
from torch.nn.utils import prune

import flashu_ext as fx
from flashu_ext.models.accelerated import handle_of
from flashu_ext.runtime.order import EditedWeightsError

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 1e-4
STEPS, NEW = 4, 6
PRUNED = fx.FlashUConfig(steps=STEPS, ffn_prune_ratio=0.25, prune_multiple=16)
UP = "showo.model.layers.2.mlp.up_proj.weight"

State = dict[str, Tensor]


def plan() -> fx.TaskPlan:
    generator = torch.Generator().manual_seed(0)
    scores = {task: [torch.rand(64, generator=generator) for _ in range(8)] for task in ("generation", "understanding")}
    return fx.TaskPlan.from_scores(**scores, ratio=0.25, multiple=16)


def state(model: Any) -> State:
    """Copies, so that no other tensor shares the weights' memory."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """An image and an answer."""
    latents = fx.showo2.sample(model, **generation_inputs(model), steps=STEPS)
    return latents, fx.showo2.answer_tokens(model, **question_inputs(), max_new_tokens=NEW)


def pruned_outputs(weights: State) -> tuple[Tensor, Tensor]:
    """Outputs of a model that got these weights before it was accelerated."""
    model = small_model()
    model.load_state_dict(weights)
    with fx.accelerate(model, PRUNED, plan()):
        return outputs(model)


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def accelerated(seed: int = 0) -> tuple[Any, fx.Handle, State]:
    """A model with neurons in plan order, its handle, and its weights in the original order."""
    model = small_model(seed)
    before = state(model)
    handle = fx.accelerate(model, PRUNED, plan())
    assert not torch.equal(model.get_parameter(UP), before[UP]), "the plan is active"
    return model, handle, before


# ---- out: saved, copied and pickled


def saved(model: Any) -> State:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()))


def pickled(model: Any) -> State:
    return state(pickle.loads(pickle.dumps(model)))


def part_copied(model: Any) -> State:
    ffn = copy.deepcopy(model.showo.model.layers[2].mlp)
    return {**state(model), UP: ffn.up_proj.weight.detach()}


OUT: dict[str, Callable[[Any], State]] = {
    "state_dict": state,
    "torch.save": saved,
    "deepcopy": lambda model: state(copy.deepcopy(model)),
    "deepcopy of an FFN": part_copied,
    "pickle": pickled,
}


@pytest.mark.parametrize("way", OUT)
def test_what_leaves_the_model_is_in_its_own_order(way: str) -> None:
    model, handle, before = accelerated()
    generated = outputs(model)
    assert same(OUT[way](model), before)
    assert equal(outputs(model), generated)
    handle.remove()
    assert same(state(model), before)


def test_files_of_an_accelerated_model_are_those_of_the_dense_one(tmp_path: Any) -> None:
    model, _, before = accelerated()
    model.save_pretrained(tmp_path)
    assert same(state(fx.showo2.Showo2.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_dense_and_on_its_own(copied: Callable[[Any], Any]) -> None:
    model, _, before = accelerated()
    generated = outputs(model)
    clone = copied(model)
    assert handle_of(clone) is None and "t2i_generate" not in vars(clone)
    assert equal(outputs(clone), outputs(small_model()))
    with fx.accelerate(clone, PRUNED, plan()):
        assert equal(outputs(clone), generated)
    with torch.no_grad():
        clone.get_parameter(UP).zero_()
    assert equal(outputs(model), generated) and same(state(model), before)


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


CALLS: dict[str, Callable[[Any], Any]] = {
    "sample": lambda model: fx.showo2.sample(model, **generation_inputs(model), steps=STEPS),
    "answer_tokens": lambda model: fx.showo2.answer_tokens(model, **question_inputs(), max_new_tokens=NEW),
    "t2i_generate": lambda model: model.t2i_generate(
        image_latents=generation_inputs(model)["noise"],
        t=torch.full((2,), 0.1),
        text_tokens=generation_inputs(model)["text_tokens"],
        modality_positions=generation_inputs(model)["modality_positions"],
    ),
}


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


def halved(model: Any, name: str) -> None:
    model.get_parameter(name).mul_(0.5)


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


@torch.no_grad()
def test_an_image_in_progress_ends_where_weights_change() -> None:
    model = small_model()

    def edit(step: int, latents: Tensor) -> None:
        if step == 2:
            halved(model, UP)
            CALLS["answer_tokens"](model)

    with fx.accelerate(model, fx.FlashUConfig.exact()):
        with pytest.raises(RuntimeError, match="while this image was being generated"):
            fx.showo2.sample(model, **generation_inputs(model), steps=STEPS, callback=edit)
        assert relative(outputs(model)[0], outputs(copy.deepcopy(model))[0]) < LIMIT


# ---- modules that run as themselves

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
"""Path of the hooked module -> path of the one that runs as itself, and why."""


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


class Doubled(nn.Linear):
    """A projection that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


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


class Other(fx.showo2.Showo2):
    """A subclass that generates images in another way."""

    def t2i_generate(self, *arguments: Any, **options: Any) -> Tensor:
        return super().t2i_generate(*arguments, **options) * 0


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


def test_images_of_one_batch_have_guidance_scales_of_their_own():
    model = small_model()
    inputs = generation_inputs(model, images=2) | {"steps": 5}
    scales = (2.0, 5.0)
    alone = [fx.showo2.sample(model, **inputs | {"guidance_scale": scale})[i] for i, scale in enumerate(scales)]
    assert torch.equal(fx.showo2.sample(model, **inputs | {"guidance_scale": scales}), torch.stack(alone))
    with fx.accelerate(model):
        together = fx.showo2.sample(model, **inputs | {"guidance_scale": torch.tensor(scales)})
        assert relative(together, torch.stack(alone)) < 1e-5
        for wrong in ([2.0], [0.0, 2.0], [float("nan"), 2.0], "high"):
            with pytest.raises(ValueError, match="guidance_scale: expected"):
                fx.showo2.sample(model, **inputs | {"guidance_scale": wrong})
    with fx.accelerate(model, fx.FlashUConfig(steps=5, head_cache_interval=2)):
        with pytest.raises(ValueError, match="steps: expected None or 5"):
            fx.showo2.sample(model, **inputs | {"guidance_scale": scales, "steps": 6})
        assert fx.showo2.sample(model, **inputs | {"guidance_scale": scales}).isfinite().all()


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
        with pytest.raises(RuntimeError, match="made for 8 layers, the model has 7 now"):
            outputs(model)
        model.showo.model.layers = layers
        outputs(model)


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


def test_any_attribute_may_be_on_a_copied_model():
    model = small_model()
    model.numbers = model.showo.model.layers[0].mlp.gate_proj.numbers = np.arange(3)
    with fx.accelerate(model, PRUNED, plan()):
        copied = copy.deepcopy(model)
    assert copied.numbers.tolist() == copied.showo.model.layers[0].mlp.gate_proj.numbers.tolist() == [0, 1, 2]


def test_a_model_that_a_callback_changes_ends_its_image():
    model = small_model()

    def change(step: int, _latents: Tensor) -> None:
        if step == 2:
            with torch.no_grad():
                model.showo.model.norm.weight.mul_(2)

    with fx.accelerate(model):
        with pytest.raises(RuntimeError, match="changed while this image"):
            fx.showo2.sample(model, **generation_inputs(model), steps=5, callback=change)
        assert outputs(model)[0].isfinite().all()


def calls(model: Any, changes: Callable[[int], dict[str, Any]], times: list[float]) -> None:
    """Upstream's loop over times, with other arguments at some calls."""
    i = generation_inputs(model, images=1)
    given = {
        "image_latents": i["noise"].repeat(2, 1, 1, 1),
        "text_tokens": torch.cat([i["text_tokens"], i["text_tokens_null"]]),
        "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
        "guidance_scale": 3.0,
    }
    for index, time in enumerate(times):
        call = given | changes(index)
        model.t2i_generate(t=torch.full((call["image_latents"].shape[0],), time), **call)


@pytest.mark.parametrize(
    ("times", "changes"),
    [
        ([1.0, 0.7, 0.4], lambda index: {}),
        ([0.0, 0.3, 0.6], lambda index: {"guidance_scale": 0.0} if index == 2 else {}),
        (
            [0.0, 0.3, 0.6],
            lambda index: (
                {name: value[:1] for name, value in rows().items()} | {"guidance_scale": 0.0} if index == 2 else {}
            ),
        ),
    ],
    ids=["time goes back", "guidance ends", "rows end"],
)
def test_a_schedule_that_would_begin_anew_in_the_middle_is_refused(times, changes):
    model = small_model()
    with fx.accelerate(model, fx.FlashUConfig(steps=5, head_cache_interval=2)):
        with pytest.raises(RuntimeError, match="cannot continue its image"):
            calls(model, changes, times)
        calls(model, lambda index: {}, [0.0, 0.3])


def rows() -> dict[str, Tensor]:
    i = generation_inputs(small_model(), images=1)
    return {
        "image_latents": i["noise"],
        "text_tokens": i["text_tokens"],
        "modality_positions": i["modality_positions"],
    }


def test_a_soft_mask_runs_the_models_own_method():
    model, dense = small_model(), small_model()
    i = generation_inputs(model, images=1)
    mask = model.omni_mask(i["modality_positions"], i["text_tokens"].shape[1])
    call = {"image_latents": i["noise"], "t": torch.zeros(1), "text_tokens": i["text_tokens"],
            "modality_positions": i["modality_positions"], "attention_mask": mask.clamp_min(-1.0)}  # fmt: skip
    with fx.accelerate(model) as handle:
        assert relative(model.t2i_generate(**call), dense.t2i_generate(**call)) < LIMIT
        assert any("mask" in reason for reason in handle.summary().fallbacks)


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


def test_a_pruned_projection_is_restored_and_saved_in_its_own_order():
    model = small_model()
    weights = state(model)
    handle = fx.accelerate(model, PRUNED, plan())
    linear = model.showo.model.layers[2].mlp.up_proj
    prune.custom_from_mask(linear, "weight", torch.ones_like(linear.weight))
    assert torch.equal(model.state_dict()[UP + "_orig"], weights[UP])
    with pytest.raises(EditedWeightsError):
        outputs(model)
    handle.remove()
    prune.remove(linear, "weight")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


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
