"""The embedded model's world, codec, judge, tokenizer, training step and evaluation."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from flashu_ext.nano import codec
from flashu_ext.nano.evaluate import Proportion, measure_answers
from flashu_ext.nano.judge import judge
from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.nano.showo2 import SUBJECT, nano_config
from flashu_ext.nano.subject import DATA
from flashu_ext.nano.tokenizer import FILE, MAX_TEXT, layout, vocabulary, write_tokenizer
from flashu_ext.nano.world import COLORS, SHAPES, captions, crowded_scene, description, questions, render, scenes


def pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_the_split_is_disjoint_and_covers_both_kinds():
    training, held_out = scenes(False), scenes(True)
    assert not {s.key for s in training} & {s.key for s in held_out}
    assert len(COLORS) >= 4 and len(SHAPES) >= 3
    for count in (1, 2):
        assert len(scenes(True, count)) >= 9
    rng = random.Random(0)
    held = {s.key for s in held_out}
    for _ in range(200):
        crowd = crowded_scene(rng)
        assert not any(crowd.pair(i, j).key in held for i in range(3) for j in range(i + 1, 3))


def test_a_perfect_image_is_always_judged_right_and_a_wrong_one_is_not():
    rng = random.Random(0)
    everything = scenes(False) + scenes(True)
    for scene in everything:
        image = codec.pictures(codec.encode(pixels(render(scene, rng))))[0]
        assert judge(image, scene).right, scene.key
        other = rng.choice([s for s in everything if s.key != scene.key])
        assert not judge(image, other).right, f"{scene.key} passed for {other.key}"
    blank = np.full((48, 48, 3), 236, dtype=np.uint8)
    assert not any(judge(blank, scene).right for scene in everything)


def test_answers_follow_from_the_scene():
    rng = random.Random(1)
    for scene in scenes(False):
        for question in questions(scene, rng):
            names = {o.name for o in scene.objects}
            if question.kind == "color":
                shape = question.text.split()[-2]
                assert [o.color for o in scene.objects if o.shape == shape] == [question.answer]
            if question.text.startswith("is there a"):
                assert (question.text[len("is there a ") : -2] in names) == (question.answer == "yes")
        assert all(name in description(scene).answer for name in {o.name for o in scene.objects})


def test_codec_keeps_what_matters_and_checks_shapes():
    scene = scenes(False)[0]
    image = pixels(render(scene))
    assert (codec.decode(codec.encode(image)) - image).abs().mean() < 0.02
    with pytest.raises(ValueError, match="images"):
        codec.encode(image[:, :, :40])
    with pytest.raises(ValueError, match="latents"):
        codec.decode(torch.zeros(1, 16, 36, 4))


def test_tokenizer_file_is_what_the_world_needs(tmp_path: Path):
    write_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == FILE.read_bytes()
    words = layout()
    unknown = words.encode("zebra")[0]
    assert len(vocabulary()) == nano_config().llm_vocab_size
    for scene in scenes(True):
        for caption in captions(scene):
            ids = words.encode(caption)
            assert unknown not in ids and len(ids) <= MAX_TEXT
            assert words.decode(ids) == caption


def test_shipped_files():
    assert (DATA / "model.safetensors").stat().st_size <= 12e6
    model = load_model()
    plan = load_plan(model)
    assert set(plan.tasks) == {"generation", "understanding"}
    assert not torch.equal(plan.kept("generation", 0), plan.kept("understanding", 0))
    assert nano_config().image_latent_height * nano_config().image_latent_width >= 36
    assert sum(p.numel() for p in model.parameters()) < 4e6


def test_the_model_answers_questions_about_scenes_it_never_saw():
    """Far below what `nano.evaluate` reports, far above chance."""
    import flashu_ext as fx

    model = load_model()
    with fx.accelerate(model):
        assert measure_answers(model, scenes(True), 60)["all"].value > 0.75


def test_a_training_step_is_seeded_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from flashu_ext.nano import train

    monkeypatch.setattr(train, "PHASES", (train.Phase(3, 4, 4, 0.5, False, 0.9), train.Phase(3, 2, 4, 1.0, True, 0.9)))
    monkeypatch.setattr(train, "VARIANTS", 1)
    monkeypatch.setattr(train, "LOOSE_VARIANTS", 1)
    monkeypatch.setattr(train, "CROWDED", 20)
    settings = train.Settings(phases=2)
    data = train.Data(0)
    once, again = train.Trainer(settings, data, torch.device("cpu")), train.Trainer(settings, data, torch.device("cpu"))
    first = [once.step(i) for i in range(4)]
    assert all(np.isfinite(pair).all() for pair in first)
    for i in range(2):
        again.step(i)
    again.save(tmp_path / "run.pt", 2)
    resumed = train.Trainer(settings, data, torch.device("cpu"))
    assert resumed.resume(tmp_path / "run.pt") == 2
    assert [resumed.step(i) for i in range(2, 4)] == first[2:]  # a resumed run is the run
    other = train.Trainer(train.Settings(phases=2, seed=1), data, torch.device("cpu"))
    with pytest.raises(ValueError, match="other settings"):
        other.resume(tmp_path / "run.pt")


def test_share_and_presets():
    assert Proportion(0, 0).interval == (0.0, 1.0)
    low, high = Proportion(90, 100).interval
    assert 0.82 < low < 0.9 < high < 0.95
    assert SUBJECT.preset_config("dense") is None and SUBJECT.preset_config("paper", 20).steps == 20
    with pytest.raises(ValueError, match="preset"):
        SUBJECT.preset_config("slow")
