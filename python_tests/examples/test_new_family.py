"""The example of a model of a new family: it draws, answers, is pruned, and changes as any other."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flashu_ext as fx
from flashu_ext.models.checks import made_by
from flashu_ext.models.decoding import TokenSampler
from flashu_ext.models.llm import language_model
from flashu_ext.planning.decoders import FAMILIES

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_family.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("new_family", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new_family"] = module
    spec.loader.exec_module(module)
    yield module
    del FAMILIES["sketch"], sys.modules["new_family"]


@pytest.fixture
def model(example: Any) -> Any:
    torch.manual_seed(3)
    return example.Sketch().eval()


@pytest.fixture(params=["Llama", "Qwen2", "Qwen3", "Mistral"])
def any_model(example: Any, model: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With a language model of another kind; Qwen3's norms its heads."""
    if request.param != "Llama":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        more = {"head_dim": 16, "num_key_value_heads": 4, "vocab_size": 64, "sliding_window": None}
        home = (f"transformers.models.{request.param.lower()}.modeling_{request.param.lower()}",)
        names = [f"{request.param}{part}" for part in ("ForCausalLM", "Model", "DecoderLayer")]
        monkeypatch.setattr(example, "LLAMA", dict.fromkeys(names, home))
        model.llm = language_model(request.param, {**sizes, **more}).eval()
    for name, parameter in model.llm.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.uniform_(0.2, 3)
    return model


def draw(example: Any, model: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    return example.sample(model, noise, torch.arange(1, 15).reshape(2, 7), **arguments)


def test_it_is_short() -> None:
    """What a family needs besides its model."""
    lines = EXAMPLE.read_text().splitlines()
    start, end = (
        next(i for i, line in enumerate(lines) if line.startswith(text)) for text in ("@dataclass", "fx.register")
    )
    assert end - start < 110


def test_the_program_runs(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert "from the dense images" in capsys.readouterr().out


def test_exact_is_the_dense_model(example: Any, any_model: Any) -> None:
    dense = draw(example, any_model)
    with fx.accelerate(any_model) as handle:
        torch.testing.assert_close(draw(example, any_model), dense, rtol=1e-4, atol=1e-5)
        assert not handle.summary().fallbacks


def test_what_is_described_is_what_runs(example: Any, model: Any) -> None:
    """A head without blocks runs no attention and no FFN."""
    described = {row.op for row in fx.kernel_sets.describe(model).rows if row.phase == "head"}
    with fx.accelerate(model) as handle:
        draw(example, model)
        assert set(handle.summary().ran["generation head"]) == described == {"linear", "rms_norm", "guided_euler_step_"}


@pytest.mark.parametrize(
    "config",
    [
        fx.FlashUConfig(layer_skip_ratio=0.3, layer_skip_interval=3),
        fx.FlashUConfig(head_cache_interval=2),
        fx.FlashUConfig(token_skip=True, token_skip_ratio=0.4, token_skip_interval=3),
        fx.FlashUConfig(guidance=[(4, 2.0), (3, 1.0)], skip_unit_guidance=True),
    ],
)
def test_approximations_work_too(example: Any, model: Any, config: fx.FlashUConfig) -> None:
    with fx.accelerate(model):
        exact = draw(example, model)
    with fx.accelerate(model, config):
        got = draw(example, model)
        assert got.isfinite().all() and not torch.equal(got, exact)
        assert torch.equal(draw(example, model), got)


def test_it_answers(example: Any, any_model: Any) -> None:
    image, before, after = torch.randn(1, 4, 8, 8), torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        embeds = [any_model.sketch_in(image).flatten(2).transpose(1, 2)]
        embeds = [any_model.llm.model.embed_tokens(before), *embeds, any_model.llm.model.embed_tokens(after)]
        expected = any_model.llm.generate(
            inputs_embeds=torch.cat(embeds, 1), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    with fx.accelerate(any_model, fx.FlashUConfig.exact()) as handle:
        (got,) = handle.runner.answer_tokens([[image]], [before], [after], 5, None, TokenSampler())
    assert torch.equal(got, expected[0])


def test_its_plan_is_made_of_its_drawings(example: Any, model: Any) -> None:
    """From the tokens of both branches; drawing then runs without the other neurons."""
    latents, prompts = torch.randn(2, 4, 8, 8), torch.arange(1, 15).reshape(2, 7)
    sample = example.SketchSample(latents, prompts)
    plan = fx.calibrate(model, [sample], times=(1.0,), ratio=0.5, multiple=16, progress=False)
    rows: list[torch.Tensor] = []
    down = model.llm.model.layers[2].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model.velocity(latents.repeat(2, 1, 1, 1), torch.ones(4), *example.sequences(prompts, latents))
    hook.remove()
    expected = down.weight.abs().sum(0) * rows[0].norm(dim=0)
    assert plan.calibration.sums["generation"].tokens == len(rows[0]) == 4 * 24
    torch.testing.assert_close(plan.scores["generation"][2], expected.detach(), rtol=1e-4, atol=1e-5)
    with fx.accelerate(model, fx.FlashUConfig(ffn_prune_ratio=0.5, prune_multiple=16), plan):
        got = draw(example, model)
    for n, layer in enumerate(model.llm.model.layers):
        gone = torch.ones(128, dtype=torch.bool)
        gone[plan.kept("generation", n)] = False
        layer.mlp.down_proj.weight.data[:, gone] = 0
    torch.testing.assert_close(got, draw(example, model), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"generation\[0\]: expected a SketchSample, got int"):
        fx.calibrate(model, [3])


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_formula_of_its_own_guides(example: Any, model: Any, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """It is asked for where two branches run, and what it gives is checked."""
    asked: list[int] = []

    def halves(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        first, second = rows.chunk(2)
        return second + factor * (first - second)

    with fx.accelerate(model):
        expected = draw(example, model, scale=scale)
        monkeypatch.setattr(example.SketchInputs, "formula", property(lambda _: halves))
        torch.testing.assert_close(draw(example, model, scale=scale), expected, rtol=1e-4, atol=1e-5)
        assert set(asked) == ({2} if scale else set())  # of an image at a time
        for wrong in (lambda rows, factor: rows, lambda rows, factor: rows[:1, :5], lambda rows, factor: None):
            monkeypatch.setattr(example.SketchInputs, "formula", property(lambda _, own=wrong: own))
            if scale:
                with pytest.raises((ValueError, TypeError), match=r"DrawInputs\.formula: expected it to give"):
                    draw(example, model, scale=scale)
            else:
                draw(example, model, scale=scale)


def test_a_wrong_schedule_is_named(example: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = example.SketchInputs.schedule
    monkeypatch.setattr(
        example.SketchInputs, "schedule", lambda self, points: tuple(each[1:] for each in own(self, points))
    )
    with (
        fx.accelerate(model),
        pytest.raises(ValueError, match=r"DrawInputs\.schedule: expected it to give \[\d+\], got"),
    ):
        draw(example, model)


@pytest.mark.parametrize("wrong", [{"allowed": "float"}, {"spans": ((1, 300),)}])
def test_a_wrong_question_is_named(
    example: Any, model: Any, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    own = example.SketchAdapter.question

    def question(self: Any, *asked: Any) -> Any:
        made = own(self, *asked)
        changed = {"allowed": made.allowed.float()} if "allowed" in wrong else wrong
        return dataclasses.replace(made, **changed)

    monkeypatch.setattr(example.SketchAdapter, "question", question)
    image, before, after = torch.randn(1, 4, 8, 8), torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    with (
        fx.accelerate(model) as handle,
        pytest.raises((TypeError, ValueError), match=r"Adapter\.question: expected `(allowed|spans)`"),
    ):
        handle.runner.answer_tokens([[image]], [before], [after], 5, None, TokenSampler())


def test_a_change_is_noticed_or_refused(example: Any, model: Any) -> None:
    with fx.accelerate(model):
        before = draw(example, model)
        model.sketch_out.weight.data.mul_(2)
        got = draw(example, model)
        assert not torch.equal(got, before)
    torch.testing.assert_close(got, draw(example, model), rtol=1e-4, atol=1e-5)
    model.llm.model.layers[1].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(TypeError, match=r"model.llm.model.layers.1: has a forward hook"):
        fx.accelerate(model)


def test_a_family_is_registered_once(example: Any) -> None:
    fx.register_family("sketch", FAMILIES["sketch"])  # the same again
    with pytest.raises(ValueError, match="family: expected a name of its own"):
        fx.register_family("showo2", FAMILIES["sketch"])
    with pytest.raises(ValueError, match="mark: expected an attribute that no other family has"):
        fx.register_family("other", FAMILIES["sketch"])
    with pytest.raises(TypeError, match="description: expected a Family"):
        fx.register_family("other", ("Other", "mark"))


def test_without_guidance_the_prompts_run_alone(example: Any, model: Any) -> None:
    dense = draw(example, model, steps=4, scale=0.0)
    with fx.accelerate(model):
        fast = draw(example, model, steps=4, scale=0.0)
    assert (fast - dense).norm() < 1e-5 * dense.norm()
    assert (draw(example, model, steps=4, scale=1.0) - dense).norm() < 1e-5 * dense.norm()


def test_gradients_may_be_on(example: Any, model: Any) -> None:
    inputs = inputs_of(example)
    with fx.accelerate(model) as handle:
        without = draw(example, model, steps=3)
        with torch.enable_grad():
            latents = example.integrate(handle.stepper(inputs))
    assert torch.equal(latents, without) and not latents.requires_grad


def inputs_of(example: Any, **changes: Any) -> Any:
    """Of `draw` with three steps."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, spans = example.sequences(torch.arange(1, 15).reshape(2, 7), noise)
    fields = {"noise": noise, "tokens": tokens, "positions": spans, "steps": 4, "guidance_scale": 3.0}
    return example.SketchInputs(**{**fields, **changes})


SPANS = torch.tensor([[[7, 17]]]).repeat(4, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positions": SPANS + torch.tensor([5, 0])},
            r"positions: expected \(offset, 17\) within 24 tokens, got \(12, 17\)",
        ),
        ({"positions": SPANS - torch.tensor([0, 4])}, r"positions: .* got \(7, 13\)"),
        ({"positions": SPANS[:, 0]}, r"positions: expected \[4, 1, 2\]"),
        (
            {"tokens": torch.zeros(2, 24, dtype=torch.int64)},
            r"tokens: expected int64 \[4, n\], 2 rows for each of 2 images",
        ),
        ({"tokens": torch.full((4, 24), 64)}, r"tokens: expected token ids in \[0, 64\)"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, r"noise: expected \[images >= 1, 4, H, W\]"),
        ({"guidance_scale": -1.0}, "guidance_scale: expected a number >= 0"),
        ({"guidance_scale": [3.0, 3.0]}, "guidance_scale: expected a number >= 0"),
        ({"guidance_scale": (3.0, 3.0, 3.0)}, "guidance_scale: expected one, or one for each of 2 images, got 3"),
    ],
)
def test_inputs_that_do_not_fit_are_named(example: Any, model: Any, changes: dict[str, Any], message: str) -> None:
    with fx.accelerate(model) as handle:
        expected = draw(example, model, steps=3)
        with pytest.raises((ValueError, IndexError), match=message):
            handle.stepper(inputs_of(example, **changes))
        assert torch.equal(draw(example, model, steps=3), expected)


def wide(method: str) -> Any:
    """A subclass's method that gives one number too many in the last dimension."""
    return lambda self, *arguments: torch.nn.functional.pad(
        getattr(super(type(self), self), method)(*arguments), (0, 1)
    )


@pytest.mark.parametrize("method", ["time_token", "span", "velocity", "modulation"])
def test_a_result_of_another_shape_is_named(
    example: Any, model: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = type("Wrong", (example.SketchAdapter,), {method: wide(method)})
    monkeypatch.setattr(example, "SketchAdapter", wrong)
    with (
        fx.accelerate(model),
        pytest.raises(ValueError, match=rf"Adapter\.{method}: expected it to give \[.*\], got \["),
    ):
        draw(example, model, steps=3)


def test_an_answers_parts_of_another_shape_are_named(example: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def question(self: Any, *arguments: Any) -> Any:
        right = super(wrong, self).question(*arguments)
        return fx.Question(right.embeds, right.allowed[:-1], right.spans)

    wrong = type("Wrong", (example.SketchAdapter,), {"question": question})
    monkeypatch.setattr(example, "SketchAdapter", wrong)
    before, after = torch.tensor([[1]]), torch.tensor([[2, 3]])
    with fx.accelerate(model) as handle, pytest.raises(ValueError, match=r"Adapter\.question: expected it to give \["):
        handle.runner.understanding.question(torch.zeros(1, 16, 64), before, after)
    with pytest.raises(TypeError, match=r"Adapter\.span: expected it to give a tensor, got NoneType"):
        made_by("span", None, 1)
