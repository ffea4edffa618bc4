"""From texts and images to an image or an answer: tokenizer, model and image codec."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...planning.config import FlashUConfig, preset
from ...planning.groups import steps_of
from ..checks import check_callback
from ..codec import Codec, KlCodec
from ..decoding import OnToken
from ..pictures import Size, sides
from ..pipeline import ModelPipeline
from ..pretrained import check_vae, check_vocabulary, opened, parts_of
from ..prompts import check_question, check_text
from ..sampling import ImageBatch, Stepper, integrate
from ..seeds import seeds_of
from .calibration import GenerationSample, UnderstandingSample
from .images import SCALE, SHIFT, pixels, vit_image
from .model import Bagel, Text
from .model import Image as ContextImage
from .prompts import SequenceLayout, load_tokenizer
from .sampling import Guidance, TaylorSeer, begin, size_grid, time_grid, tokens_of
from .sequences import DRAWING, EDITING, INTERLEAVED, guidance_of, images_of, items_of, read_all
from .understanding import answer_tokens_batch, read_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...planning.plan import TaskPlan

__all__ = ["Pipeline"]


@dataclass(repr=False)
class Pipeline(ModelPipeline):
    """A BAGEL model with its tokenizer and image codec.

    Attributes:
        model: dense, or accelerated at any time.
        layout: texts to tokens.
        codec: images to latents and back.
        vae_sides, vit_sides: longest and shortest side in pixels to which images are resized for the VAE and for the image
            encoder; the longest one counts where both cannot be.
        size: (height, width) in pixels of images that are drawn from texts alone, where no other is asked for.
        guidance: of `generate`, where no other is asked for.
        timestep_shift: of drawing.
        name: 'nano' or the checkpoint's folder.
        presets, own_plan, tokenizer: as in `ModelPipeline`.
    """

    family: ClassVar[str] = "bagel"
    saved_codec: ClassVar[type] = KlCodec

    model: Bagel
    layout: SequenceLayout
    codec: Codec
    vae_sides: tuple[int, int] = (1024, 512)
    vit_sides: tuple[int, int] = (980, 224)
    size: tuple[int, int] = (1024, 1024)
    guidance: Guidance = DRAWING
    timestep_shift: float = 3.0
    name: str = ""
    presets: Callable[[str], FlashUConfig | None] = preset
    own_plan: Callable[[FlashUConfig], TaskPlan] | None = None
    tokenizer: Any = None

    @property
    def guidance_scale(self) -> float:  # type: ignore[override]
        """The text's."""
        return self.guidance.text

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Pipeline:
        """Load 'nano', the embedded model, or a folder.

        Args:
            name: 'nano', or a folder with a BAGEL checkpoint, Qwen2.5's tokenizer files beside it or in `tokenizer/`, and
                FLUX's VAE in diffusers' layout in `vae/`. Nothing is downloaded.
            dtype: of the model's weights; None keeps the checkpoint's. The VAE keeps its own.
            device: where model and VAE run.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a file is malformed or of another model, `dtype` is none of a model's, or `device` is not there.
            ImportError: an optional package is missing.
        """
        if name == "nano":
            return cls._embedded(dtype, device)
        directory, where = opened(name, dtype, device, "'nano' or a folder with a BAGEL checkpoint")
        tokenizer, codec = parts_of(
            directory, load_tokenizer, lambda path: KlCodec.from_pretrained(path, "FLUX's", where)
        )
        check_vae(directory, "scaling_factor", SCALE, codec.scale)
        check_vae(directory, "shift_factor", SHIFT, codec.shift)
        model = Bagel.from_pretrained(directory, dtype).to(where)
        check_vocabulary(directory, tokenizer, model.config.vocab)
        check_vae(directory, "latent_channels", model.config.latent_channels, codec.channels)
        return cls(model, SequenceLayout.from_tokenizer(tokenizer), codec, name=str(directory), tokenizer=tokenizer)

    # ---- drawing

    def generate(  # type: ignore[override]  # its guidance has two scales
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        *,
        size: Size | None = None,
        text_guidance: float | None = None,
        image_guidance: float | None = None,
        guidance: Guidance | None = None,
        taylorseer: TaylorSeer | None = None,
    ) -> Image:
        """Generate an image for a prompt.

        Args:
            seed: of the noise; the same seed gives the same image. The noise is upstream's after `torch.manual_seed(seed)`.
            steps: grid points, one evaluation less; None: the accelerated config's, or 50.
            size: pixels, one number or (height, width): multiples of 16, at most 1024 a side (of the embedded model other ones);
                None: the pipeline's own.
            text_guidance, image_guidance: scales; None: those of `guidance`.
            guidance: all that guidance has besides; None: the pipeline's own.
            taylorseer: extrapolate most evaluations.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
        """
        check_text("prompt", prompt)
        scales = guidance_of(self.guidance if guidance is None else guidance, text_guidance, image_guidance)
        return self._picture({"prompt": prompt}, seed, steps, size, scales, taylorseer)

    @property
    def own_size(self) -> tuple[int, int]:
        return self.size

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        config = self.model.config
        rows, columns = (each * config.latent_patch for each in self.grid(size))
        return config.latent_channels, rows, columns

    def times(self, evaluations: int) -> Tensor:
        return time_grid(evaluations + 1, self.timestep_shift)[:-1]

    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        """The sampler draws one image at a time."""
        return [[index] for index in range(len(prompts))]

    def noise_by(self, generator: torch.Generator | None, size: Size | None = None) -> Tensor:
        """Drawn as upstream does: token by token."""
        rows, columns = self.grid(size)
        device = "cpu" if generator is None else generator.device
        shape = (rows * columns, self.model.config.patch_width)
        tokens = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        noise: Tensor = self.model.unpacked(tokens, self._pixels(size))
        return noise[0]

    def _pixels(self, size: Size | None) -> tuple[int, int]:
        return self.size if size is None else sides(size)

    def grid(self, size: Size | None = None) -> tuple[int, int]:
        pixels = self._pixels(size)
        if hasattr(self.codec, "latent_size"):  # one that has not every size
            self.codec.latent_size(*pixels)
        return size_grid(self.model, pixels)

    def edit(
        self,
        image: Image | Sequence[Image],
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        *,
        text_guidance: float | None = None,
        image_guidance: float | None = None,
        guidance: Guidance = EDITING,
        taylorseer: TaylorSeer | None = None,
    ) -> Image:
        """Edit an image, or draw after several, as a prompt says.

        Args:
            image: PIL image of any size, or a list of them. The result has the size to which the last one is resized.
            seed: of the noise, and of the latents that the VAE samples for the images.
            The rest is as in `generate`.
        """
        check_text("prompt", prompt)
        scales = guidance_of(guidance, text_guidance, image_guidance)
        return self._picture({**images_of(image, "image"), "prompt": prompt}, seed, steps, None, scales, taylorseer)

    def interleave(
        self,
        items: Sequence[str | Image],
        seed: int = 0,
        steps: int | None = None,
        *,
        size: Size | None = None,
        text_guidance: float | None = None,
        image_guidance: float | None = None,
        guidance: Guidance = INTERLEAVED,
        taylorseer: TaylorSeer | None = None,
    ) -> Image:
        """Draw what follows texts and images in order; the last text is the prompt.

        Args:
            items: strings and PIL images.
            size: None: of the last image, as it is resized, or without images the pipeline's own.
            The rest is as in `edit`.
        """
        scales = guidance_of(guidance, text_guidance, image_guidance)
        return self._picture(items_of(items), seed, steps, size, scales, taylorseer)

    def _picture(
        self, items: dict[str, Any], seed: Any, steps: Any, size: Any, guidance: Guidance, seer: TaylorSeer | None
    ) -> Image:
        """items: names for messages, and strings or images. size: None: of the last image."""
        (seed,) = seeds_of([seed], 1, "images")
        steps_of("steps", steps, 2, "grid points")  # before images are read
        given = None if size is None else sides(size)
        if given is not None:
            self.grid(given)
        read = read_all(items, self.model.config, self.vae_sides)
        # In upstream's order: what the VAE samples comes before the noise.
        generator = torch.Generator("cpu").manual_seed(seed)
        sequence = self._sequence(read, generator)
        images = [each for each in read if not isinstance(each, str)]
        drawn = given or ((images[-1].height, images[-1].width) if images else self.size)
        noise = self.model.packed(self.noise_by(generator, drawn)[None].to(self._device))
        stepper = self._begin(noise, sequence, drawn, steps, guidance, seer)
        return self.pictures(self.unpacked(integrate(stepper)))[0]

    def stepper(self, batch: ImageBatch) -> Stepper:
        (prompt,), scale = batch.prompts, batch.guidance_scale
        (scale,) = scale if isinstance(scale, tuple) else (scale,)
        sequence, guidance = [self.layout.text(prompt, self._device)], guidance_of(self.guidance, scale, None)
        packed, size = self.model.packed(batch.noise), self._pixels(batch.size)
        return self._begin(packed, sequence, size, batch.steps, guidance, None, batch.config, batch.adapter)

    def _begin(
        self,
        noise: Tensor,
        sequence: Sequence[Text | ContextImage],
        size: tuple[int, int],
        steps: Any,
        guidance: Guidance,
        seer: TaylorSeer | None,
        config: FlashUConfig | None = None,
        adapter: str | None = None,
    ) -> Stepper:
        told = (steps_of("steps", steps, 2, "grid points"), guidance, self.timestep_shift, seer, config, adapter)
        return begin(self.model, noise, sequence, size, self.layout.ids, *told)

    def unpacked(self, latents: Tensor) -> Tensor:
        pixels = self.model.config.token_pixels
        size = (latents.shape[2] * pixels, latents.shape[3] * pixels)
        unpacked: Tensor = self.model.unpacked(tokens_of(latents), size)
        return unpacked

    # ---- calibration

    def image_sample(self, image: Image, prompt: str) -> GenerationSample:
        (resized,) = read_all(images_of([image], "image"), self.model.config, self.vae_sides)
        latents = self.codec.encode(pixels(resized).to(self._device))
        inputs = (self.layout.text(prompt, self._device),)
        size = (resized.height, resized.width)
        return GenerationSample(self.model.packed(latents), inputs, size, self.layout.ids)

    def question_sample(self, image: Image, question: str, answer: str) -> UnderstandingSample:
        items = {**images_of([image], "image"), "question": question}
        inputs = self._sequence(read_all(items, self.model.config, self.vae_sides))
        return UnderstandingSample(inputs, tuple(self.layout.encode(answer)), self.layout.ids)

    # ---- understanding

    def question_inputs(self, images: Any, question: str) -> tuple[list[Tensor], Any, Any]:
        check_question(question)
        items = {**images_of(images, "images"), "question": question}
        sequence = self._sequence(read_all(items, self.model.config, self.vae_sides))
        return read_images(sequence), sequence, self.layout.ids

    def interleave_answer(
        self,
        items: Sequence[str | Image],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer to texts and images in order; the rest is as in `answer`."""
        named = items_of(items)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        seeds = None if seed is None else [seed]
        return self._streamed(lambda told: self._answered([named], max_new_tokens, seeds, told, **sampling)[0], on_text)

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
        for question in questions:
            check_question(question)
        entries = [images_of(entry, name) for name, entry in images.items()]
        entries = entries * len(questions) if len(entries) == 1 else entries
        asked = [{**own, "question": question} for own, question in zip(entries, questions, strict=True)]
        return self._answered(asked, max_new_tokens, seeds, on_token, **sampling)

    def _answered(
        self,
        asked: Sequence[dict[str, Any]],
        max_new_tokens: int,
        seeds: Any,
        on_token: OnToken | None,
        **sampling: Any,
    ) -> list[str]:
        check_callback("on_token", on_token)
        generators = None if seeds is None else self.generators(seeds, len(asked), "questions")
        read = [read_all(each, self.model.config, self.vae_sides) for each in asked]
        sequences = [self._sequence(items) for items in read]
        if not sequences:
            return []
        options = {"generators": generators, "on_token": on_token, **sampling}
        answers = answer_tokens_batch(self.model, sequences, self.layout.ids, max_new_tokens, **options)
        return [self.layout.answer(each) for each in answers]

    def _sequence(self, read: Sequence[Any], generator: torch.Generator | None = None) -> list[Text | ContextImage]:
        """What `read_all` gives as the model's items. generator: of latents, which only images have that are drawn from."""
        device = self._device
        made: list[Text | ContextImage] = []
        for item in read:
            if isinstance(item, str):
                made.append(self.layout.text(item, device))
                continue
            tokens, places = vit_image(item, self.model.config, *self.vit_sides)
            latents = None if generator is None else self.codec.encode(pixels(item).to(device), generator)
            made.append(ContextImage(latents, tokens.to(device), places.to(device)))
        return made
