"""Pipelines: a folder with checkpoint, tokenizer and a small random VAE; prompt layout; image codec; nano; bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import small_wan_vae

import flashu_ext as fx
from flashu_ext.batch.folder import settings_record
from flashu_ext.models.folders import load_pipeline
from flashu_ext.models.showo2.codec import WanCodec
from flashu_ext.models.showo2.prompts import PromptLayout, load_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = [
    "a",
    "red",
    "circle",
    "blue",
    "square",
    "what",
    "?",
    "system",
    "user",
    "assistant",
    "You",
    "are",
    "helpful",
    ".",
]


def write_tokenizer(folder: Path) -> None:
    """A small stand-in for Qwen2.5's tokenizer: its special tokens, and one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.conformance import public

    path = tmp_path_factory.mktemp("checkpoint")
    public().model().save_pretrained(path)
    write_tokenizer(path / "tokenizer")
    small_wan_vae().save_pretrained(path / "vae")
    return path


def test_special_tokens_and_layout(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = tokenizer.get_vocab()
    added = [vocabulary[name] for name in ("[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>")]
    assert added == list(range(len(vocabulary) - 4, len(vocabulary)))  # Show-o2's additions, in its order
    layout = PromptLayout.from_tokenizer(tokenizer, image_tokens=5, max_seq_len=16)
    rows = layout.generation(["a red circle", "a"])
    ids = vocabulary
    span = [ids["<|image_pad|>"]] * 5
    tail = [ids["<|vision_end|>"], ids["<|im_end|>"]]
    expected = [ids["<|im_start|>"], ids["a"], ids["red"], ids["circle"], ids["<|vision_start|>"], *span, *tail]
    assert rows.text_tokens[0, :12].tolist() == expected
    assert rows.text_tokens.shape == (2, 16) and (rows.text_tokens[0, 12:] == ids["[PAD]"]).all()
    assert rows.modality_positions.tolist() == [[[5, 5]], [[3, 5]]]
    assert rows.modality_positions_null.tolist() == [[[2, 5]]] * 2
    before, after = layout.question("what ?")
    system = [
        ids[w] for w in ("system", "You", "are", "a", "helpful", "assistant", ".", "<|im_end|>", "<|im_start|>", "user")
    ]
    system[5:6] = [ids["assistant"]]
    assert before[0].tolist() == [ids["<|im_start|>"], *system]
    # Upstream's inference_mmu.py closes the system message, but not the question.
    words = ("<|vision_start|>", "<|vision_end|>", "what", "?", "<|im_start|>", "assistant")
    assert after[0].tolist() == [ids[w] for w in words]
    with pytest.warns(UserWarning, match=r"prompts\[0\]: cut to the first 7 of its 50 tokens"):
        long = layout.generation(["red " * 50])
    assert long.text_tokens.shape == (1, 16)  # the prompt is cut to fit the sequence


def test_wan_codec_round_trips_its_own_latents():
    codec = WanCodec(small_wan_vae())
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, 16, 4, 6) and latents.dtype == torch.float32
    assert torch.equal(codec.encode(images[:1]), latents[:1]) or torch.allclose(
        codec.encode(images[:1]), latents[:1], atol=1e-5
    )
    decoded = codec.decode(latents)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    # Normalised: what the VAE itself calls its posterior's mode is latents * std + mean.
    raw = codec.vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(latents * codec.std + codec.mean, raw, rtol=1e-4, atol=1e-4)
    for bad in (images[0], images[:, :2]):
        with pytest.raises(ValueError, match="images: expected"):
            codec.encode(bad)
    with pytest.raises(ValueError, match="latents: expected"):
        codec.decode(latents[:, :8])


def test_a_folder_of_images_records_its_vae(folder: Path):
    first, other = (fx.showo2.Pipeline.from_pretrained(folder) for _ in range(2))
    record = settings_record(first, None)
    assert record == settings_record(other, None) and "vae" not in settings_record(load_pipeline("nano"), None)
    with torch.no_grad():
        next(other.codec.vae.parameters()).add_(1)
    changed = settings_record(other, None)
    assert {key for key in record if record[key] != changed[key]} == {"vae"}


def test_a_folder_becomes_a_pipeline(folder: Path):
    pipe = fx.showo2.Pipeline.from_pretrained(folder)
    dense = pipe.generate("a red circle", seed=3, steps=3)
    assert dense.size == (pipe.pixels, pipe.pixels)
    text = pipe.answer(dense, "what ?", max_new_tokens=4)
    assert isinstance(text, str)
    with fx.accelerate(pipe.model) as handle:
        exact = np.asarray(pipe.generate("a red circle", seed=3, steps=3)).astype(int)
        assert np.abs(exact - np.asarray(dense).astype(int)).max() <= 1
        assert pipe.answer(dense, "what ?", max_new_tokens=4) == text
        assert handle.summary() is not None


def test_a_checkpoint_draws_other_sizes_than_its_config_names(folder: Path):
    pipe = fx.showo2.Pipeline.from_pretrained(folder)
    dense = pipe.generate("a red circle", seed=3, steps=3, size=(64, 128))
    assert dense.size == (128, 64) != (pipe.pixels, pipe.pixels)
    with pipe.accelerate():
        exact = pipe.generate("a red circle", seed=3, steps=3, size=(64, 128))
        assert np.abs(np.asarray(exact).astype(int) - np.asarray(dense).astype(int)).max() <= 1
    for size, message in (
        (100, "multiples of 16 pixels, a patch of this model, got 100"),
        (72, "multiples of 16 pixels, a patch"),
    ):
        with pytest.raises(ValueError, match=f"size: expected {message}"):
            pipe.generate("a red circle", size=size)


def test_a_list_is_drawn_in_one_size(folder: Path, tmp_path: Path):
    from click.testing import CliRunner

    from flashu_ext.cli.main import cli

    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    arguments = ["generate", "--model", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "3"]
    arguments += ["--out", str(tmp_path / "images"), "--batch", "2", "--size"]
    for _ in range(2):  # the second time nothing is missing
        done = CliRunner().invoke(cli, [*arguments, "64x128"])
        assert done.exit_code == 0, done.output
    sizes = [Image.open(path).size for path in sorted((tmp_path / "images").glob("*.png"))]
    assert sizes == [(128, 64)] * 2 and "2 images, 0 of them generated now" in done.output
    other = CliRunner().invoke(cli, [*arguments, "64"])
    assert other.exit_code == 1 and "grid: was [4, 8], now [4, 4]" in other.output


@pytest.mark.parametrize("planned", [False, True])
def test_a_pipeline_is_saved_and_loaded(folder: Path, tmp_path: Path, planned: bool):
    pipe = fx.showo2.Pipeline.from_pretrained(folder)
    dense = pipe.generate("a red circle", seed=3, steps=3)
    if planned:
        shape = pipe.model.config.llm
        scores = torch.rand(shape["num_hidden_layers"], shape["intermediate_size"])
        plan = fx.TaskPlan.from_scores(generation=scores, ratio=0.25, multiple=8)
        fx.accelerate(pipe.model, fx.FlashUConfig(ffn=fx.FfnPruning(0.25, 8)), plan)
    for _ in range(2):  # over itself too
        pipe.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer",
        "vae",
    ]
    again = fx.showo2.Pipeline.from_pretrained(tmp_path / "saved")
    assert again.generate("a red circle", seed=3, steps=3).tobytes() == dense.tobytes()
    assert again.layout.question("what ?")[1].tolist() == pipe.layout.question("what ?")[1].tolist()


def test_what_a_folder_misses_is_said(folder: Path, tmp_path: Path):
    pipe = fx.showo2.Pipeline.from_pretrained(folder)
    pipe.model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*pipe\.save_pretrained"):
        fx.showo2.Pipeline.from_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"VAE.*pipe\.save_pretrained"):
        fx.showo2.Pipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"WanCodec, got NoneType"):
        fx.showo2.Pipeline.from_pretrained("nano").save_pretrained(tmp_path / "nano")
    assert not (tmp_path / "nano").exists()


def test_a_checkpoint_folder_is_calibrated_from_images(folder: Path, tmp_path: Path):
    from click.testing import CliRunner

    from flashu_ext.cli.main import cli

    Image.new("RGB", (70, 50), (200, 30, 30)).save(tmp_path / "a.png")
    (tmp_path / "generation.jsonl").write_text('{"image": "a.png", "prompt": "a red square"}\n')
    (tmp_path / "understanding.jsonl").write_text('{"image": "a.png", "question": "what ?", "answer": "a circle"}\n')
    out = tmp_path / "plan.safetensors"
    arguments = ["calibrate", str(folder), "--data", str(tmp_path), "--out", str(out), "--times", "0.5"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    pipe = fx.showo2.Pipeline.from_pretrained(folder)
    plan = fx.TaskPlan.load(out, model=pipe.model)
    assert plan.kept_neurons == 192 and plan.multiple == 64
    tokens = {task: sums.tokens for task, sums in plan.calibration.sums.items()}
    span = pipe.layout.image_tokens
    # bos, prompt, boi and span, with and without the prompt; system prompt, boi, span, eoi, question, role, answer
    assert tokens["generation"] == 2 * (2 + span) + 3
    before, after = pipe.layout.question("what ?")
    assert tokens["understanding"] == before.shape[1] + span + after.shape[1] + 2
    with fx.accelerate(pipe.model, *pipe.preset("paper", plan)):
        assert pipe.generate("a red circle", steps=4).size == (pipe.pixels, pipe.pixels)


@pytest.mark.parametrize("part", ["tokenizer", "vae"])
def test_missing_parts_are_named(folder: Path, tmp_path: Path, part: str):
    for path in folder.iterdir():
        if path.name != part:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(FileNotFoundError, match="tokenizer" if part == "tokenizer" else "VAE"):
        fx.showo2.Pipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected 'nano' or a folder"):
        fx.showo2.Pipeline.from_pretrained(tmp_path / "nowhere")


def test_nano_generates_and_answers():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    image = pipe.generate("a red circle in the center", seed=0, steps=12)
    assert image.size == (48, 48)
    assert pipe.answer(image, "what color is the circle?") == "red"
    assert pipe.answer(image.resize((200, 100)), "how many objects are there?") in ("one", "two")
    several = pipe.generate_batch(["a red circle", "a blue square"], seeds=[0, 1], steps=6)
    alone = pipe.generate("a blue square", seed=1, steps=6)
    assert np.abs(np.asarray(several[1]).astype(int) - np.asarray(alone).astype(int)).max() <= 1


def test_nano_answers_in_batches_and_samples_answers():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    images = pipe.generate_batch(["a red circle in the center", "a blue square"], seeds=[0, 1], steps=12)
    images.append(images[0])
    questions = ["what color is the circle?", "what color is the square?", "how many objects are there?"]
    sampling = {"temperature": 10.0, "top_k": 40, "top_p": 0.99}
    alone = [pipe.answer(image, question) for image, question in zip(images, questions, strict=True)]
    assert alone[:2] == ["red", "blue"]
    sampled = [pipe.answer(images[0], questions[0], 4, **sampling, seed=seed) for seed in range(8)]
    assert len(set(sampled)) > 1
    for config in (None, fx.FlashUConfig.exact(), fx.FlashUConfig(token_prune_ratio=0.1)):
        handle = fx.accelerate(pipe.model, config) if config is not None else None
        assert pipe.answer_batch(images, questions) == alone
        if config is None or not config.approximates:
            assert pipe.answer_batch(images[:1], questions[:1] * 8, 4, **sampling, seeds=range(8)) == sampled
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("preset", ["dense", "exact"])
def test_an_answer_is_streamed_in_parts(preset):
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    image = pipe.generate("a red circle above a blue square", seed=0, steps=12)
    config, _ = pipe.preset(preset)
    if config is not None:
        fx.accelerate(pipe.model, config)
    pieces = []
    sampling = {"max_new_tokens": 8, "temperature": 10.0, "seed": 1}
    answer = pipe.answer(image, "describe the image", on_text=pieces.append, **sampling)
    assert "".join(pieces) == answer == pipe.answer(image, "describe the image", **sampling) and len(pieces) > 2


@pytest.mark.parametrize("preset", ["dense", "exact"])
def test_questions_are_answered_as_they_come(preset: str):
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    images = [pipe.generate("a red circle", seed, steps=2) for seed in range(3)]
    ask = fx.showo2.QuestionRequest
    asked: list[Any] = [
        ask(images[0], "what color is the circle ?"),
        ask(images[0], ""),
        ask(images[1:], "what is in the image ?", 9, temperature=1.0, top_k=8, seed=3),
        ask("no image", "what ?"),  # type: ignore[arg-type]
        ask(images[1], "what shape is red ?", 0),
        *(ask(images[2], f"is the circle {color} ?", 5) for color in ("red", "blue", "green")),
        "what ?",
    ]
    handle = pipe.accelerate() if preset == "exact" else None
    alone: list[Any] = []
    for each in asked[:-1]:
        try:
            fields = {name: value for name, value in vars(each).items() if name not in ("on_token", "adapter")}
            alone.append(pipe.answer(fields.pop("images"), fields.pop("question"), **fields))
        except Exception as error:
            alone.append(error)
    taken: list[int] = []
    got: dict[int, Any] = {}
    for result in pipe.answer_many((taken.append(i) or each for i, each in enumerate(asked)), at_once=3):  # type: ignore[func-returns-value]
        assert result.request is asked[result.index]
        got[result.index] = result.error or result.answer
    assert taken == sorted(got) == list(range(len(asked)))
    for index, expected in enumerate(alone):
        if isinstance(expected, Exception):
            assert type(got[index]) is type(expected)
        else:
            assert got[index] == expected
    assert "expected a QuestionRequest or its fields" in str(got[len(asked) - 1])
    with pytest.raises(ValueError, match="at_once: expected an integer >= 1, got 0"):
        pipe.answer_many([], 0)
    stopped = pipe.answer_many(asked[:1] * 3)
    next(stopped)
    stopped.close()
    if handle is not None:
        assert pipe.answer(images[0], asked[0].question) == alone[0]
        handle.remove()


def test_an_answer_that_is_cancelled_or_fails_ends_alone():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    image = pipe.generate("a red circle", 0, steps=2)
    told: list[int] = []

    def fail(token: int) -> None:
        raise ZeroDivisionError("of the caller's")

    with pipe.accelerate():
        alone = pipe.answer(image, "what color is the circle ?")
        many = pipe.answer_many()
        for on_token in (told.append, fail, None):
            many.add({"images": image, "question": "what color is the circle ?", "on_token": on_token})
        many.cancel(2)
        first, second = sorted(many, key=lambda result: result.index)
        assert first.answer == alone and told and isinstance(second.error, ZeroDivisionError)


def test_incomplete_characters_are_held_back():
    layout = fx.showo2.Pipeline.from_pretrained("nano").layout
    raw = "né 😀".encode()
    layout = dataclasses.replace(layout, decode=lambda ids: bytes(ids).decode(errors="replace"), eos=0)
    given = ""
    for end in range(1, len(raw) + 1):
        piece = layout.continuation(list(raw[:end]), given)
        given += piece
        assert "\ufffd" not in piece and "né 😀".startswith(given)
    assert given == "né 😀"


@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_nano_accelerated(preset: str):
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    dense = np.asarray(pipe.generate("a green square on the left", seed=1, steps=20)).astype(int)
    with pipe.accelerate(*pipe.preset(preset)):
        fast = np.asarray(pipe.generate("a green square on the left", seed=1, steps=20)).astype(int)
    difference = np.abs(fast - dense)
    assert difference.max() <= 1 if preset == "exact" else difference.mean() < 60


def test_bad_input_is_named():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    with pytest.raises(TypeError, match="prompt"):
        pipe.generate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompts"):
        pipe.generate_batch([])
    with pytest.raises(ValueError, match="seeds"):
        pipe.generate_batch(["a circle"], seeds=[1, 2])
    with pytest.raises(ValueError, match="seed"):
        pipe.generate("a circle", seed=-1)
    with pytest.raises(ValueError, match="steps"):
        pipe.generate("a circle", steps=1)
    with pytest.raises(TypeError, match="image"):
        pipe.answer("out.png", "what ?")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="question"):
        pipe.answer(Image.new("RGB", (8, 8)), " ")
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="seed: expected an integer"):
        pipe.answer(image, "what ?", seed=-1)
    with pytest.raises(ValueError, match="top_p: expected"):
        pipe.answer(image, "what ?", temperature=1.0, top_p=0.0)
    with pytest.raises(ValueError, match="images: expected one, or one for each of 3 questions, got 2"):
        pipe.answer_batch([image, image], ["what ?"] * 3)
    with pytest.raises(TypeError, match="questions: expected a list of strings, got str"):
        pipe.answer_batch([image], "what ?")
    with pytest.raises(TypeError, match="images: expected a list"):
        pipe.answer_batch(image, ["what ?"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset"):
        pipe.preset("fastest")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe.generate_batch(["a", "a"], seeds=1), "seeds: expected a list of integers, got int"),
        (lambda pipe, image: pipe.generate_batch(["a"], seeds="1"), "seeds: expected a list of integers, got str"),
        (lambda pipe, image: pipe.generate("a", seed=True), "seed: expected an integer"),
        (lambda pipe, image: pipe.generate("a", seed=np.float64(1)), "seed: expected an integer"),
        (lambda pipe, image: pipe.generate("a", seed=10**5000), "seed: expected an integer"),
        (lambda pipe, image: pipe.generate("a", size=10**5000), "size: expected at most"),
        (lambda pipe, image: pipe.answer([], "what ?"), "^image: expected at least one image, got an empty list"),
        (lambda pipe, image: pipe.answer([image, np.zeros((8, 8, 3))], "what ?"), r"^image\[1\]: expected a PIL image"),
        (
            lambda pipe, image: pipe.answer_batch([image, 3], ["what ?"] * 2),
            r"^images\[1\]: expected a PIL image, got int",
        ),
        (
            lambda pipe, image: pipe.answer_batch([[image, closed()]], ["what ?"]),
            r"^images\[0\]\[1\]: expected an image that can be read: .*closed",
        ),
        (lambda pipe, image: pipe.answer(image, "what ?", on_text=5), "on_text: expected None or a function, got int"),
        (lambda pipe, image: pipe.answer_batch([image], ["a"], on_token=5), "on_token: expected None or a function"),
        (lambda pipe, image: pipe.answer_batch([image], ["a"], seeds=1), "seeds: expected a list of integers, got int"),
        (
            lambda pipe, image: pipe.own_plan(None).check_model(fx.showo2.Showo2),
            "model: expected .* got the class Showo2",
        ),
        (
            lambda pipe, image: pipe.own_plan(None).check_model(pipe),
            "model: expected a model of a known family.* got Pipeline",
        ),
        (lambda pipe, image: sampled(pipe, callback=5), "callback: expected None or a function, got int"),
        (lambda pipe, image: pipe.answer([image] * 300, "what ?"), "at most 256 tokens.* got .* of 300 images"),
    ],
)
def test_bad_input_is_named_before_work(call: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    monkeypatch.setattr(pipe.model, "forward", None)
    monkeypatch.setattr(pipe.model, "mmu_generate", None)
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        call(pipe, Image.new("RGB", (8, 8)))
    assert len(str(raised.value)) < 200


def sampled(pipe: Any, **more: Any) -> Any:
    return fx.showo2.sample(pipe.model, pipe.noise([0]), **vars(pipe.layout.generation(["a"])), steps=2, **more)


def closed() -> Image.Image:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()))
    image.close()
    return image


def test_integers_of_numpy_are_taken():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    plain = pipe.generate_batch(["a circle"] * 2, [3, 4], 2, size=48)
    for seeds in (np.array([3, 4]), [np.int64(3), np.uint8(4)], range(3, 5)):
        images = pipe.generate_batch(["a circle"] * 2, seeds, 2, size=(np.int64(48), np.int32(48)))
        assert [image.tobytes() for image in images] == [image.tobytes() for image in plain]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype: expected None or a floating dtype.*got 'bf16'"),
        ({"dtype": torch.int8}, "dtype: expected None or a floating dtype.*got torch.int8"),
        ({"device": "gpu"}, "device: expected one of torch's, as 'cpu' or 'cuda', got 'gpu'"),
        ({"device": 1.5}, "device: expected one of torch's, as 'cpu' or 'cuda', got 1.5"),
        ({"device": "cuda"}, "device: expected 'cpu', as torch sees no GPU here, got 'cuda'"),
    ],
)
def test_a_dtype_or_device_that_is_not_there_is_named(
    folder: Path, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("nano", folder):
        with pytest.raises((TypeError, ValueError), match=message):
            fx.showo2.Pipeline.from_pretrained(name, **options)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_of_a_tokenizer_is_named(tmp_path: Path, name: str):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text('{"version": ')
    with pytest.raises(ValueError, match=f"{name}: not a tokenizer's file"):
        load_tokenizer(tmp_path)


def test_prompts_that_are_cut_are_said_once_a_call():
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    limit = pipe.layout.max_text_len
    long = "a " * (limit + 1)
    with pytest.warns(UserWarning) as warned:
        pipe.generate_batch(["a", long, long * 2], steps=2)
    said = rf"prompts\[1\]: cut to the first {limit} of its {limit + 1} tokens.*; 1 more cut too"
    assert len(warned) == 1 and re.match(said, str(warned[0].message))
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.layout.generation(["a " * limit])
