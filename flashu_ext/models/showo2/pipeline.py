"""From a prompt to an image and from an image and a question to an answer: tokenizer, model and image codec."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...planning.config import FlashUConfig, preset
from ..checks import check_callback
from ..pictures import Size, covered, rgb, sides, unit
from ..pipeline import ModelPipeline
from ..pretrained import check_vocabulary, opened, parts_of
from ..sampling import ImageBatch, Stepper, stepper_of
from .calibration import GenerationSample, UnderstandingSample
from .codec import ImageCodec, WanCodec
from .model import Showo2
from .positions import table_side
from .prompts import PromptLayout, load_tokenizer
from .sampling import DenseStepper, SampleInputs, time_grid
from .understanding import answer_tokens_batch
from .validate import check_answer_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...planning.plan import TaskPlan

__all__ = ["Pipeline", "Size"]


@dataclass(repr=False)
class Pipeline(ModelPipeline):
    """A Show-o2 model with its tokenizer and image codec.

    Attributes:
        model: dense, or accelerated at any time.
        layout: prompts and questions to tokens.
        codec: images to latents and back.
        pixels: side of the images that are drawn where no other size is asked for, and of those that questions are about.
        guidance_scale, time_shifting_factor: defaults of `generate`.
        name: 'nano' or the checkpoint's folder.
        presets: config for a preset name and this model.
        own_plan: config -> the included plan, pruned as the config says; None without one.
        tokenizer: of transformers, which `save_pretrained` writes; None where `layout` has another one.
    """

    family: ClassVar[str] = "showo2"
    saved_codec: ClassVar[type] = WanCodec
    splits_guidance: ClassVar[bool] = True

    model: Showo2
    layout: PromptLayout
    codec: ImageCodec
    pixels: int
    guidance_scale: float = 5.0
    time_shifting_factor: float = 3.0
    name: str = ""
    presets: Callable[[str], FlashUConfig | None] = preset
    own_plan: Callable[[FlashUConfig], TaskPlan] | None = None
    tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Pipeline:
        """Load 'nano', the embedded model, or a folder.

        Args:
            name: 'nano', or a folder with a Show-o2 checkpoint, Qwen2.5's tokenizer files beside it or in `tokenizer/`,
                and Wan 2.1's VAE in diffusers' layout in `vae/`. Nothing is downloaded.
            dtype: of the model's weights; None keeps the checkpoint's.
            device: where the model runs.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a file is malformed, `dtype` is none of a model's, or `device` is not there.
            ImportError: an optional package is missing.
        """
        if name == "nano":
            return cls._embedded(dtype, device)
        directory, where = opened(name, dtype, device, "'nano' or a folder with a Show-o2 checkpoint")
        tokenizer, codec = parts_of(directory, load_tokenizer, lambda path: WanCodec.from_pretrained(path, where))
        model = Showo2.from_pretrained(directory, dtype).to(where)
        config = model.config
        check_vocabulary(directory, tokenizer, config.llm_vocab_size)
        return cls(
            model=model,
            layout=PromptLayout.from_tokenizer(tokenizer, config.image_tokens),
            codec=codec,
            pixels=8 * config.patch_size * config.image_latent_height,
            name=str(directory),
            tokenizer=tokenizer,
        )

    # ---- generation

    @property
    def own_size(self) -> tuple[int, int]:
        return self.pixels, self.pixels

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        config = self.model.config
        rows, columns = (patches * config.patch_size for patches in self.grid(size))
        return config.image_latent_dim, rows, columns

    def times(self, evaluations: int) -> Tensor:
        return time_grid(evaluations + 1, self.time_shifting_factor)[:-1]

    def stepper(self, batch: ImageBatch) -> Stepper:
        inputs = self._sampled(SampleInputs.build, batch)
        return stepper_of(self.model, inputs, DenseStepper, batch.config, batch.adapter)

    def _sampled(self, sampler: Callable[..., Any], batch: ImageBatch) -> Any:
        return sampler(
            self.model,
            batch.noise,
            **self.prompt_tokens(batch.prompts, batch.size),
            steps=batch.steps,
            guidance_scale=batch.guidance_scale,
            time_shifting_factor=self.time_shifting_factor,
        )

    def prompt_tokens(self, prompts: Sequence[str], size: Size | None = None) -> dict[str, Any]:
        """The tokens and positions of `sample`'s arguments for prompts whose images have `size`."""
        return dict(vars(self._layout_of(self.grid(size)).generation(prompts, self._device)))

    def text_room(self, size: Size | None = None) -> int:
        return self._layout_of(self.grid(size)).max_text_len

    def grid(self, size: Size | None = None) -> tuple[int, int]:
        config: Any = self.model.config
        own = (config.image_latent_height, config.image_latent_width)
        if size is None:
            return own
        height, width = sides(size)
        if not hasattr(self.codec, "latent_size"):
            raise TypeError(
                f"codec: expected a method latent_size where a size is asked for, got {type(self.codec).__name__}"
            )
        least, patch = self._patch_pixels(), config.patch_size
        if least and (height % least or width % least):
            raise ValueError(
                f"size: expected multiples of {least} pixels, a patch of this model, got {height} x {width}"
            )
        latents = self.codec.latent_size(height, width)
        grid = (latents[0] // patch, latents[1] // patch)
        if grid != own and table_side(self.model) is None:
            raise ValueError(
                f"size: expected a grid of {own[0]} x {own[1]} patches, because this model's position table is not square, got "
                f"{grid[0]} x {grid[1]} of {height} x {width} pixels"
            )
        limit, tokens = self.model.showo.config.max_position_embeddings, self._layout_of(grid).row_tokens
        if grid != own and tokens > limit:
            raise ValueError(
                f"size: expected rows of at most {limit} tokens, which this language model has positions for, got {tokens} of "
                f"{height} x {width} pixels"
            )
        return grid

    def _patch_pixels(self) -> int | None:
        """The side of a patch in pixels; None for a codec whose latents do not lie as the pixels do."""
        config: Any = self.model.config
        try:
            height, width = self.codec.latent_size(self.pixels, self.pixels)
        except ValueError:
            return None
        return self.pixels // height * config.patch_size if height == width else None

    def _layout_of(self, grid: tuple[int, int]) -> PromptLayout:
        """The layout of prompts whose images have this grid."""
        config = self.model.config
        if grid == (config.image_latent_height, config.image_latent_width):
            return self.layout
        return self.layout.with_image_tokens(grid[0] * grid[1] + (1 if config.add_time_embeds else 0))

    # ---- calibration

    def image_sample(self, image: Image, prompt: str) -> GenerationSample:
        rows = self.layout.generation([prompt], self._device)
        return GenerationSample(latents=self.encode(image), **vars(rows))

    def question_sample(self, image: Image, question: str, answer: str) -> UnderstandingSample:
        latents = self.encode(image)
        before, after = self.layout.question(question, self._device)
        tokens = torch.tensor([self.layout.encode(answer)], dtype=torch.int64, device=self._device)
        return UnderstandingSample(latents, before, torch.cat([after, tokens], dim=1), tokens.shape[1])

    # ---- understanding

    def _answers(
        self,
        images: dict[str, Any],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        seeds: Any,
        on_token: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """An image is scaled to cover the model's square and cropped in the middle; several of one question are put before it in
        their order."""
        check_callback("on_token", on_token)
        generators = None if seeds is None else self.generators(seeds, len(questions), "questions")
        rows = [self.layout.question(question, self._device) for question in questions]
        answers = answer_tokens_batch(
            self.model,
            [self._encoded(entry, name) for name, entry in images.items()],
            [before for before, _ in rows],
            [after for _, after in rows],
            max_new_tokens=max_new_tokens,
            eos_token=self.layout.eos,
            generators=generators,
            on_token=on_token,
            **sampling,
        )
        return [self.layout.answer(tokens) for tokens in answers]

    def question_inputs(self, images: Any, question: str) -> tuple[list[Tensor], Any, Any]:
        encoded, (before, after) = self._encoded(images, "images"), self.layout.question(question, self._device)
        check_answer_inputs(self.model, encoded, before, after, 0, self.layout.eos)
        return encoded, before, after

    def question_image(self, image: Image, name: str) -> Image:
        own: Image = covered(rgb(image, name), self.pixels, name)
        return own

    def encode(self, image: Image) -> Tensor:
        """Latents fp32 [1, channels, H, W] of an image. Source: upstream `image_transform` (bicubic, centre crop)."""
        return self.codec.encode(_from_pil(image, self.pixels, "image").to(self._device))

    def _encoded(self, images: Any, name: str) -> list[Tensor]:
        """Latents of the images of a question, all of which are checked first. Raises TypeError or ValueError."""
        if not isinstance(images, (list, tuple)):
            images, names = [images], [name]
        elif images:
            names = [f"{name}[{index}]" for index in range(len(images))]
        else:
            raise ValueError(f"{name}: expected at least one image, got an empty list")
        pixels = [_from_pil(image, self.pixels, own) for image, own in zip(images, names, strict=True)]
        return [self.codec.encode(each.to(self._device)) for each in pixels]


def _from_pil(image: Image, side: int, name: str) -> Tensor:
    """PIL image -> [1, 3, side, side] in [-1, 1]. Raises TypeError or ValueError, naming it."""
    return unit(covered(rgb(image, name), side, name))
