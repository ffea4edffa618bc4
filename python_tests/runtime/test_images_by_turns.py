"""Upstream's loop on an accelerated model: whose call it is, and what a schedule of steps refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conformance import relative
from support.living import CALLS, LIMIT, STEPS, UP, halved, outputs
from support.models import LENGTH, generation_inputs, small_model
from torch import Tensor

import flashu_ext as fx

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_an_image_in_progress_ends_where_weights_change() -> None:
    model = small_model()

    def edit(step: int, latents: Tensor) -> None:
        if step == 2:
            halved(model, UP)
            CALLS["answer_tokens"](model)

    with fx.accelerate(model, fx.FlashUConfig.exact()):
        with pytest.raises(RuntimeError, match="while this image was being generated"):
            fx.showo2.sample(model, **generation_inputs(model), steps=STEPS, callback=edit)
        assert relative(outputs(model)[0], outputs(copy.deepcopy(model))[0]) < LIMIT


# ---- modules that run as themselves


def test_images_of_one_batch_have_guidance_scales_of_their_own():
    model = small_model()
    inputs = generation_inputs(model, images=2) | {"steps": 5}
    scales = (2.0, 5.0)
    alone = [fx.showo2.sample(model, **inputs | {"guidance_scale": scale})[i] for i, scale in enumerate(scales)]
    assert torch.equal(fx.showo2.sample(model, **inputs | {"guidance_scale": scales}), torch.stack(alone))
    with fx.accelerate(model):
        together = fx.showo2.sample(model, **inputs | {"guidance_scale": torch.tensor(scales)})
        assert relative(together, torch.stack(alone)) < 1e-5
        for wrong in ([2.0], [0.0, 2.0], [float("nan"), 2.0], "high"):
            with pytest.raises(ValueError, match="guidance_scale: expected"):
                fx.showo2.sample(model, **inputs | {"guidance_scale": wrong})
    with fx.accelerate(model, fx.FlashUConfig(steps=5, head_cache_interval=2, batch_invariant=False)):
        with pytest.raises(ValueError, match="steps: expected None or 5"):
            fx.showo2.sample(model, **inputs | {"guidance_scale": scales, "steps": 6})
        assert fx.showo2.sample(model, **inputs | {"guidance_scale": scales}).isfinite().all()


def test_a_model_that_a_callback_changes_ends_its_image():
    model = small_model()

    def change(step: int, _latents: Tensor) -> None:
        if step == 2:
            with torch.no_grad():
                model.showo.model.norm.weight.mul_(2)

    with fx.accelerate(model):
        with pytest.raises(RuntimeError, match="changed while this image"):
            fx.showo2.sample(model, **generation_inputs(model), steps=5, callback=change)
        assert outputs(model)[0].isfinite().all()


def calls(model: Any, changes: Callable[[int], dict[str, Any]], times: list[float]) -> None:
    """Upstream's loop over times, with other arguments at some calls."""
    i = generation_inputs(model, images=1)
    given = {
        "image_latents": i["noise"].repeat(2, 1, 1, 1),
        "text_tokens": torch.cat([i["text_tokens"], i["text_tokens_null"]]),
        "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
        "guidance_scale": 3.0,
    }
    for index, time in enumerate(times):
        call = given | changes(index)
        model.t2i_generate(t=torch.full((call["image_latents"].shape[0],), time), **call)


@pytest.mark.parametrize(
    ("times", "changes"),
    [
        ([1.0, 0.7, 0.4], lambda index: {}),
        ([0.0, 0.3, 0.6], lambda index: {"guidance_scale": 0.0} if index == 2 else {}),
        (
            [0.0, 0.3, 0.6],
            lambda index: (
                {name: value[:1] for name, value in rows().items()} | {"guidance_scale": 0.0} if index == 2 else {}
            ),
        ),
    ],
    ids=["time goes back", "guidance ends", "rows end"],
)
def test_a_schedule_that_would_begin_anew_in_the_middle_is_refused(times, changes):
    model = small_model()
    with fx.accelerate(model, fx.FlashUConfig(steps=5, head_cache_interval=2)):
        with pytest.raises(RuntimeError, match="cannot continue its image"):
            calls(model, changes, times)
        calls(model, lambda index: {}, [0.0, 0.3])


def rows() -> dict[str, Tensor]:
    i = generation_inputs(small_model(), images=1)
    return {
        "image_latents": i["noise"],
        "text_tokens": i["text_tokens"],
        "modality_positions": i["modality_positions"],
    }


def test_a_soft_mask_runs_the_models_own_method():
    model, dense = small_model(), small_model()
    i = generation_inputs(model, images=1)
    mask = model.omni_mask(i["modality_positions"], i["text_tokens"].shape[1])
    call = {"image_latents": i["noise"], "t": torch.zeros(1), "text_tokens": i["text_tokens"],
            "modality_positions": i["modality_positions"], "attention_mask": mask.clamp_min(-1.0)}  # fmt: skip
    with fx.accelerate(model) as handle:
        assert relative(model.t2i_generate(**call), dense.t2i_generate(**call)) < LIMIT
        assert any("mask" in reason for reason in handle.summary().fallbacks)


def test_ended_images_free_their_memory():
    model = small_model()
    freed = []
    with fx.accelerate(model, fx.FlashUConfig(steps=3, head_cache_interval=2)) as handle:
        for turn in range(4):
            prompt = {"text_tokens": torch.full((2, LENGTH), turn)}
            calls(model, lambda index, prompt=prompt: prompt, [0.0, 0.5])
            image = handle._upstream._images[-1]
            assert image.ended and not image.states
            freed.append(len(handle.runner.generation.pool.graphs()))
    assert freed == [0] * 4, "without graphs memory is not pooled"


def test_equal_prompts_are_known_by_their_values():
    """A caller that makes its tensors anew for each call: one image all the same."""
    model = small_model()
    with fx.accelerate(model) as handle:
        calls(
            model,
            lambda index: {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in rows().items()},
            [0.0, 0.5],
        )
        assert handle.runner.last_image.step == 2
