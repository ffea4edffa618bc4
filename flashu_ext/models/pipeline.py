"""What every family's pipeline has: the parts of a folder, seeds and noise, streamed answers, presets, copies."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from ..planning.config import FlashUConfig
from ..planning.groups import FfnPruning, whole
from ..planning.reading import shown
from ..planning.safe_files import atomic_path
from .checkpoint import check_dtype
from .checks import check_callback, check_device
from .decoding import OnToken
from .pictures import to_pil
from .prompts import AnswerLayout

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..planning.plan import TaskPlan

__all__ = [
    "ModelPipeline",
    "check_vae",
    "check_vocabulary",
    "named_images",
    "noise_of",
    "opened",
    "parts_of",
    "seeds_of",
]


class ModelPipeline:
    """The base of pipelines: a model with the layout of its prompts and its image codec.

    Attributes:
        model: dense, or accelerated at any time.
        layout: prompts and questions to tokens, answers to text.
        codec: images to latents and back.
        name: the checkpoint's folder.
        presets: config for a preset name and this model.
        own_plan: config -> the included plan, pruned as the config says; None without one.
        tokenizer: of transformers, which `save_pretrained` writes; None where `layout` has another one.
    """

    saved_codec: ClassVar[type]
    """The codec whose VAE a folder can hold."""

    model: Any
    layout: AnswerLayout
    codec: Any
    name: str
    presets: Callable[[str], FlashUConfig | None]
    own_plan: Callable[[FlashUConfig], TaskPlan] | None
    tokenizer: Any

    @property
    def _device(self) -> Any:
        raise NotImplementedError

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

    # ---- drawing and answering

    def pictures(self, latents: Tensor) -> list[Image]:
        """Latents [B, channels, H, W] -> images. One at a time: a convolution's bits may depend on its batch."""
        return [to_pil(self.codec.decode(one)[0]) for one in latents.split(1)]

    def generators(self, seeds: Any, count: int, what: str) -> list[torch.Generator]:
        """A generator on the model's device for each of `count` seeds. Raises TypeError or ValueError."""
        return [torch.Generator(self._device).manual_seed(seed) for seed in seeds_of(seeds, count, what)]

    def _streamed(self, answer: Callable[[OnToken | None], str], on_text: Callable[[str], None] | None) -> str:
        """The text that `answer` gives; its parts are told as they come.

        Args:
            answer: called with a function of a question's index and its next token id.
            on_text: called with each new part; the parts concatenate to the answer.
        """
        check_callback("on_text", on_text)
        if on_text is None:
            return answer(None)
        tokens: list[int] = []
        given = ""

        def on_token(_: int, token: int) -> None:
            nonlocal given
            tokens.append(token)
            text = self.layout.continuation(tokens, given)
            given += text
            if text:
                on_text(text)

        whole_text = answer(on_token)
        if whole_text != given and whole_text.startswith(given):
            on_text(whole_text[len(given) :])
        return whole_text

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


# ---- folders


def opened(name: Any, dtype: Any, device: Any, expected: str) -> tuple[Path, torch.device]:
    """The folder and device of `from_pretrained`'s arguments. expected: for messages."""
    check_dtype(dtype)
    device = check_device(device)
    directory = Path(name)
    if not directory.is_dir():
        raise FileNotFoundError(f"{str(name)!r}: expected {expected}")
    return directory, device


def parts_of(directory: Path, tokenizer: Callable[[Path], Any], codec: Callable[[Path], Any]) -> tuple[Any, Any]:
    """What stands beside a model: its tokenizer, in `tokenizer/` or the folder itself, and its VAE in `vae/`."""
    try:
        own = directory / "tokenizer"
        return tokenizer(own if own.is_dir() else directory), codec(directory / "vae")
    except FileNotFoundError as error:
        hint = "model.save_pretrained writes only the model, pipe.save_pretrained what goes with it too"
        raise FileNotFoundError(f"{error}; {hint}") from error


def check_vocabulary(directory: Path, tokenizer: Any, vocabulary: int) -> None:
    """Raise ValueError where the tokenizer has tokens that the model has no embedding of."""
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}")


def check_vae(directory: Path, name: str, expected: Any, got: Any) -> None:
    """Raise ValueError where the VAE is not the model's."""
    if got != expected:
        raise ValueError(f"{directory / 'vae'}: {name}: expected {expected}, as the model's VAE has, got {shown(got)}")


# ---- arguments


def seeds_of(seeds: Any, count: int | None, what: str) -> list[int]:
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


def noise_of(seeds: Sequence[int], shape: Sequence[int], device: Any) -> Tensor:
    """Standard normal noise fp32 [len(seeds), *shape], each row from its own seed, drawn on the CPU."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # Of the dtype and on the device that are promised, not the process's defaults.
    rows = [torch.randn(tuple(shape), generator=each, dtype=torch.float32, device="cpu") for each in generators]
    return torch.stack(rows).to(device)


def named_images(images: Any, questions: Any, more: str = "") -> dict[str, Any]:
    """The entries of `answer_batch`'s images under their names for messages. more: said where their number is wrong.

    Raises:
        TypeError: questions or images are no list.
        ValueError: there is neither one entry nor one for each question.
    """
    if isinstance(questions, str) or not isinstance(questions, Sequence):
        raise TypeError(f"questions: expected a list of strings, got {type(questions).__name__}")
    if not isinstance(images, Sequence):
        raise TypeError(f"images: expected a list of PIL images, got {type(images).__name__}")
    if len(images) not in (1, len(questions)):
        raise ValueError(
            f"images: expected one, or one for each of {len(questions)} questions, got {len(images)}{more}"
        )
    return {f"images[{row}]": entry for row, entry in enumerate(images)}
