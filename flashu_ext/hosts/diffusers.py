"""A pipeline of diffusers for Show-o2, JanusFlow and BAGEL, which draws with this library's samplers, dense or accelerated."""

# No annotations from __future__: older versions of diffusers read those of `FlashuPipeline.__init__` as they are.
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ..models.accelerated import handle_of
from ..models.adapter import adapter_of
from ..models.checkpoint import check_dtype
from ..models.checks import check_callback, check_finite
from ..models.folders import load_pipeline
from ..models.pipeline import ModelPipeline
from ..models.sampling import ImageBatch
from ..nano.subject import FAMILIES, subject
from ..planning.config import FlashUConfig
from ..planning.extras import extra
from ..planning.groups import is_real, steps_of, whole
from ..planning.plan import TaskPlan
from ..planning.reading import shown
from . import write_diffusers_index

if TYPE_CHECKING:  # its own types differ from version to version
    ImagePipelineOutput: Any
    DiffusionPipeline = Any
    ModelMixin = Any
else:
    with extra("vae"):
        from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin

__all__ = ["FlashuPipeline", "Parts"]

_OUTPUTS = ("pil", "np", "pt", "latent")
_MOST_IMAGES = 10_000
"""Of a prompt in one call: their noise is drawn before the first step."""

_FIXED = {
    "scheduler": "the steps in time are the model's own",
    **dict.fromkeys(("vae", "tokenizer", "text_encoder", "transformer", "unet"), "it is loaded from the folder"),
}
"""Components of other pipelines -> why this one takes none."""

_UNSUPPORTED = {
    "seed": "give a generator, torch.Generator().manual_seed(seed)",
    "negative_prompt": "the other branch of guidance is the model's own",
    "prompt_embeds": "prompts are texts",
    "negative_prompt_embeds": "prompts are texts",
    "timesteps": _FIXED["scheduler"],
    "sigmas": _FIXED["scheduler"],
    "eta": _FIXED["scheduler"],
    "image": "pipe.pipeline.edit edits images, where the model can",
    "callback": "give callback_on_step_end",
    "callback_steps": "give callback_on_step_end, which is called after every step",
}
"""Arguments of other pipelines' calls -> why this one takes none."""


class _InterruptedError(Exception):
    """Leaves a sampler's loop."""


def _refused(name: str, why: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: not supported by FlashuPipeline: {why}")

    return method


class Parts(ModelMixin):
    """The one component of a `FlashuPipeline`: a pipeline of this library, with its model and VAE as submodules.

    Attributes:
        pipeline: an `fx.showo2.Pipeline`, `fx.janusflow.Pipeline` or `fx.bagel.Pipeline`.
    """

    def __init__(self, pipeline: ModelPipeline):
        super().__init__()
        if not isinstance(pipeline, ModelPipeline):
            raise TypeError(f"pipeline: expected one of flashu_ext, got {type(pipeline).__name__}")
        self.pipeline = pipeline
        self.model = pipeline.model
        vae = getattr(pipeline.codec, "vae", None)
        if isinstance(vae, nn.Module):
            self.vae = vae

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> Self:
        """Load a folder of any family, on the CPU.

        Args:
            directory: as `from_pretrained` of the family's pipeline takes it, or the embedded model's.
            options: dtype or torch_dtype, of the model's weights; None keeps the checkpoint's. The VAE keeps its own.

        Raises:
            FileNotFoundError, ValueError: as the family's pipeline.
            TypeError: an option that is not supported; it is named.
        """
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        options.pop("torch_dtype", None)
        options.pop("low_cpu_mem_usage", None)  # weights are never in memory twice
        if options.get("use_safetensors") is True:
            del options["use_safetensors"]
        for name, value in options.items():
            if (value is not None and value is not False) or (name == "use_safetensors" and value is False):
                raise TypeError(
                    f"{name}: not supported by FlashuPipeline, got {shown(value)}; a folder is loaded whole"
                )
        for family in FAMILIES:
            if os.path.isdir(directory) and os.path.samefile(directory, subject(family).folder):
                return cls(load_pipeline("nano", dtype, family=family))
        return cls(load_pipeline(directory, dtype))

    # What diffusers calls first where a device_map spreads components.
    load_config = classmethod(_refused("device_map", "a folder is loaded whole; .to(device) moves it"))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move model and VAE to a device, and the model to a dtype; an accelerated model stays accelerated."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        check_dtype(dtype)
        self.model.to(device=device, dtype=dtype, non_blocking=non_blocking)
        if "vae" in self._modules:
            self.vae.to(device=device, non_blocking=non_blocking)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(each.dtype for each in self.model.parameters() if each.is_floating_point())


_OFFLOADING = "the runtime needs all weights of the model on one device"
_ATTENTION = "attention is the runtime's own"


class FlashuPipeline(DiffusionPipeline):
    """Draws images of prompts, as pipelines of diffusers do.

    Attributes:
        pipeline: this library's pipeline, which also answers questions (`pipe.pipeline.answer(image, question)`).
        model: its model, dense or accelerated.

    Example:
        pipe = FlashuPipeline.from_pretrained(FOLDER, dtype=torch.bfloat16).to("cuda")
        with pipe.accelerate(*pipe.preset("exact")):
            image = pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0]
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        parts: Parts,
        scheduler: object = None,
        vae: object = None,
        tokenizer: object = None,
        text_encoder: object = None,
        transformer: object = None,
        unet: object = None,
    ):
        """
        Args:
            parts: or a pipeline of this library.
            The rest is refused: a schedule and components of other pipelines.
        """
        super().__init__()
        given = {"scheduler": scheduler, "vae": vae, "tokenizer": tokenizer, "text_encoder": text_encoder}
        for name, value in {**given, "transformer": transformer, "unet": unet}.items():
            if value is not None:
                raise TypeError(_refusal(name))
        self.register_modules(parts=parts if isinstance(parts, Parts) else Parts(parts))
        self._interrupt = False
        self._num_timesteps = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            raise TypeError(_refusal(name))
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> Self:
        """Load a folder of any family, which needs no model_index.json here.

        Args:
            directory: as `from_pretrained` of the family's pipeline takes it.
            options: dtype or torch_dtype, of the model's weights; None keeps the checkpoint's.

        Raises:
            FileNotFoundError, ValueError: as the family's pipeline.
            TypeError: an option that is not supported; it is named.
        """
        for name in _FIXED:
            if options.get(name) is not None:
                raise TypeError(_refusal(name))
        pipe = cls(Parts.from_pretrained(directory, **options))
        pipe.register_to_config(_name_or_path=str(directory))
        return pipe

    def save_pretrained(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that `from_pretrained`, `DiffusionPipeline.from_pretrained` and the family's pipeline read.

        Raises:
            TypeError: the embedded model, whose tokenizer and codec no folder can hold; or an option but
                `safe_serialization=True`.
        """
        for name, value in options.items():
            if value is not None and value is not False and (name, value) != ("safe_serialization", True):
                raise TypeError(f"{name}: not supported by FlashuPipeline, got {shown(value)}")
        if options.get("safe_serialization") is False:
            raise TypeError("safe_serialization: expected True, as weights are written as safetensors only, got False")
        self.pipeline.save_pretrained(directory)
        write_diffusers_index(directory)

    @property
    def pipeline(self) -> Any:
        return self.parts.pipeline

    @property
    def model(self) -> Any:
        return self.pipeline.model

    @property
    def interrupt(self) -> bool:
        """Whether the image that is drawn ends after the step in progress; a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Evaluations of every image of the last call."""
        return self._num_timesteps

    # ---- acceleration

    def preset(self, name: str, plan: TaskPlan | None = None) -> tuple[FlashUConfig | None, TaskPlan | None]:
        """As `ModelPipeline.preset`."""
        preset: tuple[FlashUConfig | None, TaskPlan | None] = self.pipeline.preset(name, plan)
        return preset

    def accelerate(self, config: FlashUConfig | None = None, plan: TaskPlan | None = None) -> Any:
        """`flashu_ext.accelerate` on the model; returns the handle."""
        return self.pipeline.accelerate(config, plan)

    # ---- what other pipelines have

    enable_model_cpu_offload = _refused("enable_model_cpu_offload", _OFFLOADING)
    enable_sequential_cpu_offload = _refused("enable_sequential_cpu_offload", _OFFLOADING)
    enable_group_offload = _refused("enable_group_offload", _OFFLOADING)
    enable_attention_slicing = _refused("enable_attention_slicing", _ATTENTION)
    set_attention_slice = _refused("set_attention_slice", _ATTENTION)
    enable_xformers_memory_efficient_attention = _refused("enable_xformers_memory_efficient_attention", _ATTENTION)

    def disable_attention_slicing(self) -> None:
        """Nothing is sliced."""

    load_lora_weights = _refused(
        "load_lora_weights", "pipe.pipeline.load_adapter(name, folder) loads an adapter of peft"
    )
    from_pipe = classmethod(_refused("from_pipe", "FlashuPipeline(pipe.parts) shares the weights of another"))

    # ---- drawing

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unsupported: Any,
    ) -> Any:
        """Draw images.

        Args:
            prompt: one, or several. Show-o2 draws all of them together, JanusFlow those whose tokens are as many, BAGEL one image
                after another.
            height, width: pixels; None: those of this library's own pipeline.
            num_inference_steps: evaluations of the model, each followed by a callback. The `steps` of this library's own
                pipelines are one more for Show-o2 and BAGEL, which count grid points. None: the accelerated config's, or the
                family's default: 49, JanusFlow 30, BAGEL 49.
            guidance_scale: None: the family's default; 0: the prompt alone. BAGEL: of the text.
            generator: one for each image, or one from which the images' noise is drawn in order; None: torch's own. A CPU
                generator with a seed gives the image that this library's pipeline draws for that seed.
            latents: noise [images, channels, H, W] to begin with, in place of a generator's; for Show-o2's embedded model
                [images, 16, 72, 2].
            output_type: 'pil'; 'np', fp32 [images, height, width, 3] in [0, 1]; 'pt', fp32 [images, 3, height, width] in [0, 1];
                or 'latent', fp32 [images, channels, H, W].
            return_dict: False: a tuple with the images.
            callback_on_step_end: called with (pipe, step from 0, time as the model reads it, {"latents": ...}) after every step
                of every group of images that is drawn together. Latents can be read and not replaced. Where it sets
                `pipe._interrupt = True`, the images are what the latents are by then; those not begun are their noise.
            callback_on_step_end_tensor_inputs: a part of ["latents"].

        Returns:
            ImagePipelineOutput with `images`, prompt after prompt; or a tuple.

        Raises:
            TypeError, ValueError: an argument is wrong or not supported; it is named, and nothing is drawn.
            FloatingPointError: what was drawn is not finite.
        """
        for name in unsupported:
            raise TypeError(f"{name}: not supported by FlashuPipeline: {_UNSUPPORTED.get(name, 'it is no argument')}")
        pipe: ModelPipeline = self.pipeline
        prompts = _prompts(prompt, num_images_per_prompt)
        sides = (_count("height", height) or pipe.own_size[0], _count("width", width) or pipe.own_size[1])
        size = None if height is width is None else sides
        try:
            pipe.grid(size)
        except ValueError as error:
            raise ValueError(f"height, width: {error}") from error
        steps = steps_of("num_inference_steps", num_inference_steps, 1, "evaluations") or _evaluations(pipe)
        scale = self.pipeline.guidance_scale if guidance_scale is None else guidance_scale
        if not is_real(scale) or scale < 0:
            raise ValueError(f"guidance_scale: expected a finite number >= 0, got {shown(scale)}")
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type: expected one of {', '.join(_OUTPUTS)}, got {shown(output_type)}")
        check_callback("callback_on_step_end", callback_on_step_end)
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if not isinstance(names, (list, tuple)) or not all(name in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected a part of {list(self._callback_tensor_inputs)}, got {shown(names)}"
            )
        noise = self._noise(latents, generator, len(prompts), size)

        groups, times = pipe.groups(prompts), pipe.times(steps)
        self._interrupt, self._num_timesteps = False, steps
        drawn = noise.clone()
        with self.progress_bar(total=steps * len(groups)) as bar:
            for group in groups:
                told = _Told(self, times, callback_on_step_end, names, bar)
                try:
                    points = steps + pipe.counts_grid_points
                    batch = ImageBatch([prompts[i] for i in group], noise[group], points, scale, size)
                    drawn[group] = pipe.drawn(batch, told)
                except _InterruptedError:
                    drawn[group] = told.latents
                    break
        images = self._output(drawn, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, latents: Any, generator: Any, count: int, size: Any) -> Tensor:
        """fp32 [count, channels, H, W] on the model's device."""
        expected, device = (count, *self.pipeline.latent_shape(size)), self.parts.device
        if latents is not None:
            plain = isinstance(latents, Tensor) and latents.layout == torch.strided and not latents.is_meta
            if not plain or not latents.is_floating_point():
                raise TypeError(f"latents: expected a floating-point tensor with values, got {shown(latents, 80)}")
            if tuple(latents.shape) != expected:
                raise ValueError(f"latents: expected {list(expected)}, got {list(latents.shape)}")
            if not bool(latents.isfinite().all()):
                raise ValueError("latents: expected finite numbers, got NaN or Infinity")
            return latents.to(device, torch.float32)
        given = [generator] * count if generator is None or isinstance(generator, torch.Generator) else generator
        if not isinstance(given, (list, tuple)) or not all(isinstance(g, (torch.Generator, type(None))) for g in given):
            raise TypeError(f"generator: expected a torch.Generator or a list of them, got {shown(generator, 80)}")
        if len(given) != count:
            raise ValueError(f"generator: expected one for each of {count} images, got {len(given)}")
        return torch.stack([self.pipeline.noise_by(each, size).to(device) for each in given])

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            check_finite("latents", latents)
            return latents
        if output_type == "pil":
            return self.pipeline.pictures(latents)
        pixels = torch.cat([self.pipeline.decoded(one) for one in latents.split(1)])
        unit = ((pixels + 1) / 2).clamp(0, 1)
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


class _Told:
    """A sampler's callback: tells the caller's, the progress bar, and whether to go on.

    Attributes:
        latents: after the last step.
    """

    def __init__(self, pipe: "FlashuPipeline", times: Tensor, callback: Any, names: Sequence[str], bar: Any):
        self.pipe, self.times, self.callback, self.names, self.bar = pipe, times, callback, names, bar

    def __call__(self, number: int, latents: Tensor) -> None:
        self.latents = latents
        self.bar.update()
        if self.callback is not None:
            with torch.inference_mode(False):  # where tensors do not say that they were changed
                given = latents.clone()
            self._tell(number - 1, given)
        if self.pipe.interrupt:
            raise _InterruptedError

    def _tell(self, step: int, given: Tensor) -> None:
        version = given._version
        returned = self.callback(self.pipe, step, self.times[step], {"latents": given} if self.names else {})
        replaced = isinstance(returned, Mapping) and returned.get("latents", given) is not given
        if replaced or given._version != version:
            raise ValueError(
                "callback_on_step_end: expected the latents as they came, got others; the sampler keeps its own"
            )


def _evaluations(pipe: ModelPipeline) -> int:
    """Of an image where a caller asks for no number: as the accelerated config says, else the family's own."""
    handle = handle_of(pipe.model)
    points = None if handle is None else handle.config.steps
    return (points or adapter_of(pipe.model).grid_points) - 1


def _refusal(name: str) -> str:
    return f"{name}: not supported by FlashuPipeline: {_FIXED[name]}"


def _count(name: str, value: Any) -> Any:
    """None, or an integer of at least 1. Raises ValueError."""
    number = whole(value)
    if value is not None and (number is None or number < 1):
        raise ValueError(f"{name}: expected an integer >= 1, got {shown(value)}")
    return number


def _prompts(prompt: Any, copies: Any) -> list[str]:
    """Every prompt as often as it is drawn."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise TypeError(f"prompt: expected a string or a list of strings, got {shown(prompt, 80)}")
    count = whole(copies)
    if count is None or not 1 <= count <= _MOST_IMAGES:
        raise ValueError(f"num_images_per_prompt: expected an integer in [1, {_MOST_IMAGES}], got {shown(copies)}")
    return [each for each in prompts for _ in range(count)]
