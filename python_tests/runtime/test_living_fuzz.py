"""Any sequence of changes to an accelerated model, compared with a dense twin that gets the same changes: results are the
bits of a newly accelerated copy, or a named error is raised; after `remove()` the model equals the twin."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.models import generation_inputs, question_inputs, small_model
from torch import Tensor

import flashu_ext as fx

ORDER = (1, 0, 3, 2)
CONFIGS = {
    "exact": fx.FlashUConfig.exact(),
    "pruned": fx.FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=8),
    "paper": fx.FlashUConfig.paper(steps=5, prune_multiple=8, ffn_prune_ratio=0.25),
}
WEIGHTS = (
    "showo.model.layers.0.mlp.gate_proj.weight",
    "showo.model.layers.2.mlp.down_proj.weight",
    "showo.model.layers.1.self_attn.q_proj.weight",
    "showo.model.layers.3.input_layernorm.weight",
    "showo.model.embed_tokens.weight",
    "und_trans.layers.0.mlp.fc1.weight",
    "diffusion_head_a.1.mlp.up_proj.weight",
    "diffusion_head_b.linear.bias",
)
HOOKED = (
    "showo.model.layers.0.mlp.gate_proj",
    "showo.model.layers.1.mlp",
    "showo.model.layers.2.input_layernorm",
    "showo.model.layers.3.self_attn.v_proj",
    "showo.model.norm",
    "showo.model.layers.1",
    "und_trans.layers.0",
    "diffusion_head_a.0.mlp",
)
SCORES = [torch.rand(64, generator=torch.Generator().manual_seed(layer)) for layer in range(len(ORDER))]
PLAN = fx.TaskPlan.from_scores(
    generation=SCORES, understanding=[score.flip(0) for score in SCORES], ratio=0.25, multiple=8
)


def same(a: Any, b: Any) -> bool:
    return set(a) == set(b) and all(torch.equal(value, b[name]) for name, value in a.items())


def louder(_module: Any, _inputs: Any, output: Any) -> Any:
    return output * 1.25 if isinstance(output, Tensor) else output


class LivingModel(RuleBasedStateMachine):
    @initialize()
    def build(self) -> None:
        self.model, self.twin = small_model(order=ORDER), small_model(order=ORDER)
        self.handle: Any = None
        self.kind = ""
        self.hooks: dict[str, list[Any]] = {}
        self.edited = False  # outside editing(), where that is refused at the next call

    def both(self) -> tuple[Any, Any]:
        return self.model, self.twin

    # ---- in and out

    @precondition(lambda self: self.handle is None)
    @rule(kind=st.sampled_from(sorted(CONFIGS)))
    def accelerate(self, kind: str) -> None:
        plan = None if kind == "exact" else PLAN
        try:
            self.handle = fx.accelerate(self.model, CONFIGS[kind], plan)
            self.kind = kind
        except TypeError as error:
            assert "showo.model.layers.1" in str(error) and self.hooks, error

    @precondition(lambda self: self.handle is not None and not self.edited)
    @rule()
    def remove(self) -> None:
        self.handle.remove()
        self.handle = None

    # ---- use

    def compared(self, run: Any) -> None:
        if self.edited:
            with pytest.raises(fx.EditedWeightsError, match="editing"):
                run(self.model)
            self.handle.remove()
            self.handle, self.edited = None, False
            return
        fresh = copy.deepcopy(self.twin)
        try:
            if self.handle is not None:
                fx.accelerate(fresh, CONFIGS[self.kind], None if self.kind == "exact" else PLAN)
        except TypeError as refused:
            with pytest.raises(TypeError) as error:
                run(self.model)
            assert str(error.value) == str(refused)
            return
        assert torch.equal(run(self.model), run(fresh))

    @rule(seed=st.integers(0, 1))
    def draw(self, seed: int) -> None:
        inputs = generation_inputs(self.twin, seed, images=1)
        self.compared(lambda model: fx.showo2.sample(model, steps=5, **inputs))

    @rule(seed=st.integers(0, 1))
    def answer(self, seed: int) -> None:
        inputs = question_inputs(seed)
        self.compared(lambda model: fx.showo2.answer_tokens(model, **inputs, max_new_tokens=4))

    # ---- changes

    @rule(name=st.sampled_from(WEIGHTS), factor=st.sampled_from((0.5, -2.0)))
    def write(self, name: str, factor: float) -> None:
        """Writes in place, by one factor: the result is the same in every order of neurons."""
        for model in self.both():
            with torch.no_grad():
                model.get_parameter(name).mul_(factor)
        moved = self.handle is not None and any(name.startswith(f"{path}.") for path in self.moved())
        self.edited = self.edited or moved

    def moved(self) -> list[str]:
        """The FFNs whose neurons lie in plan order."""
        modules = {module: name for name, module in self.model.named_modules()}
        return [modules[order.ffn] for order in self.handle.runner.orders if order.ffn in modules]

    @precondition(lambda self: self.handle is not None and not self.edited)
    @rule(name=st.sampled_from(WEIGHTS))
    def write_inside_editing(self, name: str) -> None:
        """Scales every row by its own factor, like a merged adapter."""
        refused = any(path == "showo.model.layers.1" for path in self.hooks)
        try:
            with self.handle.editing():
                for model in self.both():
                    weight = model.get_parameter(name)
                    with torch.no_grad():
                        weight.mul_(torch.linspace(0.5, 1.5, weight.shape[0]).view(-1, *[1] * (weight.dim() - 1)))
        except TypeError:
            assert refused

    @precondition(lambda self: not self.edited)
    @rule(seed=st.integers(1, 2), assign=st.booleans())
    def load(self, seed: int, assign: bool) -> None:
        state = small_model(seed, order=ORDER).to(self.twin.showo.model.embed_tokens.weight.dtype).state_dict()
        for model in self.both():
            model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)

    @rule(name=st.sampled_from(HOOKED))
    def hook(self, name: str) -> None:
        if name in self.hooks:
            for hook in self.hooks.pop(name):
                hook.remove()
        else:
            self.hooks[name] = [model.get_submodule(name).register_forward_hook(louder) for model in self.both()]

    @precondition(lambda self: not self.edited and not self.hooks)
    @rule(layer=st.integers(0, 3))
    def replace(self, layer: int) -> None:
        """Replaces an FFN by another object with other weights."""
        donor = small_model(5, order=ORDER).to(self.twin.showo.model.embed_tokens.weight.dtype)
        for model in self.both():
            model.showo.model.layers[layer].mlp = copy.deepcopy(donor.showo.model.layers[layer].mlp)

    @precondition(lambda self: not self.edited)
    @rule(dtype=st.sampled_from((torch.bfloat16, torch.float32)))
    def convert(self, dtype: torch.dtype) -> None:
        for model in self.both():
            model.to(dtype)

    # ---- what others see

    @precondition(lambda self: not self.edited)
    @rule()
    def copies_are_dense(self) -> None:
        copied = copy.deepcopy(self.model)
        assert fx.handle_of(copied) is None and same(copied.state_dict(), self.twin.state_dict())

    @precondition(lambda self: not self.edited)
    @rule()
    def files_are_dense(self) -> None:
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert fx.handle_of(loaded) is None and same(loaded.state_dict(), self.twin.state_dict())

    @invariant()
    def state_dicts_are_equal(self) -> None:
        if hasattr(self, "model") and not self.edited:
            assert same(self.model.state_dict(), self.twin.state_dict())


TestLivingModel = LivingModel.TestCase
TestLivingModel.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
