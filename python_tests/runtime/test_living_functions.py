"""Functions, classes and ways of calling that are replaced, compiled or decorated: what a model then computes."""

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
from support.living import LIMIT, PRUNED, equal, outputs, plan
from support.models import generation_inputs, small_model
from torch import Tensor, nn

import flashu_ext as fx
from flashu_ext.models import known
from flashu_ext.models.showo2 import adapter
from flashu_ext.models.stamp import Turns

pytestmark = pytest.mark.usefixtures("one_thread")


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
