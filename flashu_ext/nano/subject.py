"""What training and measuring ask of an embedded model, whatever its family: all of them live in one world, with one codec
and one tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.adapter import adapter_of
from ..models.pipeline import ModelPipeline
from ..planning.config import FlashUConfig, preset
from ..planning.cost import Geometry
from .tokenizer import layout
from .world import Question

__all__ = [
    "ANSWER_TOKENS",
    "DATA",
    "FAMILIES",
    "PRUNE_MULTIPLE",
    "Subject",
    "WEIGHTS",
    "folder_in_weights",
    "packed",
    "subject",
    "subject_of",
    "with_answers",
]

DATA = Path(__file__).parent / "data"
WEIGHTS = "flashu_ext_nano"
"""The package with the weights that are not in this one: its wheel would be too large."""
PRUNE_MULTIPLE = 16
"""The FFNs are small, so kept neurons are counted in 16s here."""
ANSWER_TOKENS = 4


class Subject(ABC):
    """An embedded model's family. Images are the codec's latents [B, 16, 72, 2] everywhere; a family reads them as it likes."""

    family: ClassVar[str]
    folder: ClassVar[Path]
    """Of the shipped model."""
    guidance: ClassVar[float]
    """Show-o2's was chosen on training scenes; for the others no better one was found or looked for."""
    paper: ClassVar[Mapping[str, Any]] = {}
    """Where the preset 'paper' has other settings than the paper."""

    @abstractmethod
    def build(self) -> Any:
        """A model with new weights."""

    @abstractmethod
    def load(self, directory: Path) -> Any:
        """The model of a folder, fp32, in eval mode."""

    @abstractmethod
    def pipeline(self, model: Any) -> ModelPipeline:
        """The family's pipeline around a model."""

    @abstractmethod
    def velocity(self, model: Any, prompts: Sequence[str], null: Tensor, mixed: Tensor, t: Tensor) -> Tensor:
        """In training, the velocity towards the images.

        Args:
            null: bool [B], rows that see no prompt.
            mixed: t of the image and 1 - t of noise [B, 16, 72, 2]. t: fp32 [B].
        """

    @abstractmethod
    def answered(self, model: Any, latents: Tensor, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """What a batch is trained on, one question to each image [B, 16, 72, 2]: logits [words, vocab], and the right
        answers' words int64 [words]."""

    @abstractmethod
    def generate(
        self,
        model: Any,
        prompts: Sequence[str],
        noise: Tensor,
        steps: int | None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Images of prompts from noise, both [B, 16, 72, 2], by the family's own `sample`, dense or accelerated.

        Args:
            steps: grid points if the config has none.
            callback: as for `sample`, where all prompts are one call.
        """

    @abstractmethod
    def answer(self, model: Any, latents: Tensor, question: Question) -> tuple[str, list[int]]:
        """The answer to a question about an image [1, 16, 72, 2], as text and as token ids."""

    @abstractmethod
    def generation_sample(self, latents: Tensor, prompt: str) -> Any:
        """A sample of drawing for `calibrate`: an image [1, 16, 72, 2] and what it may be called."""

    @abstractmethod
    def understanding_sample(self, latents: Tensor, question: Question) -> Any:
        """A sample of answering for `calibrate`, with its answer."""

    @abstractmethod
    def geometry(self, prompt: str) -> Geometry:
        """Lengths of a drawing, for counting its work."""

    def preset_config(self, name: str, steps: int | None = None) -> FlashUConfig | None:
        """FlashUConfig of a preset for this model, or None for dense."""
        overrides: dict[str, Any] = {} if steps is None else {"steps": steps}
        if name in ("paper", "fast"):
            overrides["prune_multiple"] = PRUNE_MULTIPLE
        if name == "paper":
            overrides |= self.paper
        return preset(name, **overrides)


FAMILIES = ("showo2", "janusflow", "bagel")


def folder_in_weights(family: str) -> Path:
    """The family's folder in a source folder's weights, else in those installed; it need not exist."""
    source = DATA.parents[2] / "nano_weights" / WEIGHTS
    found = None if source.is_dir() else find_spec(WEIGHTS)
    return Path(found.submodule_search_locations[0] if found and found.submodule_search_locations else source) / family


def subject(family: str) -> Subject:
    """The embedded model's family of this name, one of FAMILIES."""
    found: Subject = import_module(f".{family}", __package__).SUBJECT
    return found


def subject_of(model: Any) -> Subject:
    """The same by a model."""
    return subject(adapter_of(model).family)


def packed(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> Tensor:
    """Token ids int64 [rows, longest], with padding behind."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)


def with_answers(
    asked: Sequence[Sequence[int]], questions: Sequence[Question], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids of questions with their answers and the end behind them, int64 [B, n]; and bool [B, n - 1], the places before a
    word of the answer or the end, where it is predicted."""
    words = layout()
    rows = [[*row, *words.encode(q.answer), words.eos] for row, q in zip(asked, questions, strict=True)]
    place = torch.arange(1, max(map(len, rows)), device=device)
    start, end = (torch.tensor([len(row) for row in each], device=device)[:, None] for each in (asked, rows))
    return packed(rows, words.pad, device), (place >= start) & (place < end)
