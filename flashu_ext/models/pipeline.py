"""What every family's pipeline has: its files, answers, presets and copies."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from ..planning.config import FlashUConfig, preset
from ..planning.groups import FfnPruning
from ..planning.safe_files import atomic_path
from .accelerated import handle_of, unwrapped
from .calibration import Sample
from .checkpoint import check_dtype
from .checks import check_callback, check_count, check_device, check_finite, check_sampling, guidance_scale_of
from .decoding import OnToken
from .lora_files import add_adapter, check_adapter_name, read_adapter
from .many import AT_ONCE, Answers, Drawings
from .pictures import Size, rgb, to_pil
from .prompts import AnswerLayout, Parts, check_prompts, check_text
from .sampling import Callback, ImageBatch, Stepper, integrate
from .seeds import seeds_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..planning.plan import TaskPlan

__all__ = ["ModelPipeline"]


class ModelPipeline:
    """The base of pipelines: a model with the layout of its prompts and its image codec.

    Attributes:
        model: dense, or accelerated at any time.
        layout: prompts and questions to tokens, answers to text.
        codec: images to latents and back.
        name: 'nano' or the checkpoint's folder.
        guidance_scale: default of drawing.
        presets: config for a preset name and this model.
        own_plan: config -> the included plan, pruned as the config says; None without one.
        tokenizer: of transformers, which `save_pretrained` writes; None where `layout` has another one.
    """

    family: ClassVar[str]
    saved_codec: ClassVar[type]
    """The codec whose VAE a folder can hold."""
    splits_guidance: ClassVar[bool] = False
    """Whether `generate_batch` takes a `sampler`, so that two ranks can compute a branch of guidance each."""
    counts_grid_points: ClassVar[bool] = True
    """Whether `steps` are grid points, of which there is one more than evaluations."""

    model: Any
    layout: AnswerLayout
    codec: Any
    name: str = ""
    guidance_scale: float
    presets: Callable[[str], FlashUConfig | None] = staticmethod(preset)
    own_plan: Callable[[FlashUConfig], TaskPlan] | None = None
    tokenizer: Any = None

    @property
    def _device(self) -> Any:
        return next(self.model.parameters()).device

    def _lacks(self, method: str) -> NotImplementedError:
        """The error for what only a family knows."""
        return NotImplementedError(
            f"{type(self).__name__}.{method}: expected of the family's pipeline (docs/adding-a-model.md)"
        )

    def __repr__(self) -> str:
        return f"<{self.family} pipeline {self.name!r}: {type(self.model).__name__}>"

    # ---- copies

    def __copy__(self) -> Self:
        clone = object.__new__(type(self))
        vars(clone).update(vars(self))
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """With a dense model of its own. What has no weights is shared."""
        memo[id(self)] = clone = self.__copy__()
        clone.model = copy.deepcopy(self.model, memo)
        if not isinstance(self.codec, ModuleType):
            clone.codec = copy.deepcopy(self.codec, memo)
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "pipeline: it cannot be pickled, because its tokenizer cannot; pickle its model, and make the pipeline with "
            "Pipeline.from_pretrained where it is used"
        )

    # ---- files

    @classmethod
    def _embedded(cls, dtype: torch.dtype | None, device: torch.device | str) -> Any:
        """The family's embedded model with its tokenizer and codec."""
        check_dtype(dtype)
        return import_module("flashu_ext.nano.pipeline").load_pipeline(cls.family, dtype, check_device(device))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and VAE into a folder that `from_pretrained` reads; weights in the model's own order.

        Args:
            directory: created if missing; existing files of these names are replaced, each whole or not at all.

        Raises:
            TypeError: the tokenizer or codec is none that a folder can hold, such as the embedded model's.
            OSError: a file cannot be written.
        """
        if self.tokenizer is None or not isinstance(self.codec, self.saved_codec):
            raise TypeError(
                f"pipeline: expected a tokenizer of transformers and a {self.saved_codec.__name__}, got "
                f"{type(self.tokenizer).__name__} and {type(self.codec).__name__}; self.model.save_pretrained writes the model "
                "alone"
            )
        directory = Path(directory)
        codec: Any = self.codec
        self.model.save_pretrained(directory)
        for name, part in (("tokenizer", self.tokenizer), ("vae", codec.vae)):
            with tempfile.TemporaryDirectory() as draft:
                part.save_pretrained(draft)
                for file in filter(Path.is_file, Path(draft).rglob("*")):
                    target = directory / name / file.relative_to(draft)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_path(target) as temporary:
                        shutil.copyfile(file, temporary)

    # ---- calibration

    def image_sample(self, image: Image, prompt: str) -> Sample:
        """A PIL image with its prompt, for `calibrate`. Raises TypeError or ValueError for what is neither."""
        raise self._lacks("image_sample")

    def question_sample(self, image: Image, question: str, answer: str) -> Sample:
        """A PIL image with a question and its answer, for `calibrate`. The end token, which a model never reads, is omitted."""
        raise self._lacks("question_sample")

    # ---- drawing and answering

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        size: Size | None = None,
    ) -> Image:
        """Generate an image for a prompt.

        Args:
            seed: of the noise; the same seed gives the same image.
            steps: grid points, for JanusFlow evaluations; None: the accelerated config's, or 50, for JanusFlow 30.
            guidance_scale: None: the pipeline's own; 0: no guidance.
            size: pixels, one number or (height, width); None: the pipeline's own. JanusFlow draws one size alone. Show-o2's
                1.5B-HQ draws 512 and 1024, and its config names 432.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
            FloatingPointError: the image is not finite.
        """
        check_text("prompt", prompt)
        return self.generate_batch([prompt], [seed], steps, guidance_scale, size=size)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        *,
        size: Size | None = None,
        sampler: Callable[..., Any] | None = None,
    ) -> list[Image]:
        """Generate images for several prompts; image i has the noise of seeds[i] (default: 0, 1, ...).

        Show-o2 draws them as one batch, JanusFlow those whose prompts are equally long, BAGEL one by one.

        Args:
            steps, size: of all images, as in `generate`.
            guidance_scale: one for all images, or one for each; None: the pipeline's own.
            sampler: called instead of `sample`, with its arguments (such as `flashu_ext.parallel.sample_guided`); Show-o2 only.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
        """
        check_prompts(prompts)
        if sampler is not None and not self.splits_guidance:
            raise ValueError(
                f"sampler: expected none for a {self.family} model, whose branches of guidance do not run apart"
            )
        count = len(prompts)
        noise = self.noise(list(range(count)) if seeds is None else seeds, count, size)
        scale = guidance_scale_of(self.guidance_scale if guidance_scale is None else guidance_scale, count)
        latents = torch.empty_like(noise)
        for group in self.groups(prompts):
            scales = tuple(scale[index] for index in group) if isinstance(scale, tuple) else scale
            batch = ImageBatch([prompts[index] for index in group], noise[group], steps, scales, size)
            latents[group] = self.drawn(batch) if sampler is None else self._sampled(sampler, batch)
        return self.pictures(latents)

    def drawn(self, batch: ImageBatch, callback: Callback | None = None) -> Tensor:
        """Latents [images, channels, H, W] of prompts that may be drawn together (`groups`).

        Args:
            callback: called after each step with its number (from 1) and the latents, which must not be modified.
        """

        def told(number: int, latents: Tensor) -> None:
            callback(number, self.unpacked(latents))  # type: ignore[misc]  # it is there

        with torch.no_grad():
            return self.unpacked(integrate(self.stepper(batch), None if callback is None else told))

    def _sampled(self, sampler: Callable[..., Any], batch: ImageBatch) -> Tensor:
        """`drawn` by a caller's function."""
        raise self._lacks("_sampled")

    def grid(self, size: Size | None = None) -> tuple[int, int]:
        """(height, width) in patches of an image of `size` pixels, as in `generate_batch`; None: of the pipeline's own size.

        Raises:
            TypeError, ValueError: `size` is no size, or none that is drawn.
        """
        raise self._lacks("grid")

    def text_room(self, size: Size | None = None) -> int | None:
        """How many tokens of a prompt an image of this size has room for; longer prompts are cut. None: any number.

        Raises:
            TypeError, ValueError: as `grid`.
        """
        self.grid(size)
        return None

    def question_image(self, image: Image, name: str) -> Image:
        """An image of a question in RGB, as small as the same answers allow. Raises TypeError or ValueError, with `name`."""
        own: Image = rgb(image, name)
        return own

    @property
    def own_size(self) -> tuple[int, int]:
        """(height, width) in pixels of images where no other size is asked for."""
        raise self._lacks("own_size")

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """(channels, H, W) of an image's latents. Raises TypeError or ValueError as `grid`."""
        raise self._lacks("latent_shape")

    def times(self, evaluations: int) -> Tensor:
        """The time of every evaluation as the model reads it, fp32 [evaluations]."""
        raise self._lacks("times")

    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        """Which prompts are drawn together, by their index."""
        return [list(range(len(prompts)))]

    def noise_by(self, generator: torch.Generator | None, size: Size | None = None) -> Tensor:
        """Standard normal noise of one image, fp32 [channels, H, W] on the generator's device; None: torch's own, on the CPU."""
        device = "cpu" if generator is None else generator.device
        return torch.randn(self.latent_shape(size), generator=generator, dtype=torch.float32, device=device)

    def noise(self, seeds: Sequence[int], count: int | None = None, size: Size | None = None) -> Tensor:
        """Standard normal noise fp32 [len(seeds), channels, H, W], each image from its own seed, drawn on the CPU; `size` as in
        `generate`."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds_of(seeds, count, "prompts")]
        return torch.stack([self.noise_by(each, size) for each in generators]).to(self._device)

    def stepper(self, batch: ImageBatch) -> Stepper:
        """The steps of images that are drawn together."""
        raise self._lacks("stepper")

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents of a `stepper` -> those that `pictures` takes."""
        return latents

    def generate_many(self, requests: Iterable[Any] = (), at_once: int = AT_ONCE) -> Drawings:
        """Draw images that may begin at any time; those in progress share evaluations.

        Args:
            requests: `ImageRequest`s, mappings of their fields, or prompts; read one by one, whenever there is room.
            at_once: images in progress at once.

        Returns:
            An iterator of `ImageResult`s, in the order in which images finish. A wrong request, or what an `on_step` raises,
            is the result of that image alone. `add` and `cancel` may be called at any time.

        Example:
            for result in pipe.generate_many(["a red circle", {"prompt": "a blue square", "steps": 20}]):
                result.image.save(f"{result.index}.png")
        """
        return Drawings(self, requests, at_once)

    def question_inputs(self, images: Any, question: str) -> tuple[list[Tensor], Any, Any]:
        """The images of a question as `Adapter.embed_image` takes them, and what stands before and after them
        (`Adapter.question`). Raises TypeError or ValueError."""
        raise self._lacks("question_inputs")

    def answer_many(self, requests: Iterable[Any] = (), at_once: int = AT_ONCE) -> Answers:
        """Answer questions that may come at any time; a step computes a token of every answer under way.

        Args:
            requests: `QuestionRequest`s, or mappings of their fields; read one by one, whenever there is room.
            at_once: answers under way at once.

        Returns:
            An iterator of `QuestionResult`s, in the order in which answers end. A wrong request, or what an `on_token` raises,
            is the result of that answer alone. `add` and `cancel` may be called at any time.

        Example:
            for result in pipe.answer_many({"images": image, "question": each} for each in questions):
                print(result.index, result.answer)
        """
        return Answers(self, requests, at_once)

    def pictures(self, latents: Tensor) -> list[Image]:
        """Latents [B, channels, H, W] -> images. One at a time: a convolution's bits may depend on its batch.

        Raises:
            FloatingPointError: an image is not finite, which would look black.
        """
        return [to_pil(self.decoded(one)[0]) for one in latents.split(1)]

    def decoded(self, latents: Tensor) -> Tensor:
        """As the codec decodes latents.

        Raises:
            FloatingPointError: they, or what comes out, are not finite.
        """
        image: Tensor = self.codec.decode(latents)
        check_finite("latents", latents)
        check_finite("image", image)
        return image

    def generators(self, seeds: Any, count: int, what: str) -> list[torch.Generator]:
        """A generator on the model's device for each of `count` seeds. Raises TypeError or ValueError."""
        return [torch.Generator(self._device).manual_seed(seed) for seed in seeds_of(seeds, count, what)]

    def answer(
        self,
        image: Image | Sequence[Image],
        question: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer a question about one or more images, greedily unless a temperature is given.

        Args:
            image: PIL image of any size, made the model's own as upstream does. A list of images is put before the question in
                its order; some families take one image only.
            on_text: called with each new part of the answer as it comes; the parts concatenate to the answer.
            temperature, top_k, top_p: as in `answer_tokens`.
            seed: of the draws; None: torch's own generator.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
        """
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling["seeds"] = None if seed is None else [seed]
        return self._streamed(
            lambda on_token: self._answers({"image": image}, [question], max_new_tokens, on_token=on_token, **sampling)[
                0
            ],
            on_text,
        )

    def answer_batch(
        self,
        images: Sequence[Image | Sequence[Image]],
        questions: Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seeds: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> list[str]:
        """Answer questions[i] about images[i], as one batch if the model is accelerated; one entry may serve all questions.

        Args:
            images: for each question an image or a list of images.
            seeds: one for each question, so that its draws do not depend on the others.
            on_token: called with a question's index and its next token id, as it comes.
            The rest is as in `answer`.
        """
        if isinstance(questions, str) or not isinstance(questions, Sequence):
            raise TypeError(f"questions: expected a list of strings, got {type(questions).__name__}")
        if not isinstance(images, Sequence):
            raise TypeError(f"images: expected a list of PIL images, got {type(images).__name__}")
        if len(images) not in (1, len(questions)):
            raise ValueError(
                f"images: expected one, or one for each of {len(questions)} questions, got {len(images)}; several images of one "
                "question are a list of their own"
            )
        named = {f"images[{row}]": entry for row, entry in enumerate(images)}
        check_count("max_new_tokens", max_new_tokens)  # also where there is no question
        check_sampling(temperature, top_k, top_p)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seeds": seeds}
        return self._answers(named, questions, max_new_tokens, on_token=on_token, **sampling)

    def _answers(
        self,
        images: dict[str, Any],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        seeds: Any,
        on_token: OnToken | None = None,
        **sampling: Any,
    ) -> list[str]:
        """images: the name of each entry, for messages, and the entry. sampling: temperature, top_k and top_p."""
        raise self._lacks("_answers")

    def _streamed(self, answer: Callable[[OnToken | None], str], on_text: Callable[[str], None] | None) -> str:
        """The text that `answer` gives; its parts are told as they come.

        Args:
            answer: called with a function of a question's index and its next token id.
        """
        check_callback("on_text", on_text)
        if on_text is None:
            return answer(None)
        parts = Parts(self.layout)

        def on_token(_: int, token: int) -> None:
            if part := parts.add(token):
                on_text(part)

        text = answer(on_token)
        if rest := parts.rest(text):
            on_text(rest)
        return text

    # ---- acceleration

    def preset(self, name: str, plan: TaskPlan | None = None) -> tuple[FlashUConfig | None, TaskPlan | None]:
        """The config and plan of 'dense' (none), 'exact', 'paper' or 'fast' for this model.

        Args:
            plan: for a config that prunes; None: the embedded model's own, and none for others. A plan with a ratio per layer
                is used as is; any other is pruned as the config says.

        Raises:
            ValueError: no such preset.
        """
        config = self.presets(name)
        if config is None or not config.needs_plan:
            return config, None
        if plan is None:
            return config, self.own_plan(config) if self.own_plan is not None else None
        if plan.ratios is not None:
            return config.replace(ffn=FfnPruning(plan.ratio, plan.multiple)), plan
        return config, plan.with_pruning(config.ffn)

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter of peft, which requests may name then (`ImageRequest.adapter`). What is active stays active: where
        nothing was, nothing is. The model may be accelerated, and in use by other threads.

        Args:
            name: any without dots, other than '__base__'.
            folder: with adapter_config.json and adapter_model.safetensors, as `PeftModel.save_pretrained` writes them.

        Raises:
            ValueError: the name is taken, a file is damaged, or the adapter is no plain LoRA of this model's linear layers.
            OSError: a file cannot be read. ImportError: peft is not installed.
            The model is as it was then.
        """
        check_adapter_name(name)
        files, handle = read_adapter(folder), handle_of(self.model)
        with contextlib.nullcontext() if handle is None else handle.runner.working():
            add_adapter(unwrapped(self.model), name, files)

    def accelerate(self, config: FlashUConfig | None = None, plan: TaskPlan | None = None) -> Any:
        """`flashu_ext.accelerate` on this pipeline's model; returns the handle."""
        return import_module("flashu_ext").accelerate(self.model, config, plan)
