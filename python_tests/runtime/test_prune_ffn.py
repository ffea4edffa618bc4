"""The smallest step in: FFNs of any decoder on a task's neurons, against the same decoder with the other neurons cut out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import small_model
from torch import Tensor, nn

import flashu_ext as fx

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS = ("Qwen2", "Qwen3", "Llama", "Mistral")
TOKENS = torch.arange(3, 14)[None]


def decoder(kind: str = "Qwen2", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(7)
    fields = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "head_dim": 8,
    }
    config = getattr(transformers, f"{kind}Config")(**{**fields, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(dtype)


def calibrated(model: Any, ratio: float = 0.25) -> fx.TaskPlan:
    samples = [fx.TokenSample(TOKENS + i) for i in range(3)]
    return fx.calibrate(model, understanding=samples, ratio=ratio, multiple=8, progress=False)


def cut(model: Any, plan: fx.TaskPlan, task: str = "understanding") -> Any:
    """A copy whose dropped neurons give nothing."""
    model = copy.deepcopy(model)
    layers = (model.model if hasattr(model, "model") else model.showo.model).layers
    with torch.no_grad():
        for layer, layout in zip(layers, plan.layouts(), strict=True):
            gone = torch.ones(layout.intermediate, dtype=torch.bool)
            gone[layout.kept(task)] = False
            layer.mlp.down_proj.weight[:, gone] = 0
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_decoder_is_the_cut_one(kind: str, dtype: torch.dtype) -> None:
    model = decoder(kind, dtype)
    plan = calibrated(model)
    whole, exact = logits(model), logits(cut(model, plan).double())
    own = (logits(cut(model, plan)).double() - exact).norm()
    with fx.prune_ffn(model, plan) as handle:
        assert handle.fallbacks == {}
        got = logits(model)
        assert (got.double() - exact).norm() <= 2 * own + 1e-6
        assert not torch.equal(got, whole)
        words = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert (
        torch.equal(words, cut(model, plan).generate(TOKENS, max_new_tokens=5, do_sample=False))
        or dtype != torch.float32
    )
    assert torch.equal(logits(model), whole)


def test_tasks_are_exchanged_between_calls() -> None:
    model = decoder()
    scores = {task: torch.rand(3, 96, generator=torch.Generator().manual_seed(seed)) for seed, task in enumerate("ab")}
    plan = fx.TaskPlan(scores, 0.5, 8)
    with pytest.raises(ValueError, match=r"task: expected one of the plan's, \['a', 'b'\], got None"):
        fx.prune_ffn(model, plan)
    with fx.prune_ffn(model, plan, "a") as handle:
        for task in ("a", "b", "a"):
            handle.task = task
            torch.testing.assert_close(logits(model), logits(cut(model, plan, task)))
        handle.task = None
        torch.testing.assert_close(logits(model), logits(decoder()))


def test_a_unified_model_is_a_decoder_too() -> None:
    model = small_model()
    ffns = [layer.mlp for layer in model.showo.model.layers]
    generator = torch.Generator().manual_seed(1)
    scores = {"understanding": torch.rand(len(ffns), ffns[0].gate_proj.out_features, generator=generator)}
    plan = fx.TaskPlan(scores, 0.5, 8)
    with torch.no_grad(), fx.prune_ffn(model, plan):
        got = model.showo(TOKENS).logits
        torch.testing.assert_close(got, cut(model, plan).showo(TOKENS).logits)
        with pytest.raises(RuntimeError, match="pruned already"):
            fx.prune_ffn(model, plan)
    with fx.accelerate(model), pytest.raises(RuntimeError, match="not accelerated"):
        fx.prune_ffn(model, plan)


@pytest.mark.parametrize("change", ["hook", "bias", "module", "weights", "in place", "loaded", "dtype"])
def test_what_changes_later_counts(change: str) -> None:
    model = decoder()
    plan = calibrated(model)
    with fx.prune_ffn(model, plan) as handle:
        before = logits(model)
        ffn = model.model.layers[1].mlp
        if change == "hook":
            ffn.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
        elif change == "bias":
            ffn.gate_proj.bias = nn.Parameter(torch.ones(96))
        elif change == "module":
            ffn.down_proj = nn.Sequential(ffn.down_proj, nn.Tanh())
        elif change == "weights":
            ffn.up_proj.weight = nn.Parameter(torch.randn(96, 32))
        elif change == "in place":
            ffn.down_proj.weight.data.mul_(3)
        elif change == "loaded":
            model.load_state_dict(decoder(initializer_range=0.5).state_dict())
        else:
            model.double()
        got = logits(model)
        whole = {"hook", "bias", "module"}
        assert bool(handle.fallbacks) == (change in whole)
        assert not torch.equal(got, before)
        state = model.state_dict()
    if change in ("weights", "in place", "loaded"):
        torch.testing.assert_close(got, logits(cut(model, plan)))
    elif change == "dtype":
        torch.testing.assert_close(got, logits(cut(decoder(), plan).double()))
    else:  # this FFN is whole, the others are pruned
        reference = cut(decoder(), plan)
        reference.model.layers[1].mlp = model.model.layers[1].mlp
        torch.testing.assert_close(got, logits(reference))
    assert set(state) == set(model.state_dict())


def test_gradients_are_those_of_the_whole_ffn() -> None:
    model = decoder()
    plan = calibrated(model)
    model(TOKENS).logits.sum().backward()
    expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    with fx.prune_ffn(model, plan):
        model(TOKENS).logits.sum().backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected)


def test_a_copy_is_dense() -> None:
    model = decoder()
    whole = logits(model)
    with fx.prune_ffn(model, calibrated(model)):
        assert torch.equal(logits(copy.deepcopy(model)), whole)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda model, plan: (nn.Linear(2, 2), plan), TypeError, "model: expected a model of a known family"),
        (lambda model, plan: (model, {}), TypeError, "plan: expected a TaskPlan, got dict"),
        (lambda model, plan: (model, plan, "drawing"), ValueError, "task: expected one of the plan's"),
        (
            lambda model, plan: (decoder(intermediate_size=64), plan),
            ValueError,
            "plan: made for 3 layers of 96 neurons",
        ),
        (lambda model, plan: (decoder("Llama"), plan), ValueError, "plan: made for another model"),
    ],
)
def test_what_is_wrong_is_named(arguments: Any, error: type[Exception], message: str) -> None:
    model = decoder()
    with pytest.raises(error, match=message):
        fx.prune_ffn(*arguments(model, calibrated(model)))
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_share_an_ffn_are_refused() -> None:
    model = decoder()
    layers = model.model.layers
    layers[2].mlp = layers[0].mlp
    plan = fx.TaskPlan({"understanding": torch.rand(3, 96)}, 0.5, 8)
    with pytest.raises(
        ValueError, match=r"model: expected an FFN of its own in layer 2, got that of model\.layers\.0\.mlp"
    ):
        fx.prune_ffn(model, plan)
    assert "forward" not in vars(layers[0].mlp)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (fx.TokenSample(TOKENS.float()), ValueError, r"understanding\[0\]: tokens: expected int64"),
        (fx.TokenSample(TOKENS[0]), ValueError, r"tokens: expected int64 \[1, n\]"),
        (fx.TokenSample(TOKENS, 11), ValueError, r"answer_length: expected an integer in \[0, 11\)"),
        (fx.UnderstandingSample(torch.zeros(1, 4, 4, 4), TOKENS, TOKENS), TypeError, "expected a Show-o2 model"),
    ],
)
def test_wrong_samples_are_named(sample: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fx.calibrate(decoder(), understanding=[sample], progress=False)
