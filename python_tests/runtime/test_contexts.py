"""The context of a call changes no bit of its result: autocast, default dtype and device, determinism, inference mode, grad."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.contexts import CONTEXTS, default_dtype
from support.models import generation_inputs, question_inputs, small_model
from support.work import SETTINGS, accelerate, answer, everything, generate, plan, settings
from torch import Tensor

import flashu_ext as fx
from flashu_ext.calibration.calibrate import GenerationSample, UnderstandingSample
from flashu_ext.models.showo2.sampling import time_grid

pytestmark = pytest.mark.usefixtures("one_thread")


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def moved_into(model: Any, context: str) -> dict[str, Tensor]:
    """`everything` in a context; the caller makes its inputs outside."""
    made = {seed: (generation_inputs(model, seed), question_inputs(seed)) for seed in (1, 2, 3)}
    with pytest.MonkeyPatch.context() as patch, CONTEXTS[context]():
        patch.setattr("support.work.generation_inputs", lambda _, seed: made[seed][0])
        patch.setattr("support.work.question_inputs", lambda seed: made[seed][1])
        return everything(model)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_changes_no_bit(setting: str, context: str) -> None:
    model = small_model()
    with accelerate(model, setting):
        expected = everything(model)
    with accelerate(model, setting):
        equal(moved_into(model, context), expected)
        equal(everything(model), expected)  # with what was kept from the calls inside
        equal(moved_into(model, context), expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_model_is_accelerated_and_restored_in_a_context(context: str) -> None:
    model, twin = small_model(), small_model()
    with accelerate(twin, "paper"):
        expected = everything(twin)
    chosen = plan(model)
    with CONTEXTS[context]():
        handle = fx.accelerate(model, settings("paper"), chosen)
    equal(everything(model), expected)
    with CONTEXTS[context]():
        handle.remove()
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("context", CONTEXTS)
def test_calibration_scores_the_same_neurons(context: str) -> None:
    model = small_model()
    image, question = generation_inputs(model), question_inputs()
    names = ("text_tokens", "text_tokens_null", "modality_positions", "modality_positions_null")
    samples = [GenerationSample(image["noise"], *(image[name] for name in names))]
    questions = [UnderstandingSample(*question.values())]
    expected = fx.calibrate(model, samples, questions, multiple=16, progress=False)
    with CONTEXTS[context]():
        got = fx.calibrate(model, samples, questions, multiple=16, progress=False)
    for task in expected.tasks:
        assert torch.equal(got.scores[task], expected.scores[task])
    assert got.fingerprint == expected.fingerprint


def test_the_embedded_model_loads_and_works_in_each_context() -> None:
    """In separate processes, because some constants are made at import."""
    program = """
import contextlib, hashlib, sys, torch
torch.set_num_threads(1)
context = sys.argv[1]
if context == "dtype": torch.set_default_dtype(torch.bfloat16)
if context == "device": torch.set_default_device("meta")
inside = torch.autocast("cpu", torch.bfloat16) if context == "autocast" else contextlib.nullcontext()
with inside:
    import flashu_ext as fx
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    noise, grid = pipe.noise([0]), fx.showo2.sampling.time_grid(50, 3.0)
    assert noise.dtype == grid.dtype == torch.float32 and noise.device.type == grid.device.type == "cpu"
    config, plan = pipe.preset("paper")
    with fx.accelerate(pipe.model, config, plan):
        image = pipe.generate("a red circle above a blue square", seed=1)
        answer = pipe.answer(image, "what color is the circle ?")
    latents = pipe.encode(image)
    assert latents.dtype == torch.float32
for part in (noise, grid, latents): assert not part.is_meta
print(hashlib.sha256(image.tobytes() + noise.numpy().tobytes() + latents.numpy().tobytes()).hexdigest(), answer)
"""
    outputs = set()
    for context in ("none", "dtype", "device", "autocast"):
        done = subprocess.run([sys.executable, "-c", program, context], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1, outputs


def test_times_and_noise_are_fp32() -> None:
    expected = time_grid(7, 3.0)
    with default_dtype(torch.bfloat16):
        got = time_grid(7, 3.0)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_calls_may_change_between_modes() -> None:
    """State kept for the next call may be an inference tensor, or made under autocast."""
    model = small_model()
    with accelerate(model, "all of it"):
        expected = generate(model, 1), answer(model, 1), answer(model, 2)
        for context in ("inference mode", "grad", "autocast bf16", "inference mode", "deterministic, memory filled"):
            with CONTEXTS[context]():
                got = generate(model, 1), answer(model, 1), answer(model, 2)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), context


def test_inference_tensors_as_inputs() -> None:
    model = small_model()
    with accelerate(model, "paper"):
        expected = everything(model)
        with torch.inference_mode():
            made = {seed: (generation_inputs(model, seed), question_inputs(seed)) for seed in (1, 2, 3)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("support.work.generation_inputs", lambda _, seed: made[seed][0])
            patch.setattr("support.work.question_inputs", lambda seed: made[seed][1])
            equal(everything(model), expected)
