"""From text to tokens: texts between markers, without roles."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..prompts import AnswerLayout, encoder, plain_decoder, read_tokenizer
from .model import Text, TokenIds

__all__ = ["SequenceLayout", "load_tokenizer"]

_MARKERS = {"bos": "<|im_start|>", "eos": "<|im_end|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}
"""Upstream appends those that a tokenizer lacks, in this order."""


@dataclass(frozen=True)
class SequenceLayout(AnswerLayout):
    """Texts of a sequence.

    Attributes:
        encode: text -> token ids, none added.
        decode: token ids -> text, without special tokens.
        bos, eos, boi, eoi: ids of the markers around texts and images. `eos` ends an answer.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    bos: int
    eos: int
    boi: int
    eoi: int

    @property
    def ids(self) -> TokenIds:
        """The markers as the model takes them."""
        return TokenIds(self.bos, self.eos, self.boi, self.eoi)

    def text(self, text: str, device: torch.device | str = "cpu") -> Text:
        """A text as an item of a sequence; the model puts its markers around it."""
        return Text(torch.tensor(self.encode(text), dtype=torch.int64, device=device))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SequenceLayout:
        """The published layout on a `load_tokenizer` tokenizer."""
        vocabulary = tokenizer.get_vocab()
        markers = {field: vocabulary[name] for field, name in _MARKERS.items()}
        return cls(encode=encoder(tokenizer), decode=plain_decoder(tokenizer), **markers)


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Qwen2.5's tokenizer from local files, with BAGEL's markers where they are missing (upstream `add_special_tokens`).

    Raises:
        FileNotFoundError: no tokenizer there; nothing is downloaded.
        ValueError: a file is malformed; it is named.
    """
    tokenizer = read_tokenizer(directory, "Qwen2.5")
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([name for name in _MARKERS.values() if name not in vocabulary], special_tokens=True)
    return tokenizer
