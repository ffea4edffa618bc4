"""The pipeline for diffusers: the same images as our own pipelines, steps, noise, callbacks, refusals, folders."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.conformance import FIXTURES, public
from support.pipelines import small_kl_vae, small_wan_vae, write_byte_tokenizer
from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.comparison import Fixture
from flashu_ext.nano.subject import FAMILIES, subject

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'flashu_ext[vae]'")

from flashu_ext.hosts.diffusers import FlashuPipeline, Parts  # noqa: E402

PROMPTS = ["a red circle", "a blue square", "a red circle left of a blue square"]
POINTS = {"showo2": 1, "janusflow": 0, "bagel": 1}
"""What `steps` of our own pipelines is more than evaluations."""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """diffusers copies custom pipelines into a folder of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def loaded(folder: Path, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=fx.hosts.diffusers_pipeline(), trust_remote_code=True, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = loaded(subject(request.param).folder)
    pipe.family = request.param
    return pipe


@pytest.fixture(scope="module")
def showo2() -> Any:
    return loaded(subject("showo2").folder)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own(pipe: Any, prompt: str, seed: int, evaluations: int | None, scale: float = 2.5) -> Any:
    """The image of our own pipeline."""
    steps = None if evaluations is None else evaluations + POINTS[pipe.family]
    if pipe.family == "bagel":
        return pipe.pipeline.generate(prompt, seed, steps, size=48, text_guidance=scale)
    return pipe.pipeline.generate(prompt, seed, steps, scale)


def same(image: Any, other: Any) -> bool:
    return bool(image.size == other.size and image.tobytes() == other.tobytes())


# ---- images


@pytest.mark.parametrize("preset", ["dense", "exact", "paper"])
def test_images_are_our_own_pipelines_bit_by_bit(pipe: Any, preset: str) -> None:
    config, plan = pipe.preset(preset)
    handle = None if config is None else pipe.accelerate(config, plan)
    try:
        out = pipe(PROMPTS[0], num_inference_steps=8, guidance_scale=2.5, generator=seeded(3))
        assert isinstance(out, diffusers.ImagePipelineOutput) and len(out.images) == 1
        assert same(out.images[0], own(pipe, PROMPTS[0], 3, 8))
        assert handle is None or handle.summary().backbone_evaluations > 0
    finally:
        if handle is not None:
            handle.remove()
    assert fx.handle_of(pipe) is None


def test_accelerated_images_are_the_same_in_any_company(pipe: Any) -> None:
    with fx.accelerate(pipe.model, fx.FlashUConfig.exact()):
        images = pipe(
            PROMPTS,
            num_inference_steps=np.int64(4),
            guidance_scale=2.5,
            num_images_per_prompt=2,
            generator=[seeded(seed) for seed in range(6)],
        ).images
        expected = [own(pipe, PROMPTS[index // 2], index, 4) for index in range(6)]
    assert all(map(same, images, expected)) and len(images) == 6
    assert len({image.tobytes() for image in images}) == 6


def test_steps_are_evaluations_each_with_a_callback(pipe: Any) -> None:
    calls: list[Any] = []

    def callback(of: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        assert of is pipe and of.num_timesteps == 5
        calls.append((step, float(time), values["latents"]))
        return values

    latents = pipe(
        PROMPTS[0], num_inference_steps=5, output_type="latent", generator=seeded(0), callback_on_step_end=callback
    ).images
    assert [step for step, _, _ in calls] == [0, 1, 2, 3, 4]
    assert torch.equal(calls[-1][2], latents) and not torch.equal(calls[0][2], latents)
    times = [time for _, time, _ in calls]
    first, last = {"showo2": (0, 1), "janusflow": (0, 1000), "bagel": (1, 0)}[pipe.family]
    assert times[0] == first and (times == sorted(times, reverse=last < first))


def test_default_steps_are_the_familys_or_the_configs(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []

    def callback(of: Any, step: int, time: Any, values: dict[str, Any]) -> None:
        assert values == {}
        steps.append(step)

    told = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [], "generator": seeded(1)}
    dense = pipe(PROMPTS[0], guidance_scale=2.5, **told).images[0]
    assert len(steps) == {"showo2": 49, "janusflow": 30, "bagel": 49}[pipe.family] == pipe.num_timesteps
    assert same(dense, own(pipe, PROMPTS[0], 1, None))
    steps.clear()
    with pipe.accelerate(fx.FlashUConfig.exact().replace(steps=5)):
        pipe.set_progress_bar_config(leave=True)
        pipe(PROMPTS[0], **told)
        pipe.set_progress_bar_config(disable=True)
    assert steps == [0, 1, 2, 3] and "4/4" in capsys.readouterr().err


# ---- noise


def test_noise_is_the_generators(pipe: Any) -> None:
    def drawn(count: int = 2, **noise: Any) -> Tensor:
        settings = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": count}
        latents: Tensor = pipe(PROMPTS[0], **settings, **noise).images
        return latents

    with pipe.accelerate():  # whose images are the same in any company
        one = drawn(generator=seeded(7))
        after = seeded(7)
        assert torch.equal(one[0], drawn(1, generator=after)[0])
        assert torch.equal(one[1], drawn(1, generator=after)[0])  # images draw from one generator in order
        several = drawn(generator=[seeded(7), seeded(8)])
        assert torch.equal(several[0], one[0]) and not torch.equal(several[1], one[1])
        torch.manual_seed(7)
        assert torch.equal(drawn(), one)
        if pipe.family != "bagel":  # which draws token by token, as upstream
            noise = torch.randn(one.shape, generator=seeded(7))
            assert torch.equal(drawn(latents=noise), one)
            assert torch.equal(drawn(latents=noise.double()), one)


def test_latents_are_the_noise_and_are_left_as_they_are(pipe: Any) -> None:
    shape = pipe(PROMPTS[0], num_inference_steps=1, output_type="latent").images.shape
    noise = torch.randn((2, *shape[1:]), generator=seeded(0))
    kept = noise.clone()
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    both = pipe(PROMPTS[:2], latents=noise, **settings).images
    alone = [pipe(p, latents=noise[i : i + 1], **settings).images[0] for i, p in enumerate(PROMPTS[:2])]
    torch.testing.assert_close(both, torch.stack(alone), rtol=0, atol=1e-5)
    assert torch.equal(noise, kept)


# ---- output


def test_outputs_are_the_same_image(pipe: Any) -> None:
    def drawn(kind: str, **more: Any) -> Any:
        return pipe(PROMPTS[0], num_inference_steps=2, generator=seeded(0), output_type=kind, **more)

    pixels = np.asarray(drawn("pil").images[0])
    array, tensor = drawn("np").images, drawn("pt").images
    assert array.shape == (1, 48, 48, 3) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.abs(array[0] * 255 - pixels).max() <= 0.5001
    latents = drawn("latent").images
    assert np.array_equal(np.asarray(pipe.pipeline.pictures(latents)[0]), pixels)
    answer = drawn("pil", return_dict=False)
    assert type(answer) is tuple and same(answer[0][0], drawn("pil").images[0])


# ---- callbacks


@pytest.mark.parametrize("preset", ["dense", "exact"])
def test_an_interrupted_image_is_what_it_was_by_then(pipe: Any, preset: str) -> None:
    config, plan = pipe.preset(preset)
    handle = None if config is None else pipe.accelerate(config, plan)
    seen: list[Tensor] = []

    def callback(of: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"])
        of._interrupt = step == 1
        return values

    prompts = [PROMPTS[0], PROMPTS[2]]  # of other lengths
    shape = pipe(PROMPTS[0], num_inference_steps=1, output_type="latent").images.shape[1:]
    noise = torch.randn((2, *shape), generator=seeded(0))
    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "latents": noise}
    try:
        whole = pipe(prompts, **settings).images
        out = pipe(prompts, callback_on_step_end=callback, **settings).images
        assert len(seen) == 2 and pipe.interrupt
        drawn = len(seen[1])
        assert torch.equal(out[:drawn], seen[1]) and not torch.equal(out[:drawn], whole[:drawn])
        assert drawn == (2 if pipe.family == "showo2" else 1)
        assert torch.equal(out[drawn:], noise[drawn:])  # not begun
        assert torch.equal(pipe(prompts, **settings).images, whole) and not pipe.interrupt
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", ["in place", "returned"])
def test_latents_are_not_replaced_by_a_callback(pipe: Any, change: str, inference: bool) -> None:
    def callback(of: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            latents = values["latents"]
            return {"latents": latents.add_(1) if change == "in place" else latents + 1}
        return values

    def drawn(**more: Any) -> Any:
        return pipe(PROMPTS[0], num_inference_steps=3, generator=seeded(0), **more).images[0]

    with pipe.accelerate(), torch.inference_mode(inference):
        before = drawn()
        with pytest.raises(ValueError, match="callback_on_step_end: expected the latents as they came"):
            drawn(callback_on_step_end=callback)
        assert same(drawn(), before)


# ---- what is refused

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 1}, "prompt: expected a string"),
    ({"prompt": []}, "prompt: expected a string"),
    ({"prompt": ["a", None]}, "prompt: expected a string"),
    ({"height": 41}, "height, width: size: expected"),
    ({"height": 4096, "width": 4096}, "height, width: size: expected"),
    ({"width": 0}, "width: expected an integer >= 1"),
    ({"num_inference_steps": 0}, "num_inference_steps: expected an integer in [1, 9999]"),
    ({"num_inference_steps": 2.5}, "num_inference_steps: expected an integer in [1, 9999]"),
    ({"num_inference_steps": 10**30}, "num_inference_steps: expected an integer in [1, 9999]"),
    ({"guidance_scale": -1}, "guidance_scale: expected a finite number >= 0"),
    ({"guidance_scale": [1.0]}, "guidance_scale: expected a finite number >= 0"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected an integer in "),
    ({"num_images_per_prompt": None}, "num_images_per_prompt: expected an integer in "),
    ({"num_images_per_prompt": 10**12}, "num_images_per_prompt: expected an integer in [1, 10000]"),
    ({"generator": 3}, "generator: expected a torch.Generator"),
    ({"generator": [torch.Generator()] * 2}, "generator: expected one for each of 1 images, got 2"),
    ({"latents": "noise"}, "latents: expected a floating-point tensor"),
    ({"latents": torch.zeros(1, 3, 4, 4)}, "latents: expected [1, 16, "),
    ({"latents": torch.full((1, 16, 72, 2), float("nan"))}, "latents: expected "),
    ({"latents": torch.zeros(1, 16, 72, 2).to_sparse()}, "latents: expected a floating-point tensor with values"),
    ({"output_type": "jpeg"}, "output_type: expected one of pil, np, pt, latent"),
    ({"callback_on_step_end": 3}, "callback_on_step_end: expected None or a function"),
    (
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        "callback_on_step_end_tensor_inputs: expected a part of",
    ),
    ({"callback_on_step_end_tensor_inputs": 3}, "callback_on_step_end_tensor_inputs: expected a part of"),
    ({"seed": 3}, "seed: not supported by FlashuPipeline: give a generator"),
    ({"negative_prompt": "a"}, "negative_prompt: not supported by FlashuPipeline"),
    ({"timesteps": [1]}, "timesteps: not supported by FlashuPipeline: the steps in time are the model's own"),
    ({"cross_attention_kwargs": {}}, "cross_attention_kwargs: not supported by FlashuPipeline"),
]


@pytest.mark.parametrize("arguments, message", ARGUMENTS, ids=[str(list(each)) for each, _ in ARGUMENTS])
def test_a_wrong_argument_is_named_and_nothing_drawn(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    def told(*_: Any) -> None:
        raise AssertionError("drawn")

    given = {"prompt": "a red circle", "callback_on_step_end": told, **arguments}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        pipe(**given)


def test_a_callback_of_diffusers_that_changes_embeddings_is_refused(showo2: Any) -> None:
    callback = pytest.importorskip("diffusers.callbacks").SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs: expected a part of .*prompt_embeds"):
        showo2(PROMPTS[0], num_inference_steps=2, callback_on_step_end=callback)


def test_guidance_of_zero_is_the_prompt_alone(showo2: Any) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    alone = showo2(PROMPTS[0], guidance_scale=0, generator=seeded(0), **settings).images
    one = showo2(PROMPTS[0], guidance_scale=1, generator=seeded(0), **settings).images
    torch.testing.assert_close(alone, one, rtol=0, atol=1e-4)


METHODS: dict[str, tuple[Any, ...]] = {
    "enable_model_cpu_offload": (),
    "enable_sequential_cpu_offload": (),
    "enable_group_offload": (torch.device("cpu"),),
    "enable_attention_slicing": (),
    "enable_xformers_memory_efficient_attention": (),
    "load_lora_weights": ("folder",),
    "from_pipe": (None,),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_means_nothing_here_is_refused(showo2: Any, method: str) -> None:
    with pytest.raises(NotImplementedError, match="not supported by FlashuPipeline: "):
        getattr(showo2, method)(*METHODS[method])
    if method in ("enable_attention_slicing", "enable_xformers_memory_efficient_attention"):
        getattr(showo2, method.replace("enable", "disable"))()


@pytest.mark.parametrize("name", ["scheduler", "vae", "tokenizer", "text_encoder", "transformer", "unet"])
def test_another_component_is_refused(showo2: Any, name: str) -> None:
    message = f"{name}: not supported by FlashuPipeline: "
    folder = subject("showo2").folder
    other = diffusers.EulerDiscreteScheduler() if name == "scheduler" else object()
    with pytest.raises(TypeError, match=message):
        setattr(showo2, name, other)
    for load in (loaded, FlashuPipeline.from_pretrained):
        with pytest.raises(TypeError, match=message):
            load(folder, **{name: other})
    assert set(showo2.components) == {"parts"}


@pytest.mark.parametrize("option", [{"variant": "fp16"}, {"use_safetensors": False}, {"device_map": "balanced"}])
def test_an_option_of_loading_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(option))}: not supported by FlashuPipeline"):
        FlashuPipeline.from_pretrained(subject("showo2").folder, **option)


def test_a_map_of_devices_is_refused() -> None:
    with pytest.raises(
        NotImplementedError, match="device_map: not supported by FlashuPipeline: a folder is loaded whole"
    ):
        loaded(subject("showo2").folder, device_map="balanced")


# ---- devices and dtypes


@pytest.mark.parametrize("accelerated", [False, True])
def test_to_changes_the_models_dtype(pipe: Any, accelerated: bool) -> None:
    pipe = FlashuPipeline(copy.deepcopy(pipe.pipeline))
    pipe.set_progress_bar_config(disable=True)
    expected = copy.deepcopy(pipe.pipeline)
    expected.model.to(torch.bfloat16)
    if accelerated:
        pipe.accelerate(fx.FlashUConfig.exact())
        fx.accelerate(expected.model, fx.FlashUConfig.exact())
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.5, "output_type": "latent"}
    full = pipe(PROMPTS[0], generator=seeded(0), **settings).images
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to("cpu", torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    half = pipe(PROMPTS[0], generator=seeded(0), **settings).images
    other = FlashuPipeline(expected)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(half, other(PROMPTS[0], generator=seeded(0), **settings).images)
    assert not torch.equal(half, full)
    assert (fx.handle_of(pipe) is not None) == accelerated
    with pytest.raises(ValueError, match="dtype: expected"):
        pipe.to(torch.int8)


# ---- folders


def write_checkpoint(family: str, folder: Path) -> None:
    """A folder as our own pipelines take it: a small random model, a tokenizer of bytes, a small VAE."""
    if family == "showo2":
        names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
        public().model().save_pretrained(folder)
        write_byte_tokenizer(folder / "tokenizer", [f"<|{name}|>" for name in names], eos_token="<|im_end|>")
        small_wan_vae().save_pretrained(folder / "vae")
        return
    module = __import__(f"flashu_ext.models.{family}.conformance", fromlist=["model_of"])
    module.model_of(Fixture.read(FIXTURES / family)).save_pretrained(folder)
    if family == "bagel":
        names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end"]
        write_byte_tokenizer(folder, [f"<|{name}|>" for name in names])
        small_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(folder / "vae")
        return
    special = ["<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<begin_of_image>", "<end_of_image>"]
    special += ["<image_placeholder>", "<｜begin▁of▁generation｜>"]
    write_byte_tokenizer(folder, special, bos_token=special[1], eos_token=special[2])
    small_kl_vae(4, scaling_factor=0.13025).save_pretrained(folder / "vae")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_folder_loads_and_is_saved(family: str, tmp_path: Path) -> None:
    folder, saved = tmp_path / "own", tmp_path / "saved"
    folder.mkdir()
    write_checkpoint(family, folder)
    with pytest.raises(OSError, match=r"model_index\.json"):
        loaded(folder)
    fx.hosts.write_diffusers_index(folder)
    fx.hosts.write_diffusers_index(folder)
    pipe = loaded(folder)
    assert type(pipe) is FlashuPipeline and str(pipe.name_or_path) == str(folder)
    ours = getattr(fx, family).Pipeline.from_pretrained(folder)
    size = {"bagel": {"size": 64}}.get(family, {})
    expected = ours.generate("a red circle", 5, 3 + POINTS[family], **size)

    def drawn(of: Any) -> Any:
        of.set_progress_bar_config(disable=True)
        sides = {"height": 64, "width": 64} if size else {}
        return of("a red circle", num_inference_steps=3, generator=seeded(5), **sides).images[0]

    assert same(drawn(pipe), expected)
    pipe.save_pretrained(saved)
    assert same(drawn(loaded(saved)), expected)
    assert same(drawn(FlashuPipeline.from_pretrained(saved)), expected)
    half = loaded(saved, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.pipeline.codec.vae.dtype == torch.float32
    half.to(torch.float32)
    half.to(torch.float16)
    assert half.dtype == torch.float16 and half.pipeline.codec.vae.dtype == torch.float32


def test_sizes_are_the_pipelines(tmp_path: Path) -> None:
    write_checkpoint("showo2", tmp_path)
    pipe = FlashuPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 2, "generator": seeded(1)}
    image = pipe("a red circle", height=32, width=64, **settings).images[0]
    assert image.size == (64, 32) and same(image, pipe.pipeline.generate("a red circle", 1, 3, size=(32, 64)))
    assert pipe("a red circle", height=32, **settings).images[0].size == (96, 32)


def test_the_embedded_models_are_read_and_not_written(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pipeline: expected a tokenizer"):
        pipe.save_pretrained(tmp_path / "a")
    with pytest.raises(TypeError, match="push_to_hub: not supported by FlashuPipeline"):
        pipe.save_pretrained(tmp_path / "a", push_to_hub=True)
    with pytest.raises(TypeError, match="safe_serialization: expected True"):
        pipe.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert not (tmp_path / "a").exists()
    fx.hosts.write_diffusers_index(tmp_path)
    shipped = subject(pipe.family).folder / "model_index.json"
    assert shipped.read_text() == (tmp_path / "model_index.json").read_text()


def test_an_index_of_another_pipeline_stays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder with a checkpoint"):
        fx.hosts.write_diffusers_index(tmp_path / "none")
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="got one of 'StableDiffusionPipeline'"):
        fx.hosts.write_diffusers_index(tmp_path)
    assert "StableDiffusion" in index.read_text()


def test_only_our_pipelines_are_parts() -> None:
    with pytest.raises(TypeError, match="pipeline: expected one of flashu_ext, got SimpleNamespace"):
        Parts(SimpleNamespace(codec=None))
