"""What callers of any family's pipeline give: NumPy's numbers, odd pictures, odd texts, and numbers that lead beyond a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flashu_ext as fx
from flashu_ext.models.decoding import TokenSampler
from flashu_ext.models.pictures import picture, rgb
from flashu_ext.nano.subject import FAMILIES

PROMPT, QUESTION, STEPS = "a red circle above a blue square", "what color is the circle ?", 3


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return fx.load_pipeline("nano", family=request.param)


def test_numbers_of_numpy_are_numbers(pipe: Any) -> None:
    plain = pipe.generate_batch([PROMPT, "a circle"], [1, 2], STEPS, [2.0, 3.0])
    same = pipe.generate_batch([PROMPT, "a circle"], np.array([1, 2]), np.int64(STEPS), np.array([2.0, 3.0]))
    assert [image.tobytes() for image in same] == [image.tobytes() for image in plain]
    (one,) = pipe.generate_batch([PROMPT], [1], STEPS, 2.5)
    (same,) = pipe.generate_batch([PROMPT], [np.int64(1)], np.int32(STEPS), np.float32(2.5))
    assert same.tobytes() == one.tobytes()
    sampling = {"temperature": 2.0, "top_k": 3, "top_p": 0.5, "seed": 3}
    numbers = {"temperature": np.float32(2), "top_k": np.int64(3), "top_p": np.float32(0.5), "seed": np.int64(3)}
    assert pipe.answer(one, QUESTION, np.int64(4), **numbers) == pipe.answer(one, QUESTION, 4, **sampling)
    for wrong in (True, np.float64(3), "3"):
        with pytest.raises(ValueError, match="steps: expected an integer in "):
            pipe.generate(PROMPT, 1, wrong)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_drawing_that_is_not_finite_is_an_error(pipe: Any, accelerated: bool) -> None:
    with pipe.accelerate() if accelerated else torch.no_grad():
        with pytest.raises(FloatingPointError, match="latents: expected finite numbers, got NaN or Infinity"):
            pipe.generate_batch([PROMPT], [1], STEPS, 1e38)
        far, near = pipe.generate_many([{"prompt": PROMPT, "steps": STEPS, "guidance_scale": s} for s in (1e38, 2.0)])
        assert isinstance(far.error, FloatingPointError) and near.error is None


def test_an_image_that_is_not_finite_is_an_error(pipe: Any) -> None:
    """As a VAE in half precision makes of latents that are."""

    class Overflowing:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.full((1, 3, 48, 48), torch.nan)

    with pytest.raises(FloatingPointError, match="image: expected finite numbers"):
        own = pipe.__copy__()
        own.codec = Overflowing()
        own.pictures(torch.zeros(1, *pipe.latent_shape()))


def test_texts_that_no_tokenizer_reads_are_named(pipe: Any) -> None:
    picture, half = Image.new("RGB", (48, 48)), "a red \ud83d circle"
    for name, call in (
        ("prompt", lambda: pipe.generate(half, 0, STEPS)),
        (r"prompts\[1\]", lambda: pipe.generate_batch([PROMPT, half], [0, 1], STEPS)),
        ("question", lambda: pipe.answer(picture, half)),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected text, got half of a surrogate pair at 6"):
            call()
    for prompts in (np.array([PROMPT]), (each for each in [PROMPT]), PROMPT, []):
        with pytest.raises(ValueError, match="prompts: expected a non-empty list of strings"):
            pipe.generate_batch(prompts, [0], STEPS)


def test_arguments_are_checked_without_questions_too(pipe: Any) -> None:
    image = Image.new("RGB", (48, 48))
    assert pipe.answer_batch([], []) == pipe.answer_batch([image], []) == []
    for name, error, arguments, options in (
        ("max_new_tokens", ValueError, ([], [], -1), {}),
        ("temperature", ValueError, ([], []), {"temperature": -1}),
        (r"images\[0\]", TypeError, (["x"], []), {}),
        ("seeds", ValueError, ([image], []), {"seeds": [1]}),
    ):
        with pytest.raises(error, match=f"{name}: expected"):
            pipe.answer_batch(*arguments, **options)


def test_a_size_that_the_codec_has_not_is_named(pipe: Any) -> None:
    for size in (24, 16, (8, 48)):
        with pytest.raises(ValueError, match="size: expected 48"):
            pipe.generate(PROMPT, 0, STEPS, size=size)


# ---- pictures


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_pictures_of_16_bits_keep_their_upper_8(mode: str) -> None:
    values = np.array([[0, 255, 256, 511, 512, 32768, 65535]], np.uint16)
    raw = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (values.size, 1), raw)
    for made in (rgb(image, "image"), picture(image)):
        assert np.asarray(made)[0].tolist() == [[each >> 8] * 3 for each in values[0].tolist()]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_whose_range_is_unknown_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"image: .*expected 8 or 16 bits a channel, got mode {mode}"):
        rgb(Image.new(mode, (4, 4)), "image")


# ---- sampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-300])
def test_a_temperature_near_0_takes_the_most_likely(dtype: torch.dtype, temperature: float) -> None:
    logits = torch.tensor([[1.0, 30.0, 29.0, -1e4], [-3.0, -2.0, -70.0, -1.0]], dtype=dtype)
    assert TokenSampler(temperature)(logits, [0, 1]).tolist() == [[1], [3]]
    assert TokenSampler(temperature, top_k=2, top_p=0.9)(logits, [0, 1]).tolist() == [[1], [3]]


def test_other_temperatures_divide_the_logits_bit_for_bit() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 20
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(TokenSampler(0.7).filtered(logits.to(dtype)), logits.to(dtype) / 0.7)
