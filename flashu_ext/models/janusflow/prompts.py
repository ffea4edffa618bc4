"""From text to tokens: upstream's conversation of one question or one prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prompts import AnswerLayout, check_prompts, check_question, encoder, plain_decoder, read_tokenizer

__all__ = ["ChatLayout", "load_tokenizer"]

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

IMAGE, GENERATION = "<image_placeholder>", "<｜begin▁of▁generation｜>"
_TAGS = {"image": IMAGE, "tag": GENERATION, "boi": "<begin_of_image>", "eoi": "<end_of_image>"}
"""Upstream appends those that a tokenizer lacks, in this order."""
_PAD = "<｜▁pad▁｜>"


@dataclass(frozen=True)
class ChatLayout(AnswerLayout):
    """Prompts and questions as upstream's conversations.

    Attributes:
        encode: text -> token ids, special tokens in the text too, none added.
        decode: token ids -> text, without special tokens.
        bos, eos, boi, eoi, pad: token ids. `eos` ends an answer.
        image: id of the placeholder of an image's tokens.
        tag: id that ends a prompt to draw; the time's embedding takes its place.
        image_tokens: of an image that is asked about.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    bos: int
    eos: int
    boi: int
    eoi: int
    pad: int
    image: int
    tag: int
    image_tokens: int

    def drawing(self, prompts: Sequence[str]) -> list[list[int]]:
        """For each prompt bos, the user's turn, the assistant's, and the tag.

        Raises:
            ValueError: no prompts, or one that is not a string.
        Source: upstream demo/app_janusflow.py.
        """
        check_prompts(prompts)
        # A turn without text has neither a space nor an end.
        texts = [f"User: {text}\n\nAssistant:" if (text := each.strip()) else "User:Assistant:" for each in prompts]
        return [[self.bos, *self.encode(text), self.tag] for text in texts]

    def question(self, text: str, device: torch.device | str = "cpu") -> Tensor:
        """Tokens int64 [1, n] of a question about one image: bos, system prompt, image, question, the assistant's turn.

        Raises:
            ValueError: not a string, an empty one, or one with the placeholder of an image in it.
        Source: upstream janus/janusflow/models/processing_vlm.py.
        """
        check_question(text)
        ids = self.encode(f"{SYSTEM}\n\nUser: {IMAGE}\n{text.rstrip()}\n\nAssistant:")
        if ids.count(self.image) != 1:
            raise ValueError(f"question: expected a text without {IMAGE}, got {text!r:.100}")
        place = ids.index(self.image)
        span = [self.boi, *[self.image] * self.image_tokens, self.eoi]
        return torch.tensor([[self.bos, *ids[:place], *span, *ids[place + 1 :]]], dtype=torch.int64, device=device)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, image_tokens: int) -> ChatLayout:
        """The published layout on a `load_tokenizer` tokenizer.

        Raises:
            ValueError: it names no token that begins or ends a text.
        """
        vocabulary, bos, eos = tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None or eos is None:
            raise ValueError("tokenizer: expected bos_token and eos_token in its config, one is missing")
        return cls(
            encode=encoder(tokenizer),
            decode=plain_decoder(tokenizer),
            bos=bos,
            eos=eos,
            pad=vocabulary.get(_PAD, eos),
            image_tokens=image_tokens,
            **{field: vocabulary[name] for field, name in _TAGS.items()},
        )


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """JanusFlow's tokenizer from local files, with upstream's additions where they are missing.

    Raises:
        FileNotFoundError: no tokenizer there; nothing is downloaded.
        ValueError: a file is malformed; it is named.
    """
    # Its config names Llama's class, which has other rules of splitting; tokenizer.json says it all.
    tokenizer = read_tokenizer(directory, "JanusFlow", "PreTrainedTokenizerFast")
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([name for name in _TAGS.values() if name not in vocabulary], special_tokens=True)
    return tokenizer
