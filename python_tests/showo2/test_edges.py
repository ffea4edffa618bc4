"""Edge cases of a pipeline: long prompts, tall pictures, pixels between two values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from flashu_ext.models.folders import load_pipeline


class Recorded:
    """An image codec that records its input and decodes every latent to one value."""

    def __init__(self, value: float = 0.0):
        self.value = value
        self.seen: list[torch.Tensor] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        return torch.zeros(1, 16, 8, 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.full((latents.shape[0], 3, 2, 2), self.value)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("nano")


def test_a_long_prompt_keeps_its_beginning(pipe: Any) -> None:
    words, layout = "a red circle " * 100, pipe.layout
    with pytest.warns(UserWarning, match="cut to the first"):
        row = layout.generation([words]).text_tokens[0].tolist()
    assert row[1 : 1 + layout.max_text_len] == layout.encode(words)[: layout.max_text_len]
    assert row[1 + layout.max_text_len] == layout.boi


@pytest.mark.parametrize("size", [(1, 3), (3, 1)])
def test_a_picture_is_cropped_in_the_middle(size: tuple[int, int], pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    side, codec = pipe.pixels, Recorded()
    image = Image.new("RGB", (size[0] * side, size[1] * side))
    middle = tuple((length - 1) // 2 * side for length in size)
    image.paste((255, 255, 255), (*middle, middle[0] + side, middle[1] + side))
    monkeypatch.setattr(pipe, "codec", codec)
    pipe.encode(image)
    assert (codec.seen[0] == 1).all(), "the picture's middle is all white"


def test_a_cropped_picture_is_as_wide_as_its_square(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the width's scale, as a float, leaves a little less than one pixel of it."""
    side, codec = pipe.pixels, Recorded()
    width = next(width for width in range(1, 1000) if int(width * (side / width)) < side)
    monkeypatch.setattr(pipe, "codec", codec)
    for size in ((width, 2 * width), (2 * width, width)):
        pipe.encode(Image.new("RGB", size, (255, 255, 255)))
        assert codec.seen[-1].shape[-2:] == (side, side) and (codec.seen[-1] == 1).all()


@pytest.mark.parametrize(("asked", "guidance"), [(0.0, 0.0), (None, 2.5), (3.0, 3.0)])
def test_guidance_is_the_callers_or_the_pipelines(asked: float | None, guidance: float, pipe: Any) -> None:
    given: dict[str, Any] = {}

    def sampler(model: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
        given.update(options)
        return noise

    pipe.generate_batch(["a"], guidance_scale=asked, sampler=sampler)
    assert given["guidance_scale"] == guidance


@pytest.mark.parametrize(("value", "pixel"), [(-1.0, 0), (10.6 / 127.5 - 1, 11), (10.4 / 127.5 - 1, 10), (1.2, 255)])
def test_pixels_are_rounded(value: float, pixel: int, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "codec", Recorded(value))
    assert pipe.generate("a", steps=2).getpixel((0, 0)) == (pixel,) * 3
