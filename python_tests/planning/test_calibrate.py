"""Tests of calibration: every estimator against plain torch, tasks by name, streams, interruption, refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calibration import TIMES, generation_samples, questions, run, same
from support.conformance import public

import flashu_ext as fx
from flashu_ext.models.masks import omni_allowed
from flashu_ext.models.showo2.understanding import prompt_embeds
from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.planning.estimators import ESTIMATORS, DownNorms, NeuronSums


class Watched:
    """Records what the model's parts receive while the block runs: FFN activations and latents."""

    def __init__(self, model):
        self.model = model
        self.latents, self.hidden = [], [[] for _ in model.showo.model.layers]

    def __enter__(self):
        layers = self.model.showo.model.layers
        self.hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _m, a, kept=kept: kept.append(a[0].double()))
            for layer, kept in zip(layers, self.hidden, strict=True)
        ]
        self.hooks.append(
            self.model.image_embedder_gen.register_forward_pre_hook(lambda _m, a: self.latents.append(a[0].clone()))
        )
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@cache
def double_model():
    return public().model().double()


@torch.no_grad()
def oracle(latents_seen):
    """Activations [tokens, intermediate] fp64 per layer of both tasks, by the model's own methods, without code of calibrate.

    Also layer importance: generation [times, layers], understanding at the last prompt token and as a mean over tokens.
    """
    model = double_model()
    seen = {
        "generation": [[] for _ in model.showo.model.layers],
        "understanding": [[] for _ in model.showo.model.layers],
    }
    importance = []
    latents = iter(latents_seen)
    for sample in generation_samples():
        tokens = torch.cat([sample.text_tokens, sample.text_tokens_null])
        positions = torch.cat([sample.modality_positions, sample.modality_positions_null])
        ends = positions[:, 0].sum(-1)
        for t in TIMES:
            noised = next(latents).double().repeat(2, 1, 1, 1)
            time = torch.full((2,), t)
            with Watched(model) as watched:
                model.t2i_generate(noised, time, tokens, None, positions, guidance_scale=4.0)
            for kept, (hidden,) in zip(seen["generation"], watched.hidden, strict=True):
                kept += [hidden[row, :end] for row, end in enumerate(ends)]
            embeds, _ = model.embed_sequence(tokens, noised, time, positions)
            mask = model.omni_mask(positions, tokens.shape[1])
            states = model.showo.model(
                inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True
            ).hidden_states
            distances = cosine_distances(states)
            importance.append(
                torch.stack([torch.cat([x[r, :e] for r, e in enumerate(ends)]).mean() for x in distances])
            )
    last, mean = [], []
    for sample in questions():
        embeds, allowed = prompt_embeds(
            model, sample.image_latents.double(), sample.tokens_before_image, sample.tokens_after_boi
        )
        mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill_(~allowed, torch.finfo(torch.float64).min)
        with Watched(model) as watched:
            states = model.showo.model(
                inputs_embeds=embeds, attention_mask=mask[None, None], output_hidden_states=True
            ).hidden_states
        for kept, (hidden,) in zip(seen["understanding"], watched.hidden, strict=True):
            kept.append(hidden[0])
        distances = cosine_distances(states)
        last.append(torch.stack([x[0, -4] for x in distances]))
        mean.append(torch.stack([x.mean() for x in distances]))
    activations = {task: [torch.cat(kept) for kept in layers] for task, layers in seen.items()}
    by_time = torch.stack(importance).view(2, len(TIMES), -1).mean(0)
    return (
        activations,
        {"generation": by_time, "understanding": torch.stack(last).mean(0)[None]},
        torch.stack(mean).mean(0),
    )


def cosine_distances(states):
    """1 - cosine between neighbouring hidden states; transformers gives the last one after the final norm."""
    return [1 - torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(states)]


@cache
def calibrated():
    """The small model's plan, and the latents it was calibrated with."""
    model = public().model()
    with Watched(model) as watched:
        plan = run(model, list(generation_samples()), list(questions()))
    return plan, watched.latents[: 2 * len(TIMES)]


# ---- scores


PLAIN = {
    "wanda": lambda h, w: w.abs().sum(0) * h.norm(dim=0),
    "flap": lambda h, w: h.var(dim=0) * w.square().sum(0),
    "reconstruction": lambda h, w: h.square().sum(0) * w.square().sum(0),
}


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("task", ["generation", "understanding"])
def test_scores_equal_plain_torch(task, estimator):
    plan, latents = calibrated()
    activations, _, _ = oracle(latents)
    scores = plan.with_estimator(estimator).scores[task]
    for layer, hidden in enumerate(activations[task]):
        assert plan.calibration.sums[task].tokens == hidden.shape[0]
        expected = PLAIN[estimator](hidden, double_model().showo.model.layers[layer].mlp.down_proj.weight.detach())
        torch.testing.assert_close(scores[layer].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_reconstruction_is_the_error_of_leaving_a_neuron_out():
    plan, latents = calibrated()
    activations, _, _ = oracle(latents)
    scores = plan.with_estimator("reconstruction").scores
    for task, layer in (("generation", 0), ("understanding", 5)):
        hidden = activations[task][layer]
        down = double_model().showo.model.layers[layer].mlp.down_proj
        with torch.no_grad():
            whole = down(hidden)
            for neuron in (0, 17, 255):
                without = hidden.clone()
                without[:, neuron] = 0
                error = (down(without) - whole).square().sum()
                torch.testing.assert_close(scores[task][layer, neuron].double(), error, rtol=1e-4, atol=1e-9)


def test_layer_importance_equals_plain_torch():
    plan, latents = calibrated()
    _, importance, mean = oracle(latents)
    layers = len(mean)
    assert plan.layer_importance["generation"].shape == (len(TIMES), layers) and plan.times == TIMES
    assert plan.layer_importance["understanding"].shape == (1, layers)
    for task, expected in importance.items():
        torch.testing.assert_close(plan.layer_importance[task].double(), expected, rtol=1e-4, atol=1e-6)
    got = plan.calibration.mean_layer_importance
    assert set(got) == {"understanding"}
    torch.testing.assert_close(got["understanding"].double(), mean, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.floats(-1e3, 1e3), st.integers(0, 2**31))
def test_variance_survives_a_large_mean(tokens, mean, seed):
    h = mean + torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h[:, 2] = mean  # a constant neuron has variance 0, never a negative one
    sums = NeuronSums(tokens, h.sum(0)[None], h.square().sum(0)[None])
    assert (sums.variance >= 0).all()
    torch.testing.assert_close(sums.variance[0], h.var(dim=0), rtol=1e-6, atol=1e-6)
    zeroed = DownNorms(torch.ones(1, 3), torch.zeros(1, 3))
    assert (ESTIMATORS["flap"](sums, zeroed) == 0).all()


def test_noise_depends_on_task_sample_and_time_only():
    model = public().model()
    sample = next(iter(generation_samples()))

    def noise(seed, **tasks):
        with Watched(model) as watched:
            run(model, seed=seed, tasks=tasks)
        return [(x - t * sample.latents) / (1 - t) for x, t in zip(watched.latents, TIMES * 9, strict=False)]

    first = noise(0, generation=[sample, sample], other=[sample])
    assert len(first) == 6 and all(abs(float(x.std()) - 1) < 0.1 and abs(float(x.mean())) < 0.1 for x in first)
    distinct = [*first, *noise(1, generation=[sample])]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(distinct) for b in distinct[:i])
    for a, b in zip(noise(0, other=[sample], generation=[sample]), [*first[4:], *first[:2]], strict=True):
        assert torch.equal(a, b)


def test_a_run_is_deterministic_and_leaves_the_model_alone():
    model = public().model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = run(model, list(generation_samples()), list(questions()))
    assert same(calibrated()[0], again)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- tasks, streams


@cache
def three_tasks():
    """Two tasks and a third one by name, of images too."""
    model = public().model()
    return run(model, generation_samples(), questions(), tasks={"inpainting": generation_samples(3, seed=9)}, ratio=0.3)


def zeroed_ffn(mlp, kept, x):
    """The dense FFN with all other neurons zeroed."""
    hidden = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    silenced = torch.zeros_like(hidden)
    silenced[..., kept] = hidden[..., kept]
    return mlp.down_proj(silenced)


@pytest.mark.parametrize("adaptive", [False, True])
@torch.no_grad()
def test_three_tasks_through_an_accelerated_model(tmp_path, adaptive):
    model, plan = public().model(), three_tasks()
    assert plan.tasks == ("generation", "understanding", "inpainting")
    if adaptive:
        plan = plan.with_adaptive_ratios()
        assert len(set(plan.kept_counts)) > 1
    plan.save(tmp_path / "plan.safetensors")
    plan = fx.TaskPlan.load(tmp_path / "plan.safetensors", model=model)
    layouts = plan.layouts()
    assert all(len(layout.runs["generation"]) == len(layout.runs["understanding"]) == 1 for layout in layouts)
    assert max(len(layout.runs["inpainting"]) for layout in layouts) > 1
    layers = model.showo.model.layers
    x = torch.randn(3, 7, layers[0].mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    expected = {
        (task, n): zeroed_ffn(layer.mlp, plan.kept(task, n), x) for task in plan.tasks for n, layer in enumerate(layers)
    }
    config = fx.FlashUConfig(ffn_prune_ratio=plan.ratio, prune_multiple=16)
    with fx.accelerate(model, config, plan) as handle:
        for (task, n), value in expected.items():
            ffn = handle.runner.network.layers[n].ffn
            torch.testing.assert_close(ffn(x, task), value, rtol=1e-4, atol=1e-5)
            assert sum(length for _, length in layouts[n].runs[task]) == plan.kept_counts[n]
        assert handle.summary().neurons == dict.fromkeys(plan.tasks, plan.kept_neurons)


@torch.no_grad()
def test_layer_ratios_equal_a_dense_model_with_those_neurons_zeroed():
    ratios = [0.1, 0.5, 0.3, 0.25, 0.0, 0.6, 0.2, 0.4]
    plan = calibrated()[0].with_ratios(ratios)
    assert plan.kept_counts == (224, 128, 176, 192, 256, 96, 192, 144)
    assert plan.ratio == 0.29375 and plan.kept_neurons == 176
    inputs, asked = public().sample_inputs, public().answer_inputs

    def silenced(task):
        model = public().model()
        for n, layer in enumerate(model.showo.model.layers):
            out = torch.ones(256, dtype=torch.bool)
            out[plan.kept(task, n)] = False
            layer.mlp.down_proj.weight[:, out] = 0
        return model

    generated = fx.showo2.sample(silenced("generation"), **inputs, steps=4)
    answered = fx.showo2.answer_tokens(silenced("understanding"), **asked)
    model = public().model()
    with fx.accelerate(model, fx.FlashUConfig(ffn_prune_ratio=plan.ratio, prune_multiple=16), plan):
        torch.testing.assert_close(fx.showo2.sample(model, **inputs, steps=4), generated, rtol=1e-3, atol=1e-4)
        assert torch.equal(fx.showo2.answer_tokens(model, **asked), answered)


def test_samples_are_read_one_at_a_time():
    made = []

    def stream():
        for n, sample in enumerate(generation_samples(3)):
            made.append(n)
            yield sample

    model = public().model()
    seen = []
    hook = model.image_embedder_gen.register_forward_pre_hook(lambda *_: seen.append(len(made)))
    streamed = run(model, stream())
    hook.remove()
    assert seen == [1] * 2 + [2] * 2 + [3] * 2  # samples are made one at a time
    assert same(streamed, run(model, list(generation_samples(3))))
    assert streamed.tasks == ("generation",) and streamed.notes == {"samples": {"generation": 3}, "seed": 0}


# ---- refusals


def changed(sample, **fields):
    return [dataclasses.replace(sample, **fields)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: {}, ValueError, "expected samples of at least one task, got none"),
        (lambda: {"generation": iter(())}, ValueError, "generation: expected at least one sample, got none"),
        (
            lambda: {"generation": generation_samples(1), "tasks": {"x": []}},
            ValueError,
            "x: expected at least one sample, got none",
        ),
        (lambda: {"generation": 3}, TypeError, "generation: expected an iterable of samples, got int"),
        (
            lambda: {"generation": questions()},
            TypeError,
            r"generation\[0\]: expected a GenerationSample, got Understand",
        ),
        (
            lambda: {"tasks": {"both": [*generation_samples(1), *questions(1)]}},
            TypeError,
            r"both\[1\]: expected a GenerationSample, got UnderstandingSample",
        ),
        (
            lambda: {"tasks": {"x": [1]}},
            TypeError,
            r"x\[0\]: expected a GenerationSample or UnderstandingSample or TokenSample, got int",
        ),
        (lambda: {"tasks": {"": []}}, ValueError, "tasks: expected names, got ''"),
        (
            lambda: {"generation": generation_samples(), "tasks": {"generation": generation_samples()}},
            ValueError,
            "tasks: 'generation' is given twice",
        ),
        (lambda: {"generation": generation_samples(), "times": (0.5, 1.5)}, ValueError, r"times: .* got \[0.5, 1.5\]"),
        (lambda: {"generation": generation_samples(), "times": (True,)}, ValueError, r"times: .* got \[True\]"),
        (lambda: {"generation": generation_samples(), "times": ()}, ValueError, "times: expected at least one"),
        (
            lambda: {"generation": generation_samples(), "estimator": "magic"},
            ValueError,
            "estimator: expected one of wanda, flap",
        ),
        (
            lambda: {"generation": generation_samples(), "ratio": 1.0},
            ValueError,
            r"ratio: expected a number in \[0, 1\)",
        ),
        (lambda: {"generation": generation_samples(), "multiple": 0}, ValueError, "multiple: expected an integer >= 1"),
        (lambda: {"generation": generation_samples(), "seed": -1}, ValueError, "seed: expected an integer >= 0"),
        (
            lambda: {"generation": generation_samples(), "checkpoint_interval": 0},
            ValueError,
            "checkpoint_interval: expected",
        ),
        (
            lambda: {"generation": generation_samples(), "checkpoint": "/no/such/x"},
            FileNotFoundError,
            "checkpoint: expected a file",
        ),
        (
            lambda: {"generation": changed(next(generation_samples()), latents=torch.zeros(1, 16, 5, 12))},
            ValueError,
            r"generation\[0\]: image_latents: expected",
        ),
        (
            lambda: {"generation": changed(next(generation_samples()), text_tokens=[1])},
            TypeError,
            r"generation\[0\].text_tokens: expected a tensor, got list",
        ),
        (
            lambda: {"understanding": changed(next(questions()), answer_length=99)},
            ValueError,
            r"understanding\[0\]: answer_length: expected an integer in \[0, ",
        ),
        (
            lambda: {
                "generation": changed(next(generation_samples()), latents=torch.full((1, 16, 12, 12), float("nan")))
            },
            ValueError,
            r"generation: activations: total: expected finite numbers, got nan at \[0, 0\]",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    model = public().model()
    with pytest.raises(error, match=message):
        run(model, **arguments())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_projection_without_weights_is_named():
    model = public().model()
    ffn = model.showo.model.layers[1].mlp
    ffn.down_proj = torch.nn.Sequential(ffn.down_proj)
    with pytest.raises(TypeError, match=r"without layers\.1\.mlp\.down_proj\.weight"):
        run(model, generation=generation_samples())


def test_an_accelerated_model_is_refused():
    model = public().model()
    with fx.accelerate(model), pytest.raises(RuntimeError, match="expected a model that is not accelerated"):
        run(model, generation_samples())


# ---- other dtypes


def test_half_precision_finds_nearly_the_same_neurons():
    model = public().model().bfloat16()
    plan = run(model, generation_samples(), questions())
    for task in plan.tasks:
        for layer in range(plan.layers):
            shared = set(plan.kept(task, layer).tolist()) & set(calibrated()[0].kept(task, layer).tolist())
            assert len(shared) >= 0.9 * plan.kept_neurons


# ---- the embedded model


def test_the_shipped_plan_is_found_again_from_other_samples():
    from flashu_ext.nano.calibrate import samples

    model = load_model()
    shipped = load_plan(model)
    assert shipped.calibration is not None and set(shipped.layer_importance) == {"generation", "understanding"}
    plan = fx.calibrate(model, *samples(20, 3), multiple=16, progress=False)
    for task in shipped.tasks:
        for layer in range(shipped.layers):
            shared = set(plan.kept(task, layer).tolist()) & set(shipped.kept(task, layer).tolist())
            assert len(shared) >= 0.95 * shipped.kept_neurons  # other samples, noise and time: nearly the same neurons


def test_a_preset_takes_a_plan_with_ratios_of_its_own_as_it_is():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    plan = load_plan(pipe.model).with_ratios([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    config, taken = pipe.preset("paper", plan)
    assert taken is plan and (config.ffn_prune_ratio, config.prune_multiple) == (0.35, 16)
    with fx.accelerate(pipe.model, config, taken) as handle:
        assert handle.summary().neurons["generation"] == plan.kept_neurons


IMPORT_ORDER = """
import flashu_ext as fx
from flashu_ext.calibration.calibrate import GenerationSample
try:
    fx.calibrate(None)
except TypeError as error:
    assert "expected a model of a known family" in str(error), error
"""


def test_the_function_survives_an_import_of_its_module():
    subprocess.run([sys.executable, "-c", IMPORT_ORDER], check=True, timeout=120)


def test_omni_mask_hides_tokens_that_are_not_computed():
    """`calibrate` drops the tail: no counted token attends to it."""
    sample = next(iter(generation_samples()))
    end = int(sample.modality_positions[0, 0].sum())
    assert not omni_allowed(sample.modality_positions, sample.text_tokens.shape[1])[0, :end, end:].any()
