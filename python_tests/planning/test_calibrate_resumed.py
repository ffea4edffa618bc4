"""Calibration that is interrupted and goes on from its checkpoint."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from support.calibration import generation_samples, questions, run, same
from support.conformance import public

from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.planning.safe_files import load_safetensors, save_safetensors


def interrupted(samples, after):
    yield from islice(samples, after)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("generated", "asked", "interval"), [(3, 0, 1), (3, 0, 2), (5, 2, 3), (5, 4, 4)])
def test_an_interrupted_run_is_resumed_to_the_same_bits(tmp_path, generated, asked, interval):
    model, file = public().model(), tmp_path / "state.safetensors"
    whole = run(model, generation_samples(5), questions(5))
    stop = {"generation": interrupted(generation_samples(5), generated) if generated < 5 else generation_samples(5)}
    stop["understanding"] = interrupted(questions(5), asked)
    with pytest.raises(KeyboardInterrupt):
        run(model, **stop, checkpoint=file, checkpoint_interval=interval)
    assert file.exists()
    passes = []
    hook = model.image_embedder_gen.register_forward_pre_hook(lambda *_: passes.append(0))
    resumed = run(model, generation_samples(5), questions(5), checkpoint=file, checkpoint_interval=interval)
    hook.remove()
    assert same(whole, resumed)
    done = (generated + asked) // interval * interval
    assert len(passes) == 2 * (5 - min(done, 5)) + 5 - max(done - 5, 0), "samples seen before are not run again"
    assert list(tmp_path.iterdir()) == [], "a finished run deletes its checkpoint"
    again = {"checkpoint": file, "checkpoint_interval": 100, "keep_checkpoint": True}
    run(model, generation_samples(5), questions(5), **again)
    assert file.exists(), "it is the caller's"
    assert same(whole, run(model, generation_samples(5), questions(5), **again))


@pytest.fixture
def half_way(tmp_path):
    """A model, and the checkpoint of its interrupted run."""
    model, file = public().model(), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted(generation_samples(4), 3), questions(), checkpoint=file, checkpoint_interval=3)
    return model, file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": (0.5,)}, r"times was \[0.25, 0.75\], is \[0.5\]; delete the file"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"understanding": ()}, r"tasks was \['generation', 'understanding'\], is \['generation'\]"),
        (
            {"generation": generation_samples(4, seed=5)},
            "checkpoint of other samples: the first 3 of generation differ",
        ),
        ({"generation": generation_samples(2)}, "checkpoint of 3 samples of generation, got 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(half_way, change, message):
    model, file = half_way
    content = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(model, **{"generation": generation_samples(4), "understanding": questions(), "checkpoint": file, **change})
    assert file.read_bytes() == content


def test_a_checkpoint_of_another_model_is_refused(half_way):
    model, file = half_way
    with torch.no_grad():
        model.showo.model.layers[2].self_attn.q_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="checkpoint of another calibration: fingerprint was"):
        run(model, generation_samples(4), questions(), checkpoint=file)


def test_options_chosen_after_calibration_may_change(half_way):
    model, file = half_way
    resumed = run(model, generation_samples(4), questions(), checkpoint=file, estimator="flap", ratio=0.5, multiple=32)
    assert same(resumed.with_estimator("wanda"), run(model, generation_samples(4), questions()))
    assert (resumed.estimator, resumed.kept_neurons) == ("flap", 128)


def test_a_damaged_checkpoint_is_refused(half_way):
    model, file = half_way
    content = file.read_bytes()
    tensors, metadata = load_safetensors(file)
    header = metadata["calibration"]

    def refused(message):
        with pytest.raises(ValueError, match=message):
            run(model, generation_samples(4), questions(), checkpoint=file)

    file.write_bytes(content[:-3])
    refused("truncated or padded")
    load_plan(load_model()).save(file)
    refused("expected a calibration checkpoint")
    for change, message in (
        (("flashu_ext.calibration", "other"), "expected format"),
        (('"samples": 3', '"samples": -3'), "not valid"),
        (('"kind": "generation"', '"kind": "dreaming"'), "not valid"),
        (('"tokens"', '"words"'), "expected kind, samples, tokens and digest"),
    ):
        assert change[0] in header
        save_safetensors(file, tensors, {"calibration": header.replace(*change, 1)})
        refused(message)
    for name, value in (("total.generation", torch.zeros(3)), ("more", torch.zeros(1))):
        save_safetensors(file, {**tensors, name: value}, metadata)
        refused("expected")
