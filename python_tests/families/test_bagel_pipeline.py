"""BAGEL's pipeline: drawing, editing and answering as by hand, a checkpoint's folder, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.conformance import FIXTURES
from support.pipelines import Blocks, byte_tokenizer, small_kl_vae, write_byte_tokenizer
from torch import Tensor

import flashu_ext as fx
from flashu_ext.calibration.calibrate import calibrate
from flashu_ext.calibration.data import folder_samples
from flashu_ext.models.bagel.conformance import model_of
from flashu_ext.models.bagel.images import pixels, vae_image
from flashu_ext.models.bagel.prompts import SequenceLayout, load_tokenizer
from flashu_ext.models.comparison import Fixture

FIXTURE = Fixture.read(FIXTURES / "bagel")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
IDS = fx.bagel.TokenIds(1, 2, 3, 4)
SIDES: dict[str, Any] = {"vae_sides": (96, 48), "vit_sides": (84, 28)}
"""As the small model's position tables allow."""
MODEL = model_of(FIXTURE)


def text(string: str) -> fx.bagel.Text:
    return fx.bagel.Text(torch.tensor([len(SPECIAL) + byte for byte in string.encode()]))


def layout() -> SequenceLayout:
    tokenizer = byte_tokenizer(SPECIAL)
    return SequenceLayout(
        encode=lambda string: tokenizer.encode(string, add_special_tokens=False).ids,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        bos=1, eos=2, boi=3, eoi=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return fx.bagel.Pipeline(model_of(FIXTURE), layout(), Blocks(16), **SIDES)


@pytest.fixture(params=["dense", "exact"])
def either(request: pytest.FixtureRequest, pipe: Any) -> Any:
    config, plan = pipe.preset(request.param)
    if config is None:
        yield pipe
        return
    with pipe.accelerate(config, plan):
        yield pipe


WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
TALL = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 60, 3), np.uint8))
RESIZED = {"wide": (80, 48), "tall": (64, 96)}
"""Width and height, for the VAE: sides of whole tokens of 16 pixels."""


def given(picture: Image.Image, size: tuple[int, int], generator: torch.Generator | None = None) -> fx.bagel.Image:
    """A picture as the model's item, by hand: resized for the VAE, then again for the image encoder."""
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    tokens, places = fx.bagel.vit_image(resized, MODEL.config, *SIDES["vit_sides"])
    array = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = None if generator is None else Blocks(16).encode(array, generator)
    return fx.bagel.Image(latents, tokens, places)


def wide(generator: torch.Generator | None = None) -> fx.bagel.Image:
    return given(WIDE, RESIZED["wide"], generator)


def tall(generator: torch.Generator | None = None) -> fx.bagel.Image:
    return given(TALL, RESIZED["tall"], generator)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(items: Any, size: tuple[int, int], generator: torch.Generator, points: int, **settings: Any) -> Tensor:
    """Latents of an image of (height, width) pixels; noise as upstream draws it."""
    noise = torch.randn(size[0] // 16 * (size[1] // 16), 64, generator=generator)
    return MODEL.unpacked(fx.bagel.sample(MODEL, noise, items, size, IDS, points, **settings), size)


def same(pipe: Any, image: Image.Image, expected: Tensor) -> None:
    torch.testing.assert_close(pipe.codec.decoded[-1], expected, rtol=0, atol=1e-5)
    assert image.size == (8 * expected.shape[3], 8 * expected.shape[2])


EDITS: dict[str, Any] = {"cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0)}
EDITS["cfg_renorm_type"] = "text_channel"


def test_an_image_is_the_samplers(either: Any) -> None:
    image = either.generate("a red circle", 7, 5, size=(48, 64))
    same(either, image, by_hand([text("a red circle")], (48, 64), seeded(7), 5))
    pixel = (float(either.codec.decoded[-1][0, 0, 0, 0].tanh()) + 1) * 127.5
    assert abs(image.getpixel((0, 0))[0] - pixel) < 0.51
    assert either.generate("a red circle", 7, 5, size=(48, 64)).tobytes() == image.tobytes()
    guidance = fx.bagel.Guidance(2.0, 1.5, (0.2, 0.9), "channel", 0.1)
    image = either.generate("a cat", 1, 5, size=64, text_guidance=3.0, guidance=guidance)
    settings = {"cfg_interval": (0.2, 0.9), "cfg_renorm_type": "channel", "cfg_renorm_min": 0.1}
    expected = by_hand([text("a cat")], (64, 64), seeded(1), 5, cfg_text_scale=3.0, cfg_img_scale=1.5, **settings)
    same(either, image, expected)


def test_an_edit_sees_the_image_as_latents_and_by_the_encoder(either: Any) -> None:
    generator = seeded(3)
    items = [wide(generator), text("make it red")]  # what the VAE samples comes before the noise
    image = either.edit(WIDE, "make it red", 3, 5)
    same(either, image, by_hand(items, (48, 80), generator, 5, **EDITS))


def test_an_edit_after_several_images_has_the_size_of_the_last(either: Any) -> None:
    generator = seeded(4)
    items = [wide(generator), tall(generator), text("both")]
    image = either.edit([WIDE, TALL], "both", 4, 4, image_guidance=1.2)
    same(either, image, by_hand(items, (96, 64), generator, 4, **{**EDITS, "cfg_img_scale": 1.2}))


def test_texts_and_images_are_drawn_from_in_order(either: Any) -> None:
    generator = seeded(5)
    items = [text("first"), tall(generator), text("then"), wide(generator), text("so")]
    given_items = ["first", TALL, "then", WIDE, "so"]
    image = either.interleave(given_items, 5, 5)
    interleaved = {"cfg_text_scale": 3.0, "cfg_img_scale": 1.5}
    same(either, image, by_hand(items, (48, 80), generator, 5, **interleaved))
    generator = seeded(5)
    items = [text("first"), tall(generator)]
    image = either.interleave(given_items[:2], 5, 5, size=(32, 48))
    same(either, image, by_hand(items, (32, 48), generator, 5, **interleaved))


def test_what_is_transparent_is_white(pipe: Any) -> None:
    clear = WIDE.convert("RGBA")
    clear.putalpha(0)
    paper = Image.new("RGB", WIDE.size, "white")
    assert pipe.edit(clear, "a", 1, 3).tobytes() == pipe.edit(paper, "a", 1, 3).tobytes()


def test_a_long_picture_is_resized_as_upstream_does() -> None:
    """Sides by upstream's program; it limits the area before the long side, and the long side's limit rounds again."""
    config = fx.bagel.BagelConfig()
    for size, expected in {(74, 3004): (16, 1024), (279, 3284): (96, 1024), (859, 21): (1024, 16)}.items():
        assert vae_image(Image.new("RGB", size), config).size == expected
    assert vae_image(Image.new("RGB", (300, 200)), config).size == (768, 512)


# ---- answers


def words(tokens: Tensor) -> str:
    return bytes(each - 5 for each in tokens.tolist() if 5 <= each < 261).decode(errors="replace").strip()


def test_answers_are_the_models(either: Any) -> None:
    asked = [[wide(), text("what is it?")], [tall(), wide(), text("which is red?")], [wide(), text("why?")]]
    expected = [words(fx.bagel.answer_tokens(MODEL, items, IDS, 12)) for items in asked]
    assert all(expected) and len(set(expected)) == 3
    assert either.answer(WIDE, "what is it?", 12) == expected[0]
    assert either.answer([TALL, WIDE], "which is red?", 12) == expected[1]
    told: list[tuple[int, int]] = []
    questions = ["what is it?", "which is red?", "why?"]
    got = either.answer_batch(
        [WIDE, [TALL, WIDE], [WIDE]], questions, 12, on_token=lambda row, token: told.append((row, token))
    )
    assert got == expected and {row for row, _ in told} == {0, 1, 2}
    assert either.answer_batch([WIDE], ["what is it?", "why?"], 12) == [expected[0], expected[2]]
    parts: list[str] = []
    assert either.answer(WIDE, "what is it?", 12, on_text=parts.append) == "".join(parts) == expected[0]
    assert len(parts) > 1
    items = [text("look"), tall(), text("and"), wide(), text("so?")]
    interleaved = words(fx.bagel.answer_tokens(MODEL, items, IDS, 9))
    assert either.interleave_answer(["look", TALL, "and", WIDE, "so?"], 9) == interleaved


def test_draws_of_an_answer_are_its_seeds(pipe: Any) -> None:
    sampling: dict[str, Any] = {"temperature": 2.0, "top_k": 200, "top_p": 0.99}

    def asked() -> list[str]:
        return [pipe.answer(WIDE, "what?", 8, seed=seed, **sampling) for seed in range(3)]

    dense = asked()
    assert len(set(dense)) == 3 and asked() == dense
    assert pipe.answer_batch([WIDE], ["what?"] * 3, 8, seeds=range(3), **sampling) == dense
    with pipe.accelerate():
        assert asked() == dense
        assert pipe.answer_batch([WIDE], ["what?"] * 3, 8, seeds=range(3), **sampling) == dense


def test_the_marker_at_an_answers_end_is_no_text() -> None:
    assert layout().answer(torch.tensor([*text(" a cat ").ids.tolist(), IDS.eos_token_id])) == "a cat"


# ---- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bagel")
    MODEL.save_pretrained(path)
    write_byte_tokenizer(path, SPECIAL)
    small_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(path / "vae")
    return path


def test_a_folder_becomes_a_pipeline(folder: Path, tmp_path: Path) -> None:
    pipe = fx.bagel.Pipeline.from_pretrained(folder)
    assert (pipe.vae_sides, pipe.vit_sides, pipe.timestep_shift) == ((1024, 512), (980, 224), 3.0)
    assert pipe.layout.ids == IDS and torch.equal(pipe.layout.text("a cat").ids, text("a cat").ids)
    pipe.vae_sides, pipe.vit_sides = SIDES["vae_sides"], SIDES["vit_sides"]
    generator = seeded(2)
    resized = vae_image(WIDE, pipe.model.config, *SIDES["vae_sides"])
    with torch.no_grad():
        posterior = pipe.codec.vae.encode(pixels(resized)).latent_dist
        latents = fx.bagel.encoded(posterior.mean, posterior.std, generator)
        item = wide()
        edited = fx.bagel.Image(latents, item.vit_tokens, item.vit_position_ids)
        drawn = by_hand([edited, text("red")], (48, 80), generator, 3, **EDITS)
        raw = pipe.codec.vae.decode(drawn / 0.3611 + 0.1159).sample[0].clamp(-1, 1)
    image = np.asarray(pipe.edit(WIDE, "red", 2, 3))
    assert np.abs(image - ((raw.permute(1, 2, 0).numpy() + 1) * 127.5).round()).max() <= 1
    pipe.save_pretrained(tmp_path / "saved")
    again = fx.bagel.Pipeline.from_pretrained(tmp_path / "saved")
    again.vae_sides, again.vit_sides = pipe.vae_sides, pipe.vit_sides
    assert np.array_equal(np.asarray(again.edit(WIDE, "red", 2, 3)), image)
    half = fx.bagel.Pipeline.from_pretrained(folder, torch.bfloat16)
    assert half.model.vae2llm.weight.dtype == torch.bfloat16
    assert half.generate("a cat", steps=3, size=32).size == (32, 32)


def test_markers_that_a_tokenizer_lacks_are_appended(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, SPECIAL[:2])
    own = SequenceLayout.from_tokenizer(load_tokenizer(tmp_path))
    assert (own.bos, own.eos, own.boi, own.eoi) == (1, 258, 259, 260)  # upstream's order


@pytest.mark.parametrize("part", ["tokenizer.json", "vae/config.json"])
def test_missing_parts_are_named(folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / part).unlink()
    with pytest.raises(FileNotFoundError, match=part.replace(".", r"\.")):
        fx.bagel.Pipeline.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("field", ["scaling_factor", "shift_factor"])
def test_another_vae_is_named(folder: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 0.5}))
    with pytest.raises(ValueError, match=f"vae: {field}: expected .*, as the model's VAE has, got 0.5"):
        fx.bagel.Pipeline.from_pretrained(tmp_path / "a")


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.generate(3), "prompt: expected a string, got int"),
        (lambda pipe: pipe.edit(WIDE, 3), "prompt: expected a string, got int"),
        (lambda pipe: pipe.generate("a", -1, size=32), r"seed: expected an integer in \[0, 2\^63\), got -1"),
        (
            lambda pipe: pipe.generate("a", 0, 1, size=32),
            "steps: expected an integer in .2, 10000. .grid points., got 1",
        ),
        (
            lambda pipe: pipe.generate("a", 0, 2.5, size=32),
            "steps: expected an integer in .2, 10000. .grid points., got 2.5",
        ),
        (
            lambda pipe: pipe.generate("a", size=40),
            "size: expected .height, width. in pixels, multiples of 16 up to 160",
        ),
        (lambda pipe: pipe.generate("a", size="large"), "size: expected pixels, an integer or"),
        (lambda pipe: pipe.generate("a", text_guidance=-1), "text_guidance: expected a finite number >= 0, got -1"),
        (lambda pipe: pipe.edit(WIDE, "a", image_guidance="b"), "image_guidance: expected a finite number >= 0"),
        (lambda pipe: pipe.generate("a", guidance=3.0), "guidance: expected a Guidance, got float"),
        (lambda pipe: pipe.edit("a.png", "a"), "image: expected a PIL image, got str"),
        (lambda pipe: pipe.edit([WIDE, 3], "a"), r"image\[1\]: expected a PIL image, got int"),
        (lambda pipe: pipe.edit([], "a"), "image: expected at least one image, got an empty list"),
        (lambda pipe: pipe.interleave("a"), "items: expected a list of strings and PIL images, got str"),
        (lambda pipe: pipe.interleave([]), "items: expected at least one string or PIL image"),
        (lambda pipe: pipe.interleave(["a", 3]), r"items\[1\]: expected a PIL image, got int"),
        (lambda pipe: pipe.answer(WIDE, " "), "question: expected a non-empty string"),
        (lambda pipe: pipe.answer("a.png", "a"), "image: expected a PIL image, got str"),
        (lambda pipe: pipe.answer(WIDE, "a", on_text=5), "on_text: expected None or a function"),
        (lambda pipe: pipe.answer(WIDE, "a", top_k=0), "top_k: expected None or an integer >= 1"),
        (lambda pipe: pipe.answer(WIDE, "a", -1), "max_new_tokens: expected an integer >= 0"),
        (lambda pipe: pipe.answer_batch([WIDE], ["a"] * 2, seeds=[1]), "seeds: expected one for each of 2 questions"),
        (lambda pipe: pipe.answer_batch([[WIDE, 3]], ["a"]), r"images\[0\]\[1\]: expected a PIL image, got int"),
        (lambda pipe: pipe.preset("fastest"), "preset"),
    ],
)
def test_bad_input_is_named_before_work(pipe: Any, call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("context", "append", "hidden"):
        monkeypatch.setattr(pipe.model, method, None)
    with pytest.raises((TypeError, ValueError), match=message):
        call(pipe)


def test_calibration_samples_are_by_hand(pipe: Any, tmp_path: Path) -> None:
    """A folder of pictures is scored as samples made by hand."""
    WIDE.save(tmp_path / "a.png")
    (tmp_path / "generation.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "a cat"}))
    (tmp_path / "understanding.jsonl").write_text(
        json.dumps({"image": "a.png", "question": "what is it?", "answer": "a cat"})
    )
    resized = torch.from_numpy(np.asarray(WIDE.resize(RESIZED["wide"], Image.Resampling.BICUBIC)).copy())
    latents = Blocks(16).encode(resized.permute(2, 0, 1)[None].float() / 127.5 - 1)
    drawn = fx.bagel.GenerationSample(MODEL.packed(latents), [text("a cat")], (48, 80), IDS)
    answer = tuple(len(SPECIAL) + byte for byte in b"a cat")
    asked = fx.bagel.UnderstandingSample([wide(), text("what is it?")], answer, IDS)
    expected = calibrate(MODEL, [drawn], [asked], progress=False, multiple=16)
    plan = calibrate(pipe.model, tasks=folder_samples(pipe, tmp_path), progress=False, multiple=16)
    for task in ("generation", "understanding"):
        assert torch.equal(plan.scores[task], expected.scores[task])
        assert torch.equal(plan.layer_importance[task], expected.layer_importance[task])
