"""The accelerated model: conformance under exact and paper settings, state, removal, refusals."""

import copy
import gc

import pytest
import torch
from support.conformance import public, relative
from support.generation import sample_as_upstream
from support.living import PRUNED, plan
from support.models import small_model
from torch import nn

import flashu_ext as fx
from flashu_ext.models.accelerated import handle_of
from flashu_ext.models.masks import omni_allowed
from flashu_ext.models.showo2.sampling import time_grid
from flashu_ext.runtime.order import FfnOrder

LIMIT = 1e-4


def generate(model, fixture, rows=slice(None), **changes):
    inputs = fixture.sample_inputs
    chosen = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return fx.showo2.sample(model, **{**chosen, **changes})


# ---- equal outputs


@pytest.mark.parametrize("way", ["sample", "t2i_generate"])
def test_exact_equals_upstream(way):
    fixture, model = public(), public().model()
    steps = fixture.spec["num_steps"]
    with fx.accelerate(model):
        if way == "sample":
            latents, velocity = generate(model, fixture, steps=steps, return_velocity=True)
            for got, expected in zip(velocity, fixture.t2i["velocity"], strict=True):
                assert relative(got, expected) < LIMIT
        else:
            latents = sample_as_upstream(model, fixture, steps)
    assert relative(latents, fixture.t2i["latents"]) < LIMIT


@pytest.mark.parametrize("way", ["sample", "t2i_generate"])
def test_paper_equals_flashu(way):
    fixture, model = public(), public().model()
    with fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan()) as handle:
        if way == "sample":
            latents, velocity = generate(model, fixture, return_velocity=True)
            for got, expected in zip(velocity, fixture.flashu["velocity"], strict=True):
                assert relative(got, expected[: got.shape[0]]) < LIMIT
        else:
            latents = sample_as_upstream(model, fixture, fixture.spec["flashu"]["steps"])
        summary = handle.summary()
    assert relative(latents, fixture.flashu["latents"]) < LIMIT
    reference = {step: tuple(layers) for step, layers in fixture.spec["flashu"]["skipped_layers"]}
    assert summary.layers_skipped and all(reference[step] == layers for step, layers in summary.layers_skipped)
    for layer in range(fixture.spec["model"]["layers"]):
        assert torch.equal(handle.plan.kept("generation", layer), fixture.flashu[f"keep.{layer}"])
    assert not summary.fallbacks


@pytest.mark.parametrize("family", ["ffn", "routing", "norm", "step"])
def test_each_kernel_family_can_be_switched_off(family):
    fixture, model = public(), public().model()
    config = fixture.flashu_config(**{f"{family}_kernels": False})
    with fx.accelerate(model, config, fixture.flashu_plan()) as handle:
        assert relative(generate(model, fixture), fixture.flashu["latents"]) < LIMIT
        summary = handle.summary()
    assert "torch" in summary.kernels.values()
    assert any(f"{family}_kernels is False" in reason for reason in summary.fallbacks)


def test_answers_equal_upstream_and_share_the_image():
    fixture, model = public(), public().model()
    inputs = fixture.answer_inputs
    other = {
        **inputs,
        "tokens_after_boi": torch.cat([inputs["tokens_after_boi"][:, :3], inputs["tokens_after_boi"][:, 5:]], 1),
    }
    expected = fx.showo2.answer_tokens(model, **other)
    with fx.accelerate(model) as handle:
        assert torch.equal(fx.showo2.answer_tokens(model, **inputs), fixture.mmu["output_tokens"])
        before = handle.summary().tokens
        assert before["reused"] == 0
        assert torch.equal(fx.showo2.answer_tokens(model, **other), expected)
        shared = handle.summary().tokens["reused"]
        # system prompt, boi, time, image, eoi and the first question token are the same
        assert shared == inputs["tokens_before_image"].shape[1] + 1 + 37 + 1 + 1
        changed = {**inputs, "image_latents": inputs["image_latents"] + 0.5}
        after_change = fx.showo2.answer_tokens(model, **changed)
        assert handle.summary().tokens["reused"] - shared <= inputs["tokens_before_image"].shape[1] + 2
    assert torch.equal(after_change, fx.showo2.answer_tokens(model, **changed))


def test_mmu_generate_samples_the_same_tokens():
    fixture, model = public(), public().model()
    embeds = fixture.mmu["input_embeds"]
    length = embeds.shape[1]
    allowed = omni_allowed(torch.tensor([[[7, 37]]]), length)
    mask = torch.zeros(length, length).masked_fill_(~allowed[0], torch.finfo(torch.float32).min)[None, None]
    arguments = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 5}
    torch.manual_seed(3)
    expected = model.mmu_generate(embeds, mask, **arguments)
    with fx.accelerate(model):
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(torch.stack(model.mmu_generate(embeds, mask, **arguments)), torch.stack(expected))
        stop = int(expected[2])
        torch.manual_seed(3)
        stopped = [int(token) for token in model.mmu_generate(embeds, mask, **arguments, eos_token=stop)]
        assert stopped == [int(token) for token in expected][: [int(t) for t in expected].index(stop) + 1]


# ---- state


def test_images_and_answers_in_any_order():
    fixture, model = public(), public().model()
    config, plan = fixture.flashu_config(), fixture.flashu_plan()
    inputs = fixture.answer_inputs
    with fx.accelerate(model, config, plan):
        alone = [generate(model, fixture, slice(i, i + 1), steps=steps) for i, steps in ((0, 11), (1, 7))]
        both = generate(model, fixture, steps=9)

        def ask(step, latents):
            assert torch.equal(fx.showo2.answer_tokens(model, **inputs), fixture.mmu["output_tokens"])

        again = [generate(model, fixture, slice(i, i + 1), steps=steps, callback=ask) for i, steps in ((1, 7), (0, 11))]
        assert torch.equal(alone[0], again[1]) and torch.equal(alone[1], again[0])
        assert torch.equal(generate(model, fixture, steps=9), both)
        nested = {}

        def other_image(step, latents):
            if step == 4:
                nested["latents"] = generate(model, fixture, slice(1, 2), steps=7)

        assert torch.equal(generate(model, fixture, slice(0, 1), steps=11, callback=other_image), alone[0])
        assert torch.equal(nested["latents"], alone[1])


def test_two_images_alternate_through_upstreams_sampler():
    fixture, model = public(), public().model()
    i = fixture.sample_inputs

    def evaluations(row):
        """The evaluations of one image, one at a time, for a sampler that interleaves images."""
        tokens = torch.cat([i["text_tokens"][row : row + 1], i["text_tokens_null"][row : row + 1]])
        positions = torch.cat([i["modality_positions"][row : row + 1], i["modality_positions_null"][row : row + 1]])
        latents = i["noise"][row : row + 1].repeat(2, 1, 1, 1)
        times = time_grid(11, 3.0)
        for n in range(10):
            velocity = model.t2i_generate(
                image_latents=latents, t=times[n].expand(2), text_tokens=tokens, modality_positions=positions,
                attention_mask=None, max_seq_len=tokens.shape[1], guidance_scale=i["guidance_scale"],
            )  # fmt: skip
            latents = latents + (times[n + 1] - times[n]) * velocity
            yield latents[:1]

    with fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan()):
        alone = [list(evaluations(row))[-1] for row in (0, 1)]
        pairs = list(zip(evaluations(0), evaluations(1), strict=True))
        assert torch.equal(pairs[-1][0], alone[0]) and torch.equal(pairs[-1][1], alone[1])


def test_two_accelerated_models_side_by_side():
    fixture = public()
    first, second = fixture.model(), fixture.model()
    with torch.no_grad():
        second.diffusion_head_b.linear.weight.mul_(1.5)
    expected = [generate(model, fixture, steps=4) for model in (first, second)]
    with fx.accelerate(first), fx.accelerate(second):
        results = {}

        def inner(step, latents):
            results["second"] = generate(second, fixture, steps=4)

        results["first"] = generate(first, fixture, steps=4, callback=inner)
    assert relative(results["first"], expected[0]) < LIMIT
    assert relative(results["second"], expected[1]) < LIMIT


def test_without_guidance_and_with_guided_rows_of_their_own():
    fixture, model = public(), public().model()
    expected = generate(model, fixture, steps=4, guidance_scale=0.0)
    i = fixture.sample_inputs
    call = {
        "image_latents": torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0)),
        "t": torch.tensor([0.3, 0.4, 0.5, 0.6]),
        "text_tokens": torch.cat([i["text_tokens"], i["text_tokens_null"]]),
        "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
        "guidance_scale": 3.0,
    }
    velocity = model.t2i_generate(**call)
    with fx.accelerate(model) as handle:
        assert relative(generate(model, fixture, steps=4, guidance_scale=0.0), expected) < LIMIT
        assert relative(model.t2i_generate(**call), velocity) < LIMIT
        assert not handle.summary().fallbacks


def test_a_foreign_mask_runs_the_models_own_method():
    fixture, model = public(), public().model()
    i = fixture.sample_inputs
    full = torch.zeros(2, 1, 57, 57)
    call = {
        "image_latents": i["noise"],
        "t": torch.tensor([0.3, 0.3]),
        "text_tokens": i["text_tokens"],
        "attention_mask": full,
        "modality_positions": i["modality_positions"],
    }
    expected = model.t2i_generate(**call)
    with fx.accelerate(model) as handle:
        torch.testing.assert_close(model.t2i_generate(**call), expected, rtol=1e-5, atol=1e-5)
        assert handle.summary().fallbacks == {"t2i_generate: an attention mask of another pattern": 1}


def test_head_forecast_changes_cached_steps_only():
    fixture, model = public(), public().model()
    runs = {}
    for order in (0, 1, 2):
        config = fixture.flashu_config(head_forecast_order=order, steps=16, full_network_steps=2)
        with fx.accelerate(model, config, fixture.flashu_plan()):
            runs[order] = generate(model, fixture, return_velocity=True)[1]
    # the first update is at step 3; a difference needs the second one, at step 6, and changes outputs from step 7 on
    for order in (1, 2):
        assert relative(runs[order][:6], runs[0][:6]) < 1e-6
        assert relative(runs[order][6], runs[0][6]) > 1e-6


# ---- accelerating and removing


@pytest.mark.parametrize("paper", [False, True])
def test_remove_gives_the_same_model_back(paper):
    fixture, model = public(), public().model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    attributes = set(model.__dict__)
    arguments = (fixture.flashu_config(), fixture.flashu_plan()) if paper else ()
    handle = fx.accelerate(model, *arguments)
    assert dict(model.named_modules()) == modules and handle_of(model) is handle
    assert set(model.state_dict()) == set(state)
    generate(model, fixture, steps=3)
    handle.remove()
    handle.remove()
    assert dict(model.named_modules()) == modules and list(dict(model.named_modules())) == list(modules)
    assert all(model.get_parameter(name) is value for name, value in parameters.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(model.__dict__) == attributes and handle_of(model) is None
    assert repr(handle).count("removed") == 1


def test_a_model_accelerated_again_works_again():
    fixture, model = public(), public().model()
    for _ in range(2):
        with fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan()):
            assert relative(generate(model, fixture), fixture.flashu["latents"]) < LIMIT
        with fx.accelerate(model):
            assert relative(generate(model, fixture, steps=9), fixture.t2i["latents"]) < LIMIT


def test_an_accelerated_model_still_runs_forward_and_trains():
    fixture, model = public(), public().model()
    tokens = fixture.t2i["text_tokens"]
    expected = model(tokens).logits
    with fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan()):
        assert relative(model(tokens).logits.detach(), expected.detach()) < LIMIT
        with torch.no_grad():
            assert relative(model(tokens).logits, expected.detach()) < LIMIT
        model(tokens).logits.sum().backward()
        assert model.showo.model.layers[0].mlp.up_proj.weight.grad is not None


def test_no_weight_is_stored_twice():
    fixture, model = public(), public().model()
    gc.collect()

    def tensors():
        return sum(
            t.untyped_storage().nbytes()
            for t in {
                id(t.untyped_storage()): t
                for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor) and t.layout == torch.strided
            }.values()
        )

    before = tensors()
    handle = fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan())
    gc.collect()
    summary = handle.summary()
    scores = sum(s.nbytes for s in handle.plan.scores.values())
    assert summary.extra_weight_bytes < 0.01 * summary.weight_bytes
    assert tensors() - before - scores < 0.01 * summary.weight_bytes


class Broken(nn.Module):
    """An FFN without an up projection."""

    def __init__(self, original):
        super().__init__()
        self.gate_proj, self.down_proj = original.gate_proj, original.down_proj


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda f: {"config": f.flashu_config()},
            ValueError,
            r"ffn_prune_ratio is 0.2.*flashu_ext.calibrate",
        ),
        (lambda f: {"config": "paper"}, TypeError, "config: expected a FlashUConfig, got str"),
        (lambda f: {"plan": {}}, TypeError, "plan: expected a TaskPlan, got dict"),
        (
            lambda f: {"config": f.flashu_config(ffn_prune_ratio=0.3), "plan": f.flashu_plan()},
            ValueError,
            r"made for ffn_prune_ratio 0.2, the config says 0.3; use plan.with_ratio\(0.3, 64\)",
        ),
        (
            lambda f: {"config": f.flashu_config(prune_multiple=32), "plan": f.flashu_plan()},
            ValueError,
            r"made for prune_multiple 64, the config says 32; use plan.with_ratio\(0.2, 32\)",
        ),
        (
            lambda f: {"config": f.flashu_config(), "plan": fx.TaskPlan.from_scores(generation=[torch.rand(256)] * 7)},
            ValueError,
            "made for 7 layers of 256 neurons, the model has 8 of 256",
        ),
    ],
)
def test_a_refused_model_is_untouched(arguments, error, message):
    fixture, model = public(), public().model()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        fx.accelerate(model, **arguments(fixture))
    assert dict(model.named_modules()) == modules and handle_of(model) is None


def test_a_plan_of_another_model_is_refused(tmp_path):
    fixture, model = public(), public().model()
    other = fixture.model()
    with torch.no_grad():
        other.showo.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    plan = fx.TaskPlan.from_scores(generation=fixture.flashu_plan().scores["generation"].unbind(), model=other)
    with pytest.raises(ValueError, match="plan: made for another model"):
        fx.accelerate(model, fixture.flashu_config(), plan)
    assert handle_of(model) is None
    plan.save(tmp_path / "plan.safetensors")
    assert fx.TaskPlan.load(tmp_path / "plan.safetensors", model=other).fingerprint == plan.fingerprint
    with pytest.raises(ValueError, match="plan: made for another model"):
        fx.TaskPlan.load(tmp_path / "plan.safetensors", model=model)


def test_other_models_are_refused():
    with pytest.raises(
        TypeError, match=r"model: expected a Show-o2 or JanusFlow or BAGEL model.*got Linear without showo"
    ):
        fx.accelerate(nn.Linear(2, 2))
    model = public().model()
    model.showo.model.layers[3].mlp = Broken(model.showo.model.layers[3].mlp)
    with pytest.raises(TypeError, match=r"without showo.model.layers.3.mlp.up_proj"):
        fx.accelerate(model)
    model = public().model()
    with fx.accelerate(model), pytest.raises(RuntimeError, match="already accelerated"):
        fx.accelerate(model)


def test_a_failed_accelerate_changes_nothing(monkeypatch):
    fixture, model = public(), public().model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    calls = []
    real = FfnOrder._complete

    def failing(order):
        calls.append(order)
        if len(calls) == 4:
            raise MemoryError("no room")
        real(order)

    monkeypatch.setattr(FfnOrder, "_complete", failing)
    with pytest.raises(MemoryError, match="no room"):
        fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan())
    assert dict(model.named_modules()) == modules and handle_of(model) is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_wrong_call_does_not_disturb_the_next():
    fixture, model = public(), public().model()
    with fx.accelerate(model, fixture.flashu_config(), fixture.flashu_plan()):
        expected = generate(model, fixture)
        bad = copy.copy(fixture.sample_inputs)
        bad["text_tokens"] = bad["text_tokens"] + 1000
        with pytest.raises(IndexError):
            fx.showo2.sample(model, **bad)
        with pytest.raises(RuntimeError, match="stop here"):
            generate(model, fixture, callback=lambda step, latents: (_ for _ in ()).throw(RuntimeError("stop here")))
        assert torch.equal(generate(model, fixture), expected)


def test_reasons_are_told_once_with_how_many_modules_have_them() -> None:
    model = small_model()
    for layer in model.showo.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: out)
    with fx.accelerate(model) as handle:
        text = str(handle.summary())
    (line,) = [each for each in text.split("fallbacks")[1].splitlines() if "hook" in each]
    assert line.startswith(f"  model.showo.model.layers.0.mlp and {len(model.showo.model.layers) - 1} more: ")


def test_a_plan_that_is_not_used_is_said_so() -> None:
    model = small_model()
    with fx.accelerate(model, fx.FlashUConfig.exact(), plan()) as handle:
        summary = handle.summary()
        assert summary.plan_unused and "not used, the config prunes nothing" in str(summary) and not summary.fallbacks
    for config, given in ((fx.FlashUConfig.exact(), None), (PRUNED, plan())):
        with fx.accelerate(model, config, given) as handle:
            assert not handle.summary().plan_unused and "not used" not in str(handle.summary())
