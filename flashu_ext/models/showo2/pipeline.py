"""From a prompt to an image and from an image and a question to an answer: tokenizer, model and image codec."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from ...planning.config import FlashUConfig, preset
from ...planning.extras import extra
from ...planning.groups import FfnPruning, whole
from ...planning.reading import MAX_PIXELS, shown
from ...planning.safe_files import atomic_path
from ..checkpoint import check_dtype
from ..checks import check_callback, check_device
from .codec import ImageCodec, WanCodec
from .many import AT_ONCE, Answers, Drawings
from .model import Showo2
from .positions import table_side
from .prompts import PromptLayout, load_tokenizer
from .sampling import sample
from .understanding import answer_tokens_batch

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...planning.plan import TaskPlan

__all__ = ["Pipeline"]

Size = int | tuple[int, int]
"""An image's size in pixels: its side, or (height, width)."""

_EMBEDDED = {"nano": "flashu_ext.nano.pipeline"}
"""Models included in the package: name -> a module with `load_pipeline(dtype, device)`."""


@dataclass
class Pipeline:
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
        check_dtype(dtype)
        device = check_device(device)
        if name in _EMBEDDED:
            return import_module(_EMBEDDED[str(name)]).load_pipeline(dtype, device)
        directory = Path(name)
        if not directory.is_dir():
            raise FileNotFoundError(f"{str(name)!r}: expected 'nano' or a folder with a Show-o2 checkpoint")
        try:
            tokenizer = load_tokenizer(directory / "tokenizer" if (directory / "tokenizer").is_dir() else directory)
            codec = WanCodec.from_pretrained(directory / "vae")
        except FileNotFoundError as error:
            hint = "model.save_pretrained writes only the model, pipe.save_pretrained what goes with it too"
            raise FileNotFoundError(f"{error}; {hint}") from error
        model = Showo2.from_pretrained(directory, dtype).to(device)
        config = model.config
        if len(tokenizer) > config.llm_vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {config.llm_vocab_size}"
            )
        return cls(
            model=model,
            layout=PromptLayout.from_tokenizer(tokenizer, config.image_tokens),
            codec=codec,
            pixels=8 * config.patch_size * config.image_latent_height,
            name=str(directory),
            tokenizer=tokenizer,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and VAE into a folder that `from_pretrained` reads; weights in the model's own order.

        Args:
            directory: created if missing; existing files of these names are replaced, each whole or not at all.

        Raises:
            TypeError: the tokenizer or codec is none that a folder can hold, such as the embedded model's.
            OSError: a file cannot be written.
        """
        if self.tokenizer is None or not isinstance(self.codec, WanCodec):
            raise TypeError(
                f"pipeline: expected a tokenizer of transformers and a WanCodec, got {type(self.tokenizer).__name__} and "
                f"{type(self.codec).__name__}; self.model.save_pretrained writes the model alone"
            )
        directory = Path(directory)
        self.model.save_pretrained(directory)
        for name, part in (("tokenizer", self.tokenizer), ("vae", self.codec.vae)):
            with tempfile.TemporaryDirectory() as draft:
                part.save_pretrained(draft)
                for file in filter(Path.is_file, Path(draft).rglob("*")):
                    target = directory / name / file.relative_to(draft)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_path(target) as temporary:
                        shutil.copyfile(file, temporary)

    # ---- generation

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
            steps: grid points; None: the accelerated config's, or 50.
            guidance_scale: None: the pipeline's own; 0: no guidance.
            size: pixels, one number or (height, width); None: the size that the model's config names, `pixels`. Show-o2's
                1.5B-HQ draws 512 and 1024, and its config names 432.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
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
        """Generate images for several prompts as one batch; image i has the noise of seeds[i] (default: 0, 1, ...).

        guidance_scale: one for all images, or one for each.

        size: of all images, as in `generate`.

        sampler: called instead of `sample`, with its arguments (such as `flashu_ext.parallel.sample_guided`).
        """
        tokens = self.prompt_tokens(prompts, size)
        latents = (sampler or sample)(
            self.model,
            self.noise(list(range(len(prompts))) if seeds is None else seeds, len(prompts), size),
            **tokens,
            steps=steps,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            time_shifting_factor=self.time_shifting_factor,
        )
        return self.pictures(latents)

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

    def prompt_tokens(self, prompts: Sequence[str], size: Size | None = None) -> dict[str, Any]:
        """The tokens and positions of `sample`'s arguments for prompts whose images have `size`."""
        return dict(vars(self._layout_of(self.grid(size)).generation(prompts, self._device)))

    def pictures(self, latents: Tensor) -> list[Image]:
        """Latents [B, channels, H, W] -> images. One at a time: a convolution's bits may depend on its batch."""
        return [_to_pil(self.codec.decode(one)[0]) for one in latents.split(1)]

    def noise(self, seeds: Sequence[int], count: int | None = None, size: Size | None = None) -> Tensor:
        """Standard normal noise fp32 [len(seeds), channels, H, W], each image from its own seed; `size` as in `generate`."""
        seeds = self._seeds(seeds, count, "prompts")
        config = self.model.config
        shape = (config.image_latent_dim, *(patches * config.patch_size for patches in self.grid(size)))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        # Of the dtype and on the device that are promised, not the process's defaults.
        rows = [torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
        return torch.stack(rows).to(self._device)

    def grid(self, size: Size | None = None) -> tuple[int, int]:
        """(height, width) in patches of an image of `size` pixels, as in `generate`; None: of the model's own size.

        Raises:
            TypeError, ValueError: `size` is no size, or this model and its codec cannot draw it.
        """
        config: Any = self.model.config
        own = (config.image_latent_height, config.image_latent_width)
        if size is None:
            return own
        height, width = _pixels(size)
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

    @staticmethod
    def _seeds(seeds: Any, count: int | None, what: str) -> list[int]:
        """Seeds as integers of Python, `count` of them. Raises TypeError or ValueError."""
        try:
            given = None if isinstance(seeds, (str, bytes)) else list(seeds)
        except TypeError:
            given = None
        if given is None:
            raise TypeError(f"seeds: expected a list of integers, got {type(seeds).__name__}")
        if count is not None and len(given) != count:
            raise ValueError(f"seeds: expected one for each of {count} {what}, got {len(given)}")
        numbers = []
        for seed in given:
            number = whole(seed)
            if number is None or not 0 <= number < 2**63:
                raise ValueError(f"seed: expected an integer in [0, 2^63), got {shown(seed)}")
            numbers.append(number)
        return numbers

    # ---- understanding

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
            image: PIL image of any size; it is scaled to cover the model's square and cropped in the middle. A list of images
                is put before the question in its order.
            on_text: called with each new part of the answer as it comes; the parts concatenate to the answer.
            temperature, top_k, top_p: as in `answer_tokens`.
            seed: of the draws; None: torch's own generator.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
        """
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling["seeds"] = None if seed is None else [seed]
        check_callback("on_text", on_text)
        if on_text is None:
            return self._answers({"image": image}, [question], max_new_tokens, **sampling)[0]
        tokens: list[int] = []
        given = ""

        def on_token(_: int, token: int) -> None:
            nonlocal given
            tokens.append(token)
            text = self.layout.continuation(tokens, given)
            given += text
            if text:
                on_text(text)

        answer = self._answers({"image": image}, [question], max_new_tokens, on_token=on_token, **sampling)[0]
        if answer != given and answer.startswith(given):
            on_text(answer[len(given) :])
        return answer

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
        on_token: Callable[[int, int], None] | None = None,
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
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seeds": seeds}
        return self._answers(named, questions, max_new_tokens, on_token=on_token, **sampling)

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
        """images: the name of each entry, for messages, and the entry."""
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

    def question_inputs(self, images: Any, question: str) -> tuple[list[Tensor], Tensor, Tensor]:
        """The latents [1, channels, H, W] of a question's images, and the tokens before and after them (`answer_tokens`)."""
        return self._encoded(images, "images"), *self.layout.question(question, self._device)

    def generators(self, seeds: Any, count: int, what: str) -> list[torch.Generator]:
        """A generator on the model's device for each of `count` seeds. Raises TypeError or ValueError."""
        return [torch.Generator(self._device).manual_seed(seed) for seed in self._seeds(seeds, count, what)]

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

    def accelerate(self, config: FlashUConfig | None = None, plan: TaskPlan | None = None) -> Any:
        """`flashu_ext.accelerate` on this pipeline's model; returns the handle."""
        return import_module("flashu_ext").accelerate(self.model, config, plan)

    @property
    def _device(self) -> Any:
        return self.model.showo.model.embed_tokens.weight.device


def _pixels(size: Any) -> tuple[int, int]:
    """(height, width) of a size in pixels. Raises TypeError or ValueError."""
    sides = [whole(side) for side in (size if isinstance(size, (tuple, list)) else [size, size])]
    numbers = [side for side in sides if side is not None]
    if len(sides) != 2 or len(numbers) != 2:
        raise TypeError(f"size: expected pixels, an integer or (height, width), got {shown(size, 80)}")
    height, width = numbers
    if height < 1 or width < 1:
        raise ValueError(f"size: expected at least one pixel, got {shown(height)} x {shown(width)}")
    if max(height, width) > MAX_PIXELS:
        raise ValueError(f"size: expected at most {MAX_PIXELS} pixels a side, got {shown(height)} x {shown(width)}")
    return height, width


def _to_pil(image: Tensor) -> Image:
    """[3, H, W] in [-1, 1] -> PIL image."""
    with extra("showo2"):
        from PIL import Image as images

    pixels = ((image.permute(1, 2, 0).cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.fromarray(pixels.numpy())


def _from_pil(image: Image, side: int, name: str) -> Tensor:
    """PIL image -> [1, 3, side, side] in [-1, 1]. Raises TypeError or ValueError, naming it."""
    import numpy as np

    with extra("showo2"):
        from PIL import Image as images

    if not isinstance(image, images.Image):
        raise TypeError(f"{name}: expected a PIL image, got {type(image).__name__}")
    try:
        image = image.convert("RGB")
    except (
        Exception
    ) as error:  # damaged files end in errors of all kinds; a closed one in an AttributeError or ValueError
        raise ValueError(f"{name}: expected an image that can be read: {error}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name}: expected at least one pixel, got {width} x {height}")
    if (width, height) != (side, side):
        scale = side / min(width, height)
        width, height = max(side, int(width * scale)), max(side, int(height * scale))
        if width * height > MAX_PIXELS:
            raise ValueError(f"{name}: expected sides of a like length, got {image.size[0]} x {image.size[1]}")
        image = image.resize((width, height), images.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1
