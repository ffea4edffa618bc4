"""The embedded models' pipelines, of every family, and the commands that draw and ask with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import flashu_ext as fx
from flashu_ext.cli.main import cli
from flashu_ext.nano import codec
from flashu_ext.nano.subject import FAMILIES, subject
from flashu_ext.nano.world import Question

PROMPTS = ["a red circle", "a blue square left of a green circle"]
QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return fx.load_pipeline("nano", family=request.param)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments)


def noises(pipe: Any, seeds: list[int]) -> torch.Tensor:
    """What a pipeline draws from, as latents [B, 16, 72, 2] of `Subject.generate`."""
    if pipe.family == "showo2":
        return pipe.noise(seeds)
    if pipe.family == "janusflow":
        return codec.ungrid(pipe.noise(seeds))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = [torch.randn(36, 64, generator=generator) for generator in generators]
    return codec.ungrid(torch.cat([pipe.model.unpacked(row, (48, 48)) for row in rows]))


def test_drawings_and_answers_are_the_subjects(pipe: Any) -> None:
    own, seeds = subject(pipe.family), [3, 5]
    steps = 5 - (pipe.family == "janusflow")  # its pipeline counts evaluations
    images = pipe.generate_batch(PROMPTS, seeds, steps)
    expected = own.generate(pipe.model, PROMPTS, noises(pipe, seeds), 5)
    for image, picture in zip(images, codec.pictures(expected), strict=True):
        assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1
    assert pipe.generate(PROMPTS[1], 5, steps).tobytes() == images[1].tobytes()
    latents = codec.encode(codec.to_unit(np.array(images[1])[None]))
    assert pipe.answer(images[1], QUESTION, 4) == own.answer(pipe.model, latents, Question("color", QUESTION, ""))[0]
    assert pipe.answer_batch([images[1]], [QUESTION], 4) == [pipe.answer([images[1]], QUESTION, 4)]


def test_presets_fit_the_model(pipe: Any) -> None:
    dense = pipe.generate(PROMPTS[0], 1, 6)
    with pipe.accelerate(*pipe.preset("exact")):
        exact = pipe.generate(PROMPTS[0], 1, 6)
    assert np.abs(np.asarray(exact).astype(int) - np.asarray(dense)).max() <= 1
    config, plan = pipe.preset("paper")
    assert (plan.ratio, plan.multiple) == (0.2, 16) and set(plan.tasks) == {"generation", "understanding"}
    with pipe.accelerate(config, plan) as handle:
        assert pipe.generate(PROMPTS[0], 1).size == (48, 48)
        assert f"generation {plan.kept_neurons}" in str(handle.summary())


def test_sizes_are_checked(pipe: Any) -> None:
    assert pipe.grid() == pipe.grid(48) == pipe.grid((48, 48)) and math.prod(pipe.grid()) == 36
    assert pipe.generate(PROMPTS[0], 1, 2, size=48).tobytes() == pipe.generate(PROMPTS[0], 1, 2).tobytes()
    with pytest.raises(ValueError, match="size: expected"):
        pipe.generate_batch(PROMPTS, size=50)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_commands_take_every_family(family: str, tmp_path: Path) -> None:
    out, name = tmp_path / "out.png", ("--family", family)
    result = run("generate", PROMPTS[0], *name, "--steps", "3", "--seed", "2", "-o", str(out))
    assert result.exit_code == 0, result.output
    own = fx.load_pipeline("nano", family=family)
    with fx.accelerate(own.model):
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(own.generate(PROMPTS[0], 2, 3)))
        answered = run("answer", str(out), QUESTION, *name)
        assert answered.exit_code == 0 and own.answer(Image.open(out), QUESTION) in answered.output
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "images"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ("generate", "--prompts", str(prompts), "--out", str(folder), *name, "--steps", "3", "--guidance", "2")
    assert run(*arguments).exit_code == 0
    record = json.loads((folder / "manifest.json").read_text())["settings"]
    assert (record["model"], record["steps"], record["guidance"]) == ("nano", 3, 2.0)
    again = run(*arguments)
    assert again.exit_code == 0 and "0 of them generated now" in again.output
    assert run(*arguments, "--seed", "1").exit_code == 1


def test_a_family_is_given_for_the_embedded_model_alone(tmp_path: Path) -> None:
    result = run("generate", "a", "--family", "bagel", "--model", str(tmp_path), "-o", str(tmp_path / "a.png"))
    assert result.exit_code == 2 and "--family: expected with 'nano' alone" in result.output
    with pytest.raises(ValueError, match="family: expected bagel, janusflow, showo2, got 'flux'"):
        fx.load_pipeline("nano", family="flux")
    with pytest.raises(FileNotFoundError, match="'nowhere': expected 'nano' or a folder with a checkpoint"):
        fx.load_pipeline("nowhere")


def test_branches_run_apart_in_show_o2_alone() -> None:
    with pytest.raises(ValueError, match="sampler: expected none for a bagel model"):
        fx.load_pipeline("nano", family="bagel").generate_batch(["a"], sampler=fx.parallel.sample_guided)


def test_a_janusflow_question_has_one_image(tmp_path: Path) -> None:
    pipe, image = fx.janusflow.Pipeline.from_pretrained("nano"), Image.new("RGB", (48, 48))
    with pytest.raises(ValueError, match=r"image: expected one image, because .*, got 2"):
        pipe.answer([image, image], QUESTION)
    with pytest.raises(TypeError, match=r"image\[0\]: expected"):
        pipe.answer(["a.png"], QUESTION)
