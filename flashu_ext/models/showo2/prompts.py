"""From text to token rows: the layouts for generation and understanding, and the special tokens."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prompts import AnswerLayout, check_prompts, check_question, encoder, plain_decoder, read_tokenizer

__all__ = ["GenerationInputs", "PromptLayout", "load_tokenizer"]

# Qwen2.5's names for Show-o2's special tokens; the tokens in _ADDED are appended to Qwen2.5's vocabulary, in this order.
_NAMES = {
    "bos": "<|im_start|>",
    "boi": "<|vision_start|>",
    "eoi": "<|vision_end|>",
    "img_pad": "<|image_pad|>",
    "pad": "[PAD]",
}
_ADDED = ("[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>")
_END = "<|im_end|>"

# Sequence lengths that upstream pads generation rows to, by image tokens with the time token (its demo configs).
_MAX_SEQ_LEN = {730: 1024, 1025: 1280, 4097: 4352}
_TEXT_LEN = 251  # in the two longer ones; also for sizes that upstream has no config for
_MARKS = 4  # bos, boi, eoi and eos

SYSTEM = "system\nYou are a helpful assistant.<|im_end|>"
USER = "\n<|im_start|>user\n"
ASSISTANT = "\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class GenerationInputs:
    """Token rows of a batch of prompts, ready for `sample`: tokens int64 [B, length], spans int64 [B, 1, 2]."""

    text_tokens: Tensor
    text_tokens_null: Tensor
    modality_positions: Tensor
    modality_positions_null: Tensor


@dataclass(frozen=True)
class PromptLayout(AnswerLayout):
    """The order of prompt, image and question in a sequence.

    Attributes:
        encode: text -> token ids, without special tokens.
        decode: token ids -> text, without special tokens.
        bos, eos, boi, eoi, img_pad, pad: token ids. `eos` ends an answer.
        image_tokens: tokens of an image span, time token included.
        max_text_len: prompts are truncated or padded to this many tokens.
        before_image: ids before boi in a question (system prompt and user role).
        after_question: ids after the question (assistant role).
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    bos: int
    eos: int
    boi: int
    eoi: int
    img_pad: int
    pad: int
    image_tokens: int
    max_text_len: int
    before_image: tuple[int, ...]
    after_question: tuple[int, ...]

    def with_image_tokens(self, image_tokens: int) -> PromptLayout:
        """The layout of images of another size; prompts are padded as upstream does where it has a config for that size.

        Args:
            image_tokens: tokens of an image span, time token included.
        """
        if image_tokens == self.image_tokens:
            return self
        length = _MAX_SEQ_LEN.get(image_tokens)
        text = self.max_text_len if length is None else length - image_tokens - _MARKS
        return dataclasses.replace(self, image_tokens=image_tokens, max_text_len=text)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of `generation`."""
        return self.image_tokens + self.max_text_len + _MARKS

    def generation(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> GenerationInputs:
        """`[bos] prompt [boi] image span [eoi] [eos] [pad...]` for each prompt, and the same without a prompt.

        Prompts of more than `max_text_len` tokens are cut, with a UserWarning.

        Raises:
            ValueError: no prompts, or one that is not a string.

        Source: upstream `prepare_gen_input`.
        """
        check_prompts(prompts)
        encoded = [self.encode(prompt) for prompt in prompts]
        self._warn_of_cuts([len(tokens) for tokens in encoded])
        rows = [self._row(tokens[: self.max_text_len]) for tokens in encoded]
        null, null_offset = self._row([])
        count = len(prompts)

        def tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return GenerationInputs(
            tensor([tokens for tokens, _ in rows]),
            tensor([null] * count),
            tensor([[[offset, self.image_tokens]] for _, offset in rows]),
            tensor([[[null_offset, self.image_tokens]]] * count),
        )

    def _warn_of_cuts(self, counts: Sequence[int]) -> None:
        """One warning for all prompts that do not fit; upstream cuts them without a word."""
        long = [index for index, count in enumerate(counts) if count > self.max_text_len]
        if long:
            more = f"; {len(long) - 1} more cut too" if len(long) > 1 else ""
            warnings.warn(
                f"prompts[{long[0]}]: cut to the first {self.max_text_len} of its {counts[long[0]]} tokens, as many as a row has "
                f"room for{more}",
                stacklevel=_callers_level(),
            )

    def _row(self, text: list[int]) -> tuple[list[int], int]:
        span = [self.img_pad] * self.image_tokens
        tail = [self.eoi, self.eos, *[self.pad] * (self.max_text_len - len(text))]
        return [self.bos, *text, self.boi, *span, *tail], len(text) + 2

    def question(self, text: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(tokens before the image [1, n], tokens from boi on [1, m]: boi, eoi, question, assistant role).

        Raises:
            ValueError: not a string, or an empty one.

        Source: upstream `inference_mmu.py`.
        """
        check_question(text)
        after = [self.boi, self.eoi, *self.encode(text), *self.after_question]

        def as_row(ids: Sequence[int]) -> Tensor:
            return torch.tensor([list(ids)], dtype=torch.int64, device=device)

        return as_row(self.before_image), as_row(after)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, image_tokens: int, max_seq_len: int | None = None) -> PromptLayout:
        """The published layout on a `load_tokenizer` tokenizer. `image_tokens` includes the time token.

        max_seq_len: sequence length that generation rows are padded to; None: upstream's for this size, such as 1024 at 432 px.
        """
        if max_seq_len is None:
            max_seq_len = _MAX_SEQ_LEN.get(image_tokens, image_tokens + _TEXT_LEN + _MARKS)
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in (*_NAMES.values(), _END) if name not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer: expected Show-o2's special tokens, {missing[0]!r} is missing")
        max_text_len = max_seq_len - image_tokens - _MARKS
        if max_text_len < 1:
            raise ValueError(f"max_seq_len: expected more than {image_tokens} image tokens and text, got {max_seq_len}")

        encode = encoder(tokenizer)
        ids = {field: vocabulary[name] for field, name in _NAMES.items()}
        return cls(
            encode=encode,
            decode=plain_decoder(tokenizer),
            eos=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else vocabulary[_END],
            image_tokens=image_tokens,
            max_text_len=max_text_len,
            before_image=(ids["bos"], *encode(SYSTEM), *encode(USER)),
            after_question=tuple(encode(ASSISTANT)),
            **ids,
        )


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Qwen2.5's tokenizer from local files, with Show-o2's additions (upstream `get_text_tokenizer`).

    Raises:
        FileNotFoundError: no tokenizer there; nothing is downloaded.
        ValueError: a file is malformed; it is named.
    """
    tokenizer = read_tokenizer(directory, "Qwen2.5")
    tokenizer.add_special_tokens({"pad_token": _ADDED[0]})
    tokenizer.add_tokens(list(_ADDED[1:]))
    return tokenizer


def _callers_level() -> int:
    """The stack level, for a warning of this module's function that calls this, of the first frame outside this package."""
    level, frame = 1, inspect.currentframe()
    frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_globals.get("__name__", "").startswith("flashu_ext."):
        level, frame = level + 1, frame.f_back
    return level
