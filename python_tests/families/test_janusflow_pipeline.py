"""JanusFlow's pipeline: upstream's conversations, groups of prompts, answers, a checkpoint's folder, bad input."""

from __future__ import annotations

import copy
import json
import pickle
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
from flashu_ext.models.comparison import Fixture
from flashu_ext.models.janusflow.conformance import model_of
from flashu_ext.models.janusflow.prompts import ChatLayout, load_tokenizer

FIXTURE = Fixture.read(FIXTURES / "janusflow")
SPECIAL = [
    "<｜▁pad▁｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
    "<｜begin▁of▁generation｜>",
]
PAD, BOS, EOS, BOI, EOI, IMAGE, TAG = range(7)
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
COLOURS = {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.25, 0.5)}


def ids(text: str) -> list[int]:
    """Of a text without special tokens."""
    return [len(SPECIAL) + byte for byte in text.encode()]


def layout() -> ChatLayout:
    tokenizer = byte_tokenizer(SPECIAL)
    return ChatLayout(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        bos=BOS, eos=EOS, boi=BOI, eoi=EOI, pad=PAD, image=IMAGE, tag=TAG, image_tokens=36,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return fx.janusflow.Pipeline(model_of(FIXTURE), layout(), Blocks(4), **COLOURS)


@pytest.fixture(params=["dense", "exact"])
def either(request: pytest.FixtureRequest, pipe: Any) -> Any:
    config, plan = pipe.preset(request.param)
    if config is None:
        yield pipe
        return
    with pipe.accelerate(config, plan):
        yield pipe


def drawn(pipe: Any, *arguments: Any, **more: Any) -> list[Tensor]:
    """The latents of `generate_batch`'s images."""
    pipe.codec.decoded.clear()
    images = pipe.generate_batch(*arguments, **more)
    assert [image.size for image in images] == [(96, 96)] * len(images)
    return [each[0] for each in pipe.codec.decoded]


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))


def drawing(prompt: str) -> Tensor:
    return torch.tensor([BOS, *ids(f"User: {prompt}\n\nAssistant:"), TAG])


def question(text: str) -> Tensor:
    span = [BOI, *[IMAGE] * 36, EOI]
    row = [BOS, *ids(f"{SYSTEM}\n\nUser: "), *span, *ids(f"\n{text}\n\nAssistant:")]
    return torch.tensor([row])


PROMPTS = ["a red circle", "a cat", "on a mat"]
"""Of 12, 5 and 8 bytes."""


def test_prompts_and_questions_are_upstreams_conversations() -> None:
    own = layout()
    assert own.drawing([" a red circle\n", ""]) == [
        drawing("a red circle").tolist(),
        [BOS, *ids("User:Assistant:"), TAG],
    ]
    assert torch.equal(own.question("what is it? "), question("what is it?"))


def test_an_image_is_the_samplers(either: Any) -> None:
    (latents,) = drawn(either, ["a red circle"], [7], 5, 3.0)
    model = model_of(FIXTURE)
    expected = fx.janusflow.sample(model, noise(7), drawing("a red circle"), 5, 3.0, PAD)[0]
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    image = either.generate("a red circle", 7, 5, 3.0)
    pixel = (float(expected[0, 0, 0].tanh()) + 1) * 127.5
    assert abs(image.getpixel((0, 0))[0] - pixel) < 0.51  # rounded, not cut off


def test_prompts_of_other_lengths_are_drawn_in_their_groups(either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, scales, seeds = [*PROMPTS, "a dog", "a fox"], [2.0, 3.0, 4.0, 5.0, 1.5], [3, 1, 4, 1, 5]
    alone = [
        drawn(either, [each], [seed], 4, scale)[0] for each, seed, scale in zip(prompts, seeds, scales, strict=True)
    ]
    counts, stepper = [], type(either).stepper

    def counted(self: Any, batch: Any) -> Any:
        counts.append(len(batch.prompts))
        return stepper(self, batch)

    monkeypatch.setattr(type(either), "stepper", counted)
    together = drawn(either, prompts, seeds, 4, scales)
    assert counts == [1, 3, 1]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_seeds_and_guidance_have_defaults(pipe: Any) -> None:
    first = drawn(pipe, PROMPTS, steps=2)
    again = drawn(pipe, PROMPTS, [0, 1, 2], 2, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(drawn(pipe, PROMPTS, steps=2, guidance_scale=0.0)[0], first[0])
    assert pipe.generate("a cat", steps=2).tobytes() == pipe.generate("a cat", 0, 2).tobytes()


PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 20 + 30 * i, 3), np.uint8)) for i in (0, 1)]
QUESTIONS = ["what is it?", "which colour is the circle?"]


def words(tokens: Tensor) -> str:
    return bytes(each - 7 for each in tokens.tolist() if 7 <= each < 263).decode(errors="replace").strip()


def test_answers_are_the_models(either: Any) -> None:
    model = model_of(FIXTURE)
    expected = []
    for picture, text in zip(PICTURES, QUESTIONS, strict=True):
        pixels = fx.janusflow.pixel_values(picture, model.config, **COLOURS)
        expected.append(words(fx.janusflow.answer_tokens(model, pixels, question(text), 12, EOS)))
    assert all(expected) and expected[0] != expected[1]
    assert [either.answer(a, b, 12) for a, b in zip(PICTURES, QUESTIONS, strict=True)] == expected
    told: list[tuple[int, int]] = []
    got = either.answer_batch(PICTURES, QUESTIONS, 12, on_token=lambda row, token: told.append((row, token)))
    assert got == expected and {row for row, _ in told} == {0, 1}
    assert either.answer_batch(PICTURES[:1], QUESTIONS, 12)[0] == expected[0]
    assert either.answer_batch([], []) == []
    parts: list[str] = []
    assert either.answer(PICTURES[0], QUESTIONS[0], 12, on_text=parts.append) == "".join(parts) == expected[0]
    assert len(parts) > 1


def test_draws_of_an_answer_are_its_seeds(pipe: Any) -> None:
    def asked(**more: Any) -> list[str]:
        sampling = {"temperature": 2.0, "top_k": 200, "top_p": 0.99}
        return [pipe.answer(PICTURES[0], QUESTIONS[0], 8, seed=seed, **sampling, **more) for seed in range(4)]

    dense = asked()
    assert len(set(dense)) == 4 and asked() == dense
    with pipe.accelerate():
        assert asked() == dense
        sampling = {"temperature": 2.0, "top_k": 200, "top_p": 0.99}
        assert pipe.answer_batch(PICTURES[:1], QUESTIONS[:1] * 4, 8, seeds=range(4), **sampling) == dense
    assert pipe.answer_batch(PICTURES[:1], QUESTIONS[:1] * 4, 8, seeds=range(4), **sampling) == dense


# ---- folders


def write_checkpoint(folder: Path, tokenizer: Path) -> None:
    model_of(FIXTURE).save_pretrained(folder)
    names = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}
    write_byte_tokenizer(tokenizer, SPECIAL, **names, tokenizer_class="LlamaTokenizerFast")
    small_kl_vae(4, scaling_factor=0.13025).save_pretrained(folder / "vae")
    preprocessor = {"image_mean": COLOURS["mean"], "image_std": COLOURS["std"], "image_size": 48}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("janusflow")
    write_checkpoint(path, path)
    return path


def test_a_folder_becomes_a_pipeline(folder: Path, tmp_path: Path) -> None:
    pipe = fx.janusflow.Pipeline.from_pretrained(folder)
    assert (pipe.mean, pipe.std, pipe.name) == (COLOURS["mean"], COLOURS["std"], str(folder))
    assert (pipe.layout.pad, pipe.layout.eos, pipe.layout.image_tokens) == (PAD, EOS, 36)
    assert pipe.layout.drawing(PROMPTS) == layout().drawing(PROMPTS)
    assert torch.equal(pipe.layout.question("what?"), question("what?"))
    image = pipe.generate("a cat", 3, 3)
    latents = fx.janusflow.sample(pipe.model, noise(3), drawing("a cat"), 3, 2.0, PAD)
    with torch.no_grad():
        raw = pipe.codec.vae.decode(latents / 0.13025).sample[0].clamp(-1, 1)
    pixels = ((raw.permute(1, 2, 0).numpy() + 1) * 127.5).round()
    assert np.abs(np.asarray(image) - pixels).max() <= 1 and image.size == (96, 96)
    pipe.save_pretrained(tmp_path / "saved")
    again = fx.janusflow.Pipeline.from_pretrained(tmp_path / "saved", torch.float32)
    assert again.generate("a cat", 3, 3).tobytes() == image.tobytes() and again.mean == pipe.mean
    assert again.answer(image, "what?", 5) == pipe.answer(image, "what?", 5)


def test_tags_that_a_tokenizer_lacks_are_appended(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, SPECIAL[:4], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS])
    own = ChatLayout.from_tokenizer(load_tokenizer(tmp_path), 4)
    assert (own.image, own.tag, own.boi, own.eoi) == (260, 261, 3, 262)  # upstream's order
    assert own.drawing(["a"])[0][-1] == 261


@pytest.mark.parametrize("part", ["tokenizer.json", "vae/config.json", "preprocessor_config.json"])
def test_missing_parts_are_named(folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / part).unlink()
    with pytest.raises(FileNotFoundError, match=part.replace(".", r"\.")):
        fx.janusflow.Pipeline.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor: expected a finite number > 0, got 0"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "image_mean: expected three numbers"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "image_std: expected three numbers"),
        ("tokenizer_config.json", {"bos_token": None}, "expected bos_token and eos_token"),
    ],
)
def test_wrong_parts_are_named(folder: Path, tmp_path: Path, part: str, change: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        fx.janusflow.Pipeline.from_pretrained(tmp_path / "a")


def test_another_vae_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")
    small_kl_vae(16).save_pretrained(tmp_path / "a" / "vae")
    with pytest.raises(ValueError, match="latent_channels: expected 4, as the model's VAE has, got 16"):
        fx.janusflow.Pipeline.from_pretrained(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="'nowhere': expected 'nano' or a folder with a JanusFlow checkpoint"):
        fx.janusflow.Pipeline.from_pretrained("nowhere")
    with pytest.raises(ValueError, match="dtype: expected None or a floating dtype"):
        fx.janusflow.Pipeline.from_pretrained(folder, torch.int8)


# ---- bad input, copies


PICTURE = PICTURES[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.generate(3), "prompt: expected a string, got int"),
        (lambda pipe: pipe.generate_batch([]), "prompts: expected a non-empty list of strings"),
        (lambda pipe: pipe.generate_batch("a cat"), "prompts: expected a non-empty list of strings"),
        (lambda pipe: pipe.generate("a", -1), r"seed: expected an integer in \[0, 2\^63\), got -1"),
        (lambda pipe: pipe.generate_batch(["a"], [1, 2]), "seeds: expected one for each of 1 prompts, got 2"),
        (lambda pipe: pipe.generate("a", steps=0), "steps: expected an integer in .1, 9999."),
        (lambda pipe: pipe.generate("a", guidance_scale=-1), "guidance_scale: expected a finite number >= 0"),
        (lambda pipe: pipe.generate_batch(["a", "bc"], None, 2, [1.0]), "guidance_scale: expected 2 finite numbers"),
        (lambda pipe: pipe.answer("a.png", "what?"), "image: expected a PIL image, got str"),
        (lambda pipe: pipe.answer([PICTURE] * 2, "what?"), "image: expected one image, because this model"),
        (lambda pipe: pipe.answer(PICTURE, " "), "question: expected a non-empty string"),
        (lambda pipe: pipe.answer(PICTURE, f"{SPECIAL[IMAGE]} what?"), "question: expected a text without <image_pl"),
        (lambda pipe: pipe.answer(PICTURE, "a", on_text=5), "on_text: expected None or a function"),
        (lambda pipe: pipe.answer(PICTURE, "a", seed=-1), "seed: expected an integer"),
        (lambda pipe: pipe.answer(PICTURE, "a", temperature=-1.0), "temperature: expected a finite number"),
        (lambda pipe: pipe.answer(PICTURE, "a", -1), "max_new_tokens: expected an integer >= 0"),
        (lambda pipe: pipe.answer_batch([PICTURE] * 2, ["a"] * 3), "images: expected one, or one for each of 3"),
        (lambda pipe: pipe.answer_batch([PICTURE, 3], ["a"] * 2), r"images\[1\]: expected a PIL image, got int"),
        (lambda pipe: pipe.preset("fastest"), "preset"),
        (lambda pipe: pipe.save_pretrained("/nowhere"), "expected a tokenizer of transformers and a KlCodec"),
    ],
)
def test_bad_input_is_named_before_work(pipe: Any, call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("backbone", "embed_image"):
        monkeypatch.setattr(pipe.model, method, None)
    with pytest.raises((TypeError, ValueError), match=message):
        call(pipe)


def test_a_pipeline_is_copied_and_not_pickled(pipe: Any) -> None:
    expected = pipe.generate("a cat", 1, 2).tobytes()
    with pipe.accelerate():
        twin = copy.deepcopy(pipe)
        assert twin.model is not pipe.model and fx.handle_of(twin.model) is None
        assert twin.generate("a cat", 1, 2).tobytes() == expected
    assert copy.copy(pipe).model is pipe.model
    with pytest.raises(TypeError, match="it cannot be pickled"):
        pickle.dumps(pipe)


def test_calibration_samples_are_by_hand(pipe: Any, tmp_path: Path) -> None:
    """A folder of pictures is scored as samples made by hand."""
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (96, 160, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    (tmp_path / "generation.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "a cat"}))
    (tmp_path / "understanding.jsonl").write_text(
        json.dumps({"image": "a.png", "question": "what is it?", "answer": "a cat"})
    )
    square = (
        torch.from_numpy(np.asarray(picture.crop((32, 0, 128, 96))).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    )
    drawn = fx.janusflow.GenerationSample(Blocks(4).encode(square), drawing("a cat"), PAD)
    pixels = fx.janusflow.pixel_values(picture, pipe.model.config, **COLOURS)
    tokens = torch.cat([question("what is it?"), torch.tensor([ids("a cat")])], dim=1)
    asked = fx.janusflow.UnderstandingSample(pixels, tokens, 5)
    expected = calibrate(pipe.model, [drawn], [asked], progress=False, multiple=16)
    plan = calibrate(pipe.model, tasks=folder_samples(pipe, tmp_path), progress=False, multiple=16)
    for task in ("generation", "understanding"):
        assert torch.equal(plan.scores[task], expected.scores[task])
        assert torch.equal(plan.layer_importance[task], expected.layer_importance[task])
