"""Modules that are hooked, adapted or replaced before or while a model is accelerated: what comes is right, or a named error."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import relative
from support.living import CALLS, LIMIT, NEW, PRUNED, UP, accelerated, equal, outputs, plan, pruned_outputs, same, state
from support.models import generation_inputs, question_inputs, small_model
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.models import known
from flashu_ext.models.accelerated import handle_of
from flashu_ext.models.showo2 import adapter
from flashu_ext.models.stamp import Turns

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


def test_a_call_method_replaced_in_the_class_of_a_kernel_counts(monkeypatch):
    model = small_model()
    kind = type(model.showo.model.layers[0].mlp)
    with fx.accelerate(model) as handle:
        before = outputs(model)
        monkeypatch.setattr(kind, "__call__", lambda self, x: 0.5 * nn.Module.__call__(self, x), raising=False)
        after = outputs(model)
        assert relative(after[0], before[0]) > LIMIT
        assert any("__call__ is replaced" in reason for reason in handle.summary().fallbacks)
    assert equal(after, outputs(model)) or relative(after[0], outputs(model)[0]) < LIMIT


def test_another_config_object_is_noticed():
    model = small_model()
    with fx.accelerate(model):
        before = outputs(model)[0]
        model.config = dataclasses.replace(model.config, add_time_embeds=not model.config.add_time_embeds)
        after = outputs(model)[0]
    dense = outputs(model)[0]
    assert relative(after, dense) < LIMIT < relative(before, dense)


def compiled_louder(graph: Any, _: Any) -> Callable[..., Any]:
    """A backend that computes something else."""
    return lambda *inputs: tuple(output * 1.5 for output in graph(*inputs))


def test_a_module_that_is_compiled_in_place_runs_as_itself_or_is_refused():
    model, dense = small_model(), small_model()
    ffn, norm, layer = "showo.model.layers.1.mlp", "showo.model.layers.2.input_layernorm", "showo.model.layers.3"
    with fx.accelerate(model) as handle:
        before = outputs(model)[0]
        for each in (model, dense):
            for path in (ffn, norm):
                each.get_submodule(path).compile(backend=compiled_louder)
        after, expected = outputs(model), outputs(dense)
        assert relative(after[0], expected[0]) < LIMIT < relative(before, expected[0])
        assert torch.equal(after[1], expected[1]) and len(handle.summary().fallbacks) == 2
        model.get_submodule(layer).compile(backend=compiled_louder)
        with pytest.raises(TypeError, match=f"model.{layer}: is compiled in place"):
            outputs(model)
    torch.compiler.reset()


def test_a_model_that_is_compiled_in_place_is_accelerated_and_its_copy_is_its_own():
    model = small_model()
    model.compile(backend=compiled_louder)
    with fx.accelerate(model, PRUNED, plan()) as handle:
        outputs(model)
        assert not handle.summary().fallbacks
        assert vars(copy.deepcopy(model)).get("_compiled_call_impl") is None
    assert vars(model)["_compiled_call_impl"] is not None


def louder_gelu(patch: pytest.MonkeyPatch) -> None:
    real = nn.functional.gelu
    patch.setattr(nn.functional, "gelu", lambda *a, **k: real(*a, **k) * 3)


def louder_layer_norm(patch: pytest.MonkeyPatch) -> None:
    real = nn.functional.layer_norm
    patch.setattr(nn.functional, "layer_norm", lambda *a, **k: real(*a, **k) * 3)


@pytest.mark.parametrize("patch", [louder_gelu, louder_layer_norm])
def test_a_function_that_only_modules_call_is_followed(patch, monkeypatch):
    """Those of the image encoder: an embedding from before must not be used again."""
    model, dense = small_model(), small_model()
    with fx.accelerate(model):
        before = outputs(model)[0]
        patch(monkeypatch)
        after = outputs(model)
    expected = outputs(dense)
    assert relative(after[0], expected[0]) < LIMIT and torch.equal(after[1], expected[1])
    assert relative(before, expected[0]) > 10 * LIMIT, "the patch must change the outputs"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", ["_call_impl", "__call__"])
def test_another_way_from_a_call_to_forward_is_not_passed_over(name, where, late, monkeypatch):
    model = small_model()
    layer = model.showo.model.layers[1]
    if where == "instance" and name == "__call__":
        pytest.skip("Python looks for it in the class only")
    real = getattr(nn.Module, name)

    def replace() -> None:
        if where == "class":
            monkeypatch.setattr(nn.Module, name, lambda *a, **k: real(*a, **k))
        else:
            layer._call_impl = lambda *a, **k: real(layer, *a, **k)

    message = rf"model.*: its (class's )?{name} is replaced"
    if late:
        with fx.accelerate(model):
            outputs(model)
            replace()
            with pytest.raises(TypeError, match=message):
                outputs(model)
    else:
        replace()
        with pytest.raises(TypeError, match=message):
            fx.accelerate(model)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("path", ["F.silu", "F.linear", "qwen.rotate_half", "showo2.guide", "sdpa"])
def test_functions_that_kernels_compute_are_not_passed_over(monkeypatch, path, late):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen2 import modeling_qwen2

    from flashu_ext.models.showo2 import model as showo2

    def replace() -> None:
        if path == "sdpa":
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *arguments, **keywords: None)
            return
        home, _, name = path.partition(".")
        owner: Any = {"F": nn.functional, "qwen": modeling_qwen2, "showo2": showo2}[home]
        monkeypatch.setattr(owner, name, lambda *arguments: arguments[0])

    model = small_model()
    if not late:
        replace()
        with pytest.raises(TypeError, match="replaced"):
            fx.accelerate(model)
        return
    with fx.accelerate(model):
        outputs(model)
        replace()
        with pytest.raises(TypeError, match="replaced"):
            outputs(model)


def test_a_traced_ffn_runs_as_itself():
    model, dense = small_model(), small_model()
    for each in (model, dense):
        mlp = each.showo.model.layers[1].mlp
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated
            traced = torch.jit.trace(mlp, torch.zeros(1, 3, mlp.gate_proj.in_features))
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert hasattr(traced, name), "the runtime looks for it"
        each.showo.model.layers[1].mlp = traced
    with fx.accelerate(model) as handle:
        assert relative(outputs(model)[0], outputs(dense)[0]) < LIMIT
        assert any("layers.1.mlp" in reason for reason in handle.summary().fallbacks)


def test_hooks_in_a_dictionary_of_their_own_are_noticed():
    """`module._forward_hooks = OrderedDict()` is how some code drops all hooks."""
    model = small_model()
    with fx.accelerate(model) as handle:
        outputs(model)
        for module in model.modules():
            module._forward_hooks = OrderedDict()
        model.showo.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0)
        after = outputs(model)
        assert any("has a forward hook" in reason for reason in handle.summary().fallbacks)
    assert relative(after[0], outputs(model)[0]) < LIMIT


def test_matrices_far_away_take_turns():
    """Matrices on a GPU: of each kind one layer's in a call."""
    kinds = [[torch.randn(4, 8) for _ in range(3)], [torch.randn(2, 2, dtype=torch.bfloat16)]]
    turns = Turns(kinds)
    assert not any(turns.changed() for _ in range(6))
    kinds[0][2] += 1
    assert [turns.changed() for _ in range(6)].count(True) == 2
    kinds[1][0] += 1
    assert all(turns.changed() for _ in range(3))


STAND_INS = {
    "diffusers/__init__.py": """
import functools
def registered(init):
    @functools.wraps(init)
    def inner(self, *args, **kwargs):
        init(self, *args, **kwargs)
    return inner
""",
    "einops/__init__.py": "def rearrange(x, pattern):\n    return x\n",
    "mine/__init__.py": "def rearrange(x, pattern):\n    return -x\n",
    "models/__init__.py": "",
    "models/modeling_showo2_qwen2_5.py": """
from torch import nn
from diffusers import registered
from {library} import rearrange
class Showo2Qwen2_5(nn.Module):
    @registered
    def __init__(self):
        super().__init__()
    def forward(self, x):
        return rearrange(x, "b c -> b c")
""",
}


@pytest.mark.parametrize(("library", "refused"), [("einops", False), ("mine", True)])
def test_a_class_is_decorated_by_diffusers_and_calls_einops_as_upstreams_does(
    library: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("{library}", library))
        monkeypatch.delitem(
            sys.modules, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), raising=False
        )
    monkeypatch.syspath_prepend(tmp_path)
    known._replaced_in_class.cache_clear()
    try:
        kind = importlib.import_module("models.modeling_showo2_qwen2_5").Showo2Qwen2_5
        reasons = [known.why_unknown(kind(), adapter._MODELS, method) for method in ("__init__", "forward")]
    finally:
        for name in ("diffusers", "einops", "mine", "models", "models.modeling_showo2_qwen2_5"):
            sys.modules.pop(name, None)
    assert reasons == [None, "its class's forward is replaced" if refused else None]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name, value", [("scale", 0.9), ("is_causal", True), ("head_dim", 24)])
def test_an_attribute_of_the_image_encoder_that_changes_is_noticed(name: str, value: Any, late: bool):
    def change(model: Any) -> None:
        attention = model.und_trans.layers[0].self_attn
        assert getattr(attention, name) != value
        setattr(attention, name, value)

    def drawn(model: Any) -> Tensor:
        return fx.showo2.sample(model, **generation_inputs(model) | {"steps": 3})

    changed, model = small_model(), small_model()
    before = drawn(model)
    change(changed)
    assert relative(drawn(changed), before) > LIMIT, "the change changes the image"
    if not late:
        change(model)
    with fx.accelerate(model):
        if late:
            drawn(model)
            change(model)
        assert relative(drawn(model), drawn(changed)) < LIMIT


REPLACED = """
import sys
sys.path.insert(0, {folder!r})
import torch
from torch import nn

name = {name!r}
function = getattr(nn.functional, name)
setattr(nn.functional, name, lambda *args, **kwargs: function(*args, **kwargs) * 1.1)
import flashu_ext as fx
from support.models import generation_inputs, small_model

torch.set_num_threads(1)
model = small_model()
inputs = generation_inputs(model) | {{"steps": 3}}
dense = fx.showo2.sample(model, **inputs)
try:
    with fx.accelerate(model):
        far = fx.showo2.sample(model, **inputs) - dense
    print(float(far.norm() / dense.norm()) < 1e-4)
except TypeError as error:
    print("is replaced" in str(error))
"""


@pytest.mark.parametrize("name", ["linear", "silu", "gelu", "layer_norm", "conv2d", "scaled_dot_product_attention"])
def test_a_function_replaced_before_the_import_is_noticed(name: str):
    code = REPLACED.format(folder=str(Path(__file__).parents[1]), name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
