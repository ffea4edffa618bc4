"""What every family's pipeline has: its files, answers, presets and copies."""

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
from ..planning.groups import FfnPruning
from ..planning.safe_files import atomic_path
from .calibration import Sample
from .checks import check_callback
from .decoding import OnToken
from .pictures import to_pil
from .prompts import AnswerLayout, Parts
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

    # ---- calibration

    def image_sample(self, image: Image, prompt: str) -> Sample:
        """A PIL image with its prompt, for `calibrate`. Raises TypeError or ValueError for what is neither."""
        raise NotImplementedError

    def question_sample(self, image: Image, question: str, answer: str) -> Sample:
        """A PIL image with a question and its answer, for `calibrate`. The end token, which a model never reads, is omitted."""
        raise NotImplementedError

    # ---- drawing and answering

    def pictures(self, latents: Tensor) -> list[Image]:
        """Latents [B, channels, H, W] -> images. One at a time: a convolution's bits may depend on its batch."""
        return [to_pil(self.codec.decode(one)[0]) for one in latents.split(1)]

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
        raise NotImplementedError

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

    def accelerate(self, config: FlashUConfig | None = None, plan: TaskPlan | None = None) -> Any:
        """`flashu_ext.accelerate` on this pipeline's model; returns the handle."""
        return import_module("flashu_ext").accelerate(self.model, config, plan)
