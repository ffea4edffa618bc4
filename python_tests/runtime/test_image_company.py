"""An image's bits do not depend on its company: the batch, the order, threads, what was drawn before, and when others began."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from flashu_ext.showo2 import ImageRequest

import flashu_ext as fx

STEPS = 7
PROMPTS = (
    "a red circle",
    "a blue square above a green triangle",
    "a green triangle on the left",
    "two yellow circles",
    "",
    "a small blue circle below a red square",
    "a square",
    "a circle",
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


ALL = fx.FlashUConfig(
    token_skip=True,
    token_skip_ratio=0.5,
    token_skip_interval=3,
    token_skip_forecast=True,
    layer_skip_ratio=0.3,
    layer_skip_interval=4,
    adaptive_cache=True,
    adaptive_cache_budget=0.3,
    head_residual_reuse=True,
    head_forecast_order=1,
    encoder_cache=True,
    guidance=[(3, 2.0), (2, 1.0)],
    skip_unit_guidance=True,
)
"""Whatever can make images of a batch differ in what they compute."""


@pytest.fixture(params=["exact", "paper", "fast", "all of it"], scope="module")
def drawn(request):
    """A pipeline under a preset, and every prompt's latents alone."""
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    with pipe.accelerate(*((ALL, None) if request.param == "all of it" else pipe.preset(request.param))):
        torch.set_num_threads(2)
        yield pipe, [latents(pipe, [index])[0] for index in range(len(PROMPTS))]


def latents(pipe, indices, **changes):
    return fx.showo2.sample(
        pipe.model,
        pipe.noise(indices),
        **pipe.prompt_tokens([PROMPTS[index] for index in indices]),
        **{"steps": STEPS, "guidance_scale": 3.0, "time_shifting_factor": pipe.time_shifting_factor, **changes},
    )


@pytest.mark.parametrize("batch", [(0, 1, 2, 3, 4, 5, 6, 7), (7, 3, 1), (5, 0), (2, 2, 4)])
def test_in_any_batch_and_order(drawn, batch):
    pipe, alone = drawn
    for index, got in zip(batch, latents(pipe, batch), strict=True):
        assert torch.equal(got, alone[index])


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_on_any_number_of_threads(drawn, threads):
    pipe, alone = drawn
    torch.set_num_threads(threads)
    for index, got in zip((1, 4), latents(pipe, (1, 4)), strict=True):
        assert torch.equal(got, alone[index])


def test_guidance_scales_of_their_own(drawn):
    pipe, alone = drawn
    together = latents(pipe, (0, 1), guidance_scale=[3.0, 5.0])
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], latents(pipe, (1,), guidance_scale=5.0)[0])


def test_upstream_s_sampler_in_any_batch(drawn):
    pipe, _ = drawn
    noise = pipe.noise([3, 4])

    def velocities(rows):
        tokens = pipe.prompt_tokens([PROMPTS[row] for row in rows])
        text = torch.cat([tokens["text_tokens"], tokens["text_tokens_null"]])
        positions = torch.cat([tokens["modality_positions"], tokens["modality_positions_null"]])
        x = torch.cat([noise[: len(rows)]] * 2)
        out = []
        for t in (0.0, 0.3):
            v = pipe.model.t2i_generate(
                image_latents=x,
                t=torch.full((len(x),), t),
                text_tokens=text,
                attention_mask=None,
                modality_positions=positions,
                max_seq_len=text.shape[1],
                guidance_scale=3.0,
            )
            out.append(v[: len(rows)])
            x = x + 0.3 * v
        return torch.stack(out)

    assert torch.equal(velocities((2, 5))[:, :1], velocities((2,)))


def requests(config, drawing):
    """Different prompts, step counts, guidance, sizes and presets."""
    presets = [None, config.replace(head=None), config.replace(layers=None)]
    return [
        ImageRequest(
            drawing.choice(PROMPTS),
            seed=drawing.randrange(9),
            steps=drawing.choice([None, None, config.steps or STEPS]) if config.approximates else drawing.randint(3, 9),
            guidance_scale=drawing.choice([0, 2.0, 5.0]),
            preset=drawing.choice(presets),
        )
        for _ in range(6)
    ]


@pytest.fixture(params=["exact", "fast"])
def pipeline(request):
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    config, plan = pipe.preset(request.param)
    with pipe.accelerate(config.replace(steps=9), plan):
        yield pipe


@pytest.mark.parametrize("seed", range(3))
def test_images_that_began_at_different_times(pipeline, seed):
    """Random arrivals, cancellations and failures: every other image is what it is alone."""
    drawing = random.Random(seed)
    config = pipeline.model._flashu_handle.config
    asked = requests(config, drawing)
    alone = [next(pipeline.generate_many([request])).latents for request in asked]
    failing, cancelled = drawing.sample(range(len(asked)), 2)

    def fail(step, _):
        if step == 2:
            raise ZeroDivisionError("of the caller's")

    many = pipeline.generate_many(at_once=4)
    waiting = list(enumerate(asked))
    results = {}
    while waiting or many.in_progress or len(results) < len(asked) - 1:
        if waiting and drawing.random() < 0.5:
            index, request = waiting.pop(0)
            given = dataclasses.replace(request, on_step=fail) if index == failing else request
            assert many.add(given) == index
        if cancelled in many.in_progress:
            many.cancel(cancelled)
        for result in many.step():
            results[result.index] = result
    assert set(results) == set(range(len(asked))) - {cancelled}
    for index, result in results.items():
        if index == failing:
            assert isinstance(result.error, ZeroDivisionError)
        else:
            assert result.error is None and torch.equal(result.latents, alone[index])


def test_wrong_requests_end_alone(pipeline):
    good = ImageRequest("a red circle", steps=None)
    wrong = [{"prompt": 3}, {"prompt": "x", "seed": -1}, {"promt": "x"}, {"prompt": "x", "preset": "none such"}, 5]
    results = {result.index: result for result in pipeline.generate_many([good, *wrong, good])}
    assert all(isinstance(results[index].error, (TypeError, ValueError)) for index in range(1, 6))
    assert torch.equal(results[0].latents, results[6].latents)


def test_a_config_that_needs_other_weights_is_refused(pipeline):
    config = pipeline.model._flashu_handle.config
    other = config.replace(ffn=fx.FfnPruning(0.9, 16))
    (result,) = pipeline.generate_many([ImageRequest("a circle", preset=other)])
    assert isinstance(result.error, ValueError) and "preset" in str(result.error)


def test_a_dense_model_draws_many():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    asked = [ImageRequest(prompt, seed=index, steps=4) for index, prompt in enumerate(PROMPTS[:3])]
    for result in pipe.generate_many(asked, at_once=2):
        assert torch.equal(
            result.latents, latents(pipe, [result.index], steps=4, guidance_scale=pipe.guidance_scale)[0]
        )


def test_a_removed_handle_ends_its_images():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    handle = pipe.accelerate()
    many = pipe.generate_many(["a circle"])
    assert not many.step()
    handle.remove()
    (result,) = many
    assert isinstance(result.error, RuntimeError)


def test_requests_are_read_when_there_is_room(pipeline):
    read = []

    def stream():
        for index in range(5):
            read.append(index)
            yield ImageRequest(
                "a circle", seed=index, steps=3 if not pipeline.model._flashu_handle.config.approximates else None
            )

    many = pipeline.generate_many(stream(), at_once=2)
    many.step()
    assert read == [0, 1]
    assert sorted(result.index for result in many) == list(range(5))
