"""Images of other sizes than the model's config names: one checkpoint draws several (Show-o pull request 104)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conformance import relative
from support.models import GRID, small_model
from torch import Tensor

import flashu_ext as fx
from flashu_ext.batch.folder import settings_record
from flashu_ext.models.folders import load_pipeline
from flashu_ext.models.showo2.prompts import PromptLayout

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 1e-4
STEPS = 4


class Blocks:
    """A codec of 8 x 8 pixels per latent, which shows the first three channels."""

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 8).repeat(1, 6, 1, 1)[:, :16]

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8.0).clamp(-1, 1)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        if height % 8 or width % 8:
            raise ValueError(f"size: expected multiples of 8 pixels, got {height} x {width}")
        return height // 8, width // 8


def layout(image_tokens: int) -> PromptLayout:
    return PromptLayout(
        encode=lambda text: [ord(letter) % 40 for letter in text],
        decode=lambda tokens: " ".join(map(str, tokens)),
        bos=40, eos=41, boi=42, eoi=43, img_pad=44, pad=45, image_tokens=image_tokens, max_text_len=5,
        before_image=(40, 1), after_question=(2,),
    )  # fmt: skip


def pipeline(**shape: Any) -> Any:
    model = small_model(**shape)
    return fx.showo2.Pipeline(model, layout(model.config.image_tokens), Blocks(), 16 * GRID, guidance_scale=3.0)


def built_for(model: Any, height: int, width: int) -> Any:
    """The same weights in a model whose config names this grid; its table, of another size, is upstream's to resample."""
    config = model.config
    vision = {**config.vision, "image_size": GRID, "patch_size": 1}
    other = fx.showo2.Showo2(
        dataclasses.replace(config, vision=vision, image_latent_height=height, image_latent_width=width)
    )
    other.load_state_dict(model.state_dict())
    return other.eval()


def inputs(pipe: Any, height: int, width: int, prompts: list[str]) -> dict[str, Any]:
    tokens = height * width + pipe.model.config.add_time_embeds
    noise = torch.randn(len(prompts), 16, 2 * height, 2 * width, generator=torch.Generator().manual_seed(5))
    return {"noise": noise, **vars(layout(tokens).generation(prompts)), "guidance_scale": 3.0}


@settings(max_examples=8, deadline=None)
@given(
    height=st.integers(1, 7), width=st.integers(1, 7), images=st.integers(1, 2),
    time_token=st.booleans(), guidance=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_any_grid_is_drawn_as_by_a_model_built_for_it(
    height: int, width: int, images: int, time_token: bool, guidance: float
) -> None:
    pipe = pipeline(time_token=time_token)
    arguments = {**inputs(pipe, height, width, ["abc", ""][:images]), "guidance_scale": guidance}
    expected = fx.showo2.sample(built_for(pipe.model, height, width), **arguments, steps=STEPS)
    dense = fx.showo2.sample(pipe.model, **arguments, steps=STEPS)
    assert torch.equal(dense, expected)
    with pipe.accelerate(fx.FlashUConfig.exact()) as handle:
        got = fx.showo2.sample(pipe.model, **arguments, steps=STEPS)
        assert relative(got, dense) < LIMIT and not handle.summary().fallbacks


def test_the_table_is_resampled_as_upstream_does() -> None:
    """A grid that differs from the table changes what is drawn by exactly its resampled rows."""
    model = small_model()
    table = model.position_embedding.weight.detach()
    grid = table.view(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(grid, size=(3, 6), mode="bicubic", align_corners=False)
    latents = torch.randn(1, 16, 6, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        semantic = model.und_trans(
            model.image_embedder_und(latents) + wide.flatten(2).transpose(1, 2)
        ).last_hidden_state
        expected = model.fusion_proj(torch.cat([semantic, model.image_embedder_gen(latents)], dim=-1))
        assert torch.equal(model.embed_image(latents), expected)


def test_sizes_take_turns_on_one_accelerated_model() -> None:
    pipe = pipeline()
    sizes = [None, 96, (32, 80), 96, None, (80, 32)]
    dense = [pipe.generate("abc", seed=3, steps=STEPS, size=size) for size in sizes]
    assert [image.size for image in dense] == [(64, 64), (96, 96), (80, 32), (96, 96), (64, 64), (32, 80)]
    assert dense[0].tobytes() == pipe.generate("abc", seed=3, steps=STEPS, size=(64, 64)).tobytes()
    with pipe.accelerate(fx.FlashUConfig.exact()):
        for size, image in zip(sizes, dense, strict=True):
            got = pipe.generate("abc", seed=3, steps=STEPS, size=size)
            assert np.abs(np.asarray(got).astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_approximations_of_another_size_are_those_of_a_model_built_for_it() -> None:
    """A plan and a config depend on no size."""
    pipe = pipeline()
    scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    config = fx.FlashUConfig.paper(steps=8).replace(ffn=fx.FfnPruning(0.25, 8))
    arguments = inputs(pipe, 3, 5, ["abc", "d"])
    images = []
    for model in (pipe.model, built_for(pipe.model, 3, 5)):
        with fx.accelerate(model, config, fx.TaskPlan.from_scores(generation=scores, ratio=0.25, multiple=8)) as handle:
            images.append(fx.showo2.sample(model, **arguments))
            assert not handle.summary().fallbacks
    assert torch.equal(*images)
    assert relative(fx.showo2.sample(pipe.model, **arguments, steps=8), images[0]) > LIMIT


def test_a_batch_has_one_size_and_each_image_its_own_noise() -> None:
    pipe = pipeline()
    together = pipe.generate_batch(["abc", "d"], seeds=[4, 9], steps=STEPS, size=(32, 96))
    alone = [pipe.generate(p, seed=s, steps=STEPS, size=(32, 96)) for p, s in (("abc", 4), ("d", 9))]
    for a, b in zip(together, alone, strict=True):
        assert a.size == (96, 32)
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1
    assert pipe.noise([1, 2], size=(32, 96)).shape == (2, 16, 4, 12)


def test_questions_about_an_image_of_another_size_are_about_the_models_own() -> None:
    pipe = pipeline()
    image = pipe.generate("abc", steps=STEPS, size=(32, 96))
    assert pipe.encode(image).shape == (1, 16, 2 * GRID, 2 * GRID)
    assert isinstance(pipe.answer(image, "abc", max_new_tokens=2), str)


def test_rows_are_as_long_as_upstreams() -> None:
    """Upstream pads rows to 1024, 1280 and 4352 tokens at 432, 512 and 1024 pixels (its demo configs)."""
    own = dataclasses.replace(layout(730), max_text_len=290)
    rows = [own.with_image_tokens(tokens).row_tokens for tokens in (730, 1025, 4097)]
    assert (
        rows
        == [1024, 1280, 4352]
        == [
            layout(tokens).with_image_tokens(tokens + 1).with_image_tokens(tokens).row_tokens
            for tokens in (730, 1025, 4097)
        ]
    )
    assert own.with_image_tokens(730) is own and own.with_image_tokens(100).max_text_len == 290
    longer = own.with_image_tokens(1025).generation(["a"])
    assert longer.text_tokens.shape == (1, 1280) and longer.modality_positions.tolist() == [[[3, 1025]]]


def test_the_published_hq_model_draws_512_and_1024_pixels() -> None:
    with torch.device("meta"):
        model = fx.showo2.Showo2(fx.showo2.Showo2Config.show_o2_1_5b(432))  # as its config says: 27 x 27
    pipe = fx.showo2.Pipeline(model, dataclasses.replace(layout(730), max_text_len=290), Blocks(), 432)
    assert [pipe.grid(size) for size in (None, 432, 512, 1024, (512, 1024))] == [
        (27, 27), (27, 27), (32, 32), (64, 64), (32, 64),
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"size: expected rows of at most 32768 tokens.*got 40295 of 3200 x 3200 pixels"
    ):
        pipe.grid(3200)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ("512", TypeError, r"size: expected pixels, an integer or \(height, width\), got '512'"),
        (True, TypeError, "size: expected pixels"),
        (64.0, TypeError, "size: expected pixels"),
        ((64, 64, 64), TypeError, "size: expected pixels"),
        ((64, None), TypeError, "size: expected pixels"),
        (0, ValueError, "size: expected at least one pixel, got 0 x 0"),
        ((64, -16), ValueError, "size: expected at least one pixel, got 64 x -16"),
        (100, ValueError, "size: expected multiples of 16 pixels, a patch of this model, got 100 x 100"),
        (513, ValueError, "size: expected multiples of 16 pixels, a patch of this model, got 513 x 513"),
        ((64, 72), ValueError, "size: expected multiples of 16 pixels, a patch of this model, got 64 x 72"),
        (16 * 2**20, ValueError, "size: expected rows of at most 32768 tokens"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_named_and_changes_nothing(size: Any, error: type, message: str) -> None:
    pipe = pipeline()
    before = pipe.generate("abc", steps=STEPS).tobytes()
    with pytest.raises(error, match=message):
        pipe.generate("abc", steps=STEPS, size=size)
    with pytest.raises(error, match=message):
        pipe.noise([0], size=size)
    assert pipe.generate("abc", steps=STEPS).tobytes() == before


def test_a_model_or_codec_of_one_size_says_so() -> None:
    nano = load_pipeline("nano")
    assert nano.grid(48) == nano.grid() == (36, 1)
    with pytest.raises(ValueError, match=r"size: expected 48 x 48 pixels.*got 96 x 96"):
        nano.generate("a red circle", size=96)
    noise = torch.zeros(1, 16, 80, 2)
    rows = vars(dataclasses.replace(nano.layout, image_tokens=41).generation(["a"]))
    with pytest.raises(ValueError, match="noise: expected 36 patches as the model was built for, got 40"):
        fx.showo2.sample(nano.model, noise, **rows, steps=2)
    config = small_model().config
    narrow = fx.showo2.Showo2(dataclasses.replace(config, image_latent_height=2, image_latent_width=3))
    pipe = fx.showo2.Pipeline(narrow, layout(7), Blocks(), 32)
    assert pipe.grid((32, 48)) == (2, 3)
    with pytest.raises(
        ValueError, match=r"size: expected a grid of 2 x 3 patches.*not square, got 3 x 3 of 48 x 48 pixels"
    ):
        pipe.generate("abc", size=48)
    pipe.codec = type("Old", (), {"encode": None, "decode": None})()
    with pytest.raises(TypeError, match="codec: expected a method latent_size where a size is asked for, got Old"):
        pipe.generate("abc", size=64)


def test_latents_and_spans_of_two_sizes_are_named() -> None:
    model = pipeline().model
    own, other = inputs(pipeline(), GRID, GRID, ["a"]), inputs(pipeline(), 3, 3, ["a"])
    with pytest.raises(
        ValueError, match=r"noise: expected 16 patches, as many as the span in modality_positions\[0\] has, got 9"
    ):
        fx.showo2.sample(model, **{**own, "noise": other["noise"]}, steps=2)
    with pytest.raises(
        ValueError, match=r"modality_positions\[0\]: expected a span of 17 tokens for these latents, got 10"
    ):
        fx.showo2.sample(model, **{**other, "noise": own["noise"]}, steps=2)


def test_a_folder_records_the_size() -> None:
    pipe = pipeline()
    own = settings_record(pipe, None)
    assert own == settings_record(pipe, None, size=64) and "grid" not in own
    assert settings_record(pipe, None, size=(64, 96)) == {**own, "grid": [4, 6]}


def test_the_command_takes_a_size(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from flashu_ext.cli.main import cli

    out = str(tmp_path / "out.png")
    arguments = ["generate", "a red circle", "--steps", "2", "-o", out, "--size"]
    results = [CliRunner().invoke(cli, [*arguments, size]) for size in ("48", "48x48", "96", "48x", "a", "1x2x3")]
    assert [result.exit_code for result in results] == [0, 0, 1, 2, 2, 2]
    assert "size: expected 48 x 48 pixels" in results[2].output
    assert "expected pixels as 512 or height x width as 512x1024" in results[3].output
