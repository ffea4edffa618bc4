"""The embedded models of every family: what they are trained on is what drawing and answering compute."""

from __future__ import annotations

import random
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import flashu_ext as fx
from flashu_ext.cli.main import cli
from flashu_ext.models.adapter import adapter_of
from flashu_ext.nano import codec
from flashu_ext.nano import subject as subjects
from flashu_ext.nano.evaluate import make_noise
from flashu_ext.nano.model import load_model
from flashu_ext.nano.subject import FAMILIES, subject
from flashu_ext.nano.world import questions, render, scenes

PROMPTS = ["a red circle", "a blue square on the left", "a red circle left of a blue square"]


def rough_model(family: str) -> Any:
    """A model whose layers all matter."""
    torch.manual_seed(7)
    model = subject(family).build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def picture_latents(count: int, seed: int) -> tuple[torch.Tensor, list[Any]]:
    """Latents [count, 16, 72, 2] and a question about each."""
    rng = random.Random(seed)
    chosen = rng.sample(scenes(held_out=False), count)
    latents = torch.cat([codec.encode(codec.to_unit(render(scene, rng)[None])) for scene in chosen])
    return latents, [rng.choice(questions(scene, rng)) for scene in chosen]


def guided(family: str, prompt: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Velocities of both branches [B, ...] as drawing combines them."""
    both = null + scale * (prompt - null)
    if family == "bagel":  # its norm is brought back to the prompt's, never enlarged
        shrunk = prompt.flatten(1).norm(dim=1) / both.flatten(1).norm(dim=1)
        both = both * shrunk.clamp(max=1)[:, None, None, None]
    return both


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_training_velocity_is_that_of_a_drawing(family: str) -> None:
    """With two grid points the only step goes all the way: the image is the noise and the guided velocity at time 0."""
    model, own = rough_model(family), subject(family)
    noise = make_noise(len(PROMPTS), 3)
    drawn = torch.cat(
        [own.generate(model, [prompt], each, 2) for prompt, each in zip(PROMPTS, noise.split(1), strict=True)]
    )
    start = torch.zeros(len(PROMPTS))
    prompt, null = (own.velocity(model, PROMPTS, torch.full((3,), alone), noise, start) for alone in (False, True))
    expected = guided(family, prompt, null, own.guidance)
    assert (prompt - null).norm() > 0.1 * prompt.norm()
    assert (drawn - noise - expected).norm() < 1e-4 * expected.norm()
    together = own.generate(model, PROMPTS, noise, 2)
    assert (together - drawn).norm() < 1e-4 * drawn.norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_answers_in_a_batch_as_alone(family: str) -> None:
    """Questions of other lengths, whose rows are padded."""
    model, own = rough_model(family), subject(family)
    latents, asked = picture_latents(4, 9)
    logits, words = own.answered(model, latents, asked)
    alone = [own.answered(model, row, [question]) for row, question in zip(latents.split(1), asked, strict=True)]
    assert torch.equal(words, torch.cat([each for _, each in alone]))
    assert (logits - torch.cat([each for each, _ in alone])).norm() < 1e-4 * logits.norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_training_answer_is_what_the_model_says(family: str) -> None:
    """The first word that the model answers is the most likely one in training."""
    model, own = rough_model(family), subject(family)
    latents, asked = picture_latents(3, 5)
    for row, question in zip(latents.split(1), asked, strict=True):
        _, tokens = own.answer(model, row, question)
        logits, _ = own.answered(model, row, [question])
        assert int(logits[0].argmax()) == tokens[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_and_costs_are_known_before_anything_runs(family: str) -> None:
    with torch.device("meta"):
        model = subject(family).build()
    rows = fx.kernel_sets.describe(model, subject(family).preset_config("exact"), device="cpu").rows
    assert {row.task for row in rows} == {"generation", "understanding"}
    of = {(row.task, row.phase, row.op): row for row in rows}
    assert of["generation", "head", "guided_euler_step_"].shape == "2 x 36 x 64"
    assert of["generation", "backbone", "rms_norm"].runs == (30 if family == "janusflow" else 49)
    span = 36 + {"showo2": 1, "janusflow": 1, "bagel": 2}[family]
    assert of["generation", "backbone", "attention"].shape.endswith(f"{40 + span} keys")
    assert of["understanding", "prefill", "attention"].shape.endswith(f"{24 + span} keys")
    assert (("generation", "embed", "attention") in of) == (family == "showo2")
    assert of["understanding", "embed", "attention"].gflop > 0
    shape = adapter_of(model).shape()
    widths = {"showo2": (128, 64, 384), "janusflow": (128, 128, 352), "bagel": (96, 48, 320)}
    hidden, key_value, neurons = widths[family]
    assert len(shape.layers) == 6
    for layer in shape.layers:
        assert layer.key_value == 2 * 2 * hidden * key_value and layer.attention == 2 * 2 * hidden * hidden
        assert layer.ffn == 3 * 2 * hidden * neurons and layer.neurons == neurons


def test_weights_in_a_package_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A source folder has them; an installed package finds the other one, or names it."""
    assert subjects.subject("bagel").folder.parent.parent.name == "nano_weights"
    monkeypatch.setattr(subjects, "DATA", tmp_path / "site/flashu_ext/nano/data")
    spec = ModuleSpec(subjects.WEIGHTS, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "installed")]
    monkeypatch.setattr(subjects, "find_spec", lambda name: spec if name == subjects.WEIGHTS else None)
    assert subjects.folder_in_weights("bagel") == tmp_path / "installed/bagel"
    monkeypatch.setattr(subjects, "find_spec", lambda name: None)
    missing = subjects.folder_in_weights("bagel")
    monkeypatch.setattr(type(subjects.subject("bagel")), "folder", missing)
    with pytest.raises(
        FileNotFoundError, match=r"the embedded bagel is in the package .*: pip install flashu_ext_nano"
    ):
        load_model(missing)
    with pytest.raises(FileNotFoundError, match=r"flashu_ext[.]nano[.]train"):
        load_model(tmp_path)
    result = CliRunner().invoke(cli, ["demo", "--family", "bagel", "--out", str(tmp_path / "demo")])
    assert result.exit_code != 0 and "pip install flashu_ext_nano" in result.output
