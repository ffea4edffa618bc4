"""From a prompt to an image and from an image and a question to an answer: tokenizer, model and image codec."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...planning.config import FlashUConfig, preset
from ...planning.groups import is_real
from ...planning.reading import read_json, refusal, shown
from ...planning.safe_files import write_text
from ..checks import check_callback
from ..codec import Codec, KlCodec
from ..pictures import Size, covered, rgb, sides, unit
from ..pipeline import ModelPipeline
from ..pretrained import check_vae, check_vocabulary, opened, parts_of
from ..prompts import by_length
from ..sampling import ImageBatch, Stepper, stepper_of
from .calibration import GenerationSample, UnderstandingSample
from .images import HALF, pixel_values
from .model import JanusFlow
from .prompts import ChatLayout, load_tokenizer
from .sampling import TIMES, DenseStepper, SampleInputs
from .understanding import answer_tokens_batch, around_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...planning.plan import TaskPlan

__all__ = ["Pipeline"]

_PREPROCESSOR = "preprocessor_config.json"


@dataclass(repr=False)
class Pipeline(ModelPipeline):
    """A JanusFlow model with its tokenizer and image codec.

    Attributes:
        model: dense, or accelerated at any time.
        layout: prompts and questions to tokens.
        codec: images to latents and back.
        guidance_scale: default of `generate`.
        mean, std: of the colours of images that questions are about.
        latent_pixels: a latent's side.
        name: 'nano' or the checkpoint's folder.
        presets, own_plan, tokenizer: as in `ModelPipeline`.
    """

    family: ClassVar[str] = "janusflow"
    saved_codec: ClassVar[type] = KlCodec
    counts_grid_points: ClassVar[bool] = False

    model: JanusFlow
    layout: ChatLayout
    codec: Codec
    guidance_scale: float = 2.0
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    latent_pixels: int = 8
    name: str = ""
    presets: Callable[[str], FlashUConfig | None] = preset
    own_plan: Callable[[FlashUConfig], TaskPlan] | None = None
    tokenizer: Any = None

    # ---- files

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Pipeline:
        """Load 'nano', the embedded model, or a folder.

        Args:
            name: 'nano', or a folder with a JanusFlow checkpoint and its preprocessor_config.json, the tokenizer's files beside
                it or in `tokenizer/`, and SDXL's VAE in diffusers' layout in `vae/`. Nothing is downloaded.
            dtype: of the model's weights; None keeps the checkpoint's. The VAE keeps its own.
            device: where model and VAE run.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a file is malformed or of another model, `dtype` is none of a model's, or `device` is not there.
            ImportError: an optional package is missing.
        """
        if name == "nano":
            return cls._embedded(dtype, device)
        directory, where = opened(name, dtype, device, "'nano' or a folder with a JanusFlow checkpoint")
        mean, std = _colours(directory / _PREPROCESSOR)
        tokenizer, codec = parts_of(
            directory, load_tokenizer, lambda path: KlCodec.from_pretrained(path, "SDXL's", where)
        )
        model = JanusFlow.from_pretrained(directory, dtype).to(where)
        check_vocabulary(directory, tokenizer, model.config.vocab)
        check_vae(directory, "latent_channels", model.config.latent_channels, codec.channels)
        layout = ChatLayout.from_tokenizer(tokenizer, model.config.vit_tokens)
        return cls(model, layout, codec, mean=mean, std=std, name=str(directory), tokenizer=tokenizer)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """As `ModelPipeline.save_pretrained`, with preprocessor_config.json."""
        super().save_pretrained(directory)
        colours = {"image_mean": list(self.mean), "image_std": list(self.std)}
        write_text(Path(directory) / _PREPROCESSOR, json.dumps(colours, indent=2) + "\n")

    # ---- drawing

    @property
    def own_size(self) -> tuple[int, int]:
        side = self.latent_pixels * self.model.config.latent_size
        return side, side

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        self.grid(size)
        config = self.model.config
        return config.latent_channels, config.latent_size, config.latent_size

    def times(self, evaluations: int) -> Tensor:
        return torch.tensor([step / evaluations * TIMES for step in range(evaluations)], dtype=torch.float32)

    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        """Images of one call of the sampler have prompts of one length."""
        return by_length(self.layout.drawing(prompts))

    def stepper(self, batch: ImageBatch) -> Stepper:
        self.grid(batch.size)
        tokens = torch.tensor(self.layout.drawing(batch.prompts), dtype=torch.int64, device=self._device)
        settings = (batch.steps, batch.guidance_scale, self.layout.pad)
        inputs = SampleInputs.build(self.model, batch.noise, tokens, *settings)
        return stepper_of(self.model, inputs, DenseStepper, batch.config, batch.adapter)

    def grid(self, size: Size | None = None) -> tuple[int, int]:
        config, own = self.model.config, self.own_size
        if size is not None and sides(size) != own:
            raise ValueError(f"size: expected {own[0]} pixels, all that this model draws, got {size!r}")
        return config.grid, config.grid

    # ---- calibration

    def image_sample(self, image: Image, prompt: str) -> GenerationSample:
        """The image is made the size that the model draws: scaled to cover it, and cropped in the middle."""
        (row,) = self.layout.drawing([prompt])
        latents = self.codec.encode(unit(covered(rgb(image, "image"), self.own_size[0], "image")).to(self._device))
        return GenerationSample(latents, torch.tensor(row, dtype=torch.int64, device=self._device), self.layout.pad)

    def question_sample(self, image: Image, question: str, answer: str) -> UnderstandingSample:
        pixels = pixel_values(rgb(image, "image"), self.model.config, self.mean, self.std).to(self._device)
        words = torch.tensor([self.layout.encode(answer)], dtype=torch.int64, device=self._device)
        asked = self.layout.question(question, self._device)
        return UnderstandingSample(pixels, torch.cat([asked, words], dim=1), words.shape[1])

    # ---- understanding

    def question_inputs(self, images: Any, question: str) -> tuple[list[Tensor], Any, Any]:
        image = rgb(*_single(images, "images"))
        pixels = pixel_values(image, self.model.config, self.mean, self.std).to(self._device)
        return [pixels], *around_image(self.model, self.layout.question(question, self._device))

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
        """A question has one image, of any size; see `pixel_values`."""
        check_callback("on_token", on_token)
        generators = None if seeds is None else self.generators(seeds, len(questions), "questions")
        tokens = [self.layout.question(question, self._device) for question in questions]
        pictures = [rgb(*_single(entry, name)) for name, entry in images.items()]
        if not tokens:
            return []
        pixels = torch.cat([pixel_values(each, self.model.config, self.mean, self.std) for each in pictures])
        answers = answer_tokens_batch(
            self.model,
            pixels.to(self._device).expand(len(tokens), -1, -1, -1),
            tokens,
            max_new_tokens,
            self.layout.eos,
            generators=generators,
            on_token=on_token,
            **sampling,
        )
        return [self.layout.answer(each) for each in answers]


def _single(entry: Any, name: str) -> tuple[Any, str]:
    """The one image of a question, which may be in a list, and its name. Raises ValueError for another number of them."""
    if not isinstance(entry, (list, tuple)):
        return entry, name
    if len(entry) != 1:
        raise ValueError(f"{name}: expected one image, because this model's questions are about one, got {len(entry)}")
    return entry[0], f"{name}[0]"


def _colours(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue, of a preprocessor's file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the file with image_mean and image_std of the checkpoint")
    fields = read_json(path)
    found = []
    for name in ("image_mean", "image_std"):
        value: Any = fields.get(name) if isinstance(fields, dict) else None
        good = isinstance(value, list) and len(value) == 3 and all(map(is_real, value))
        if not good or (name == "image_std" and min(value) <= 0) or not 0 <= min(value) <= max(value) <= 1:
            raise refusal(path, f"{name}: expected three numbers in [0, 1], got {shown(value)}")
        found.append(tuple(map(float, value)))
    return found[0], found[1]
