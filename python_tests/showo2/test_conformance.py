"""The dense model compared with outputs of the unmodified upstream programs."""

import pytest
import torch
from support.conformance import public, relative

import flashu_ext as fx
from flashu_ext.models.showo2.sampling import time_grid
from flashu_ext.models.showo2.understanding import prompt_embeds

LIMIT = 1e-4


def test_every_velocity_and_the_final_latents():
    fixture = public()
    latents, velocity = fx.showo2.sample(
        fixture.model(), **fixture.sample_inputs, steps=fixture.spec["num_steps"], return_velocity=True
    )
    assert velocity.shape == fixture.t2i["velocity"].shape
    for got, expected in zip(velocity, fixture.t2i["velocity"], strict=True):
        assert relative(got, expected) < LIMIT
    assert relative(latents, fixture.t2i["latents"]) < LIMIT


def test_time_grid():
    fixture = public()
    times = time_grid(fixture.spec["num_steps"], fixture.spec["time_shifting_factor"])
    assert torch.allclose(times[:-1], fixture.t2i["timesteps"])
    for no_shift in (None, 0, 0.0):
        assert torch.equal(time_grid(5, no_shift), torch.linspace(0, 1, 5))


def test_answers_and_their_embeddings():
    fixture, model = public(), public().model()
    inputs = fixture.answer_inputs
    embeds, allowed = prompt_embeds(
        model, inputs["image_latents"], inputs["tokens_before_image"], inputs["tokens_after_boi"]
    )
    assert relative(embeds.detach(), fixture.mmu["input_embeds"]) < LIMIT
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    logits = model.showo.lm_head(model.backbone(embeds, mask[None, None])[:, -1]).detach()
    assert relative(logits, fixture.mmu["first_logits"]) < LIMIT
    assert torch.equal(fx.showo2.answer_tokens(model, **inputs), fixture.mmu["output_tokens"])


def test_the_span_of_an_answer_starts_one_token_late():
    """A span that covers the time token changes the answer, so the offset is not an accident."""
    fixture, model = public(), public().model()
    inputs = fixture.answer_inputs
    _, allowed = prompt_embeds(
        model, inputs["image_latents"], inputs["tokens_before_image"], inputs["tokens_after_boi"]
    )
    time = inputs["tokens_before_image"].shape[1] + 1
    eoi = time + 37
    assert not allowed[time, time + 1]
    assert allowed[time + 1, eoi] and not allowed[time + 1, eoi + 1]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("noise", lambda x: x[:0], ValueError, "noise: expected at least one image"),
        ("noise", lambda x: x[:, :3], ValueError, r"noise: expected \[batch, 16, H, W\]"),
        ("noise", lambda x: x[:, :, :10, :10], ValueError, "noise: expected 36 patches"),
        ("noise", lambda x: x.long(), TypeError, "noise: expected a floating-point tensor"),
        ("noise", lambda x: None, TypeError, "noise: expected a tensor, got NoneType"),
        ("noise", lambda x: x.to("meta"), ValueError, "noise: expected a tensor on cpu"),
        ("text_tokens", lambda x: x.float(), TypeError, "text_tokens: expected int64"),
        ("text_tokens", lambda x: x[:1], ValueError, "text_tokens: expected 2 rows, got 1"),
        ("text_tokens", lambda x: x + 320, IndexError, r"text_tokens: expected token ids in \[0, 320\), got"),
        ("text_tokens_null", lambda x: x[:, :-1], ValueError, "text_tokens_null: expected shape"),
        ("text_tokens_null", lambda x: None, ValueError, "text_tokens_null.*got None"),
        ("modality_positions", lambda x: x + torch.tensor([30, 0]), IndexError, "outside the sequence"),
        ("modality_positions", lambda x: x + torch.tensor([0, 1]), ValueError, "expected a span of 37 tokens"),
        ("modality_positions", lambda x: x.repeat(1, 2, 1), ValueError, "one \\(offset, length\\) a row"),
        ("guidance_scale", lambda x: -1.0, ValueError, "guidance_scale: expected a finite number >= 0"),
        ("guidance_scale", lambda x: float("nan"), ValueError, "guidance_scale"),
        ("time_shifting_factor", lambda x: float("inf"), ValueError, "time_shifting_factor"),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_bad_inputs_are_named(name, change, error, message, accelerated):
    fixture, model = public(), public().model()
    if accelerated:
        fx.accelerate(model)
    inputs = fixture.sample_inputs
    with pytest.raises(error, match=message):
        fx.showo2.sample(model, **{**inputs, name: change(inputs[name])}, steps=3)
    assert fx.showo2.sample(model, **inputs, steps=3).isfinite().all()


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_odd_number_of_guided_rows_is_named(accelerated):
    fixture, model = public(), public().model()
    if accelerated:
        fx.accelerate(model)
    inputs = fixture.sample_inputs
    three = {name: inputs[name][[0, 1, 0]] for name in ("text_tokens", "modality_positions")}
    call = {"image_latents": inputs["noise"][[0, 1, 0]], "t": torch.full((3,), 0.5), **three}
    with pytest.raises(ValueError, match="image_latents: expected an even number of rows under guidance, got 3"):
        model.t2i_generate(**call, guidance_scale=3.0)
    assert model.t2i_generate(**call).isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("image_latents", lambda x: x.repeat(2, 1, 1, 1), ValueError, "image_latents: expected one image, got 2"),
        ("tokens_after_boi", lambda x: x[:, :1], ValueError, "expected boi, eoi and a question"),
        ("tokens_after_boi", lambda x: x - 100, IndexError, "tokens_after_boi: expected token ids"),
        ("tokens_before_image", lambda x: x[0], ValueError, "tokens_before_image: expected 2 dimensions"),
        ("max_new_tokens", lambda x: -1, ValueError, "max_new_tokens: expected an integer >= 0"),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_bad_questions_are_named(name, change, error, message, accelerated):
    fixture, model = public(), public().model()
    if accelerated:
        fx.accelerate(model)
    inputs = fixture.answer_inputs
    with pytest.raises(error, match=message):
        fx.showo2.answer_tokens(model, **{**inputs, name: change(inputs[name])})
    assert torch.equal(fx.showo2.answer_tokens(model, **inputs), fixture.mmu["output_tokens"])
