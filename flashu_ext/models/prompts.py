"""Texts and tokens in all families' pipelines: tokenizer files, checks of prompts, texts of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..planning.extras import extra
from ..planning.reading import refusal, shown

__all__ = [
    "AnswerLayout",
    "Parts",
    "by_length",
    "check_prompts",
    "check_question",
    "check_text",
    "encoder",
    "plain_decoder",
    "read_tokenizer",
]


class AnswerLayout:
    """What every family's layout of prompts and questions knows.

    Attributes:
        encode: text -> token ids, without special tokens.
        decode: token ids -> text, without special tokens.
        eos: the token id that ends an answer.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos: int

    def answer(self, tokens: Sequence[int] | Tensor) -> str:
        """Text of an answer's tokens."""
        ids = [int(token) for token in tokens]
        return self.decode([token for token in ids if token != self.eos]).strip()

    def continuation(self, tokens: Sequence[int], given: str) -> str:
        """The text of an answer's tokens after `given`, the text so far; '' while a character is incomplete."""
        text = self.answer(tokens)
        return "" if text.endswith("\ufffd") or not text.startswith(given) else text[len(given) :]


class Parts:
    """The text of one answer, part by part as its tokens come. The parts concatenate to the answer.

    Attributes:
        tokens: that have come.
        given: the text of the parts so far.
    """

    def __init__(self, layout: AnswerLayout):
        self.layout = layout
        self.tokens: list[int] = []
        self.given = ""

    def add(self, token: int) -> str:
        """The part that another token makes known; '' where there is none yet."""
        self.tokens.append(token)
        text = self.layout.continuation(self.tokens, self.given)
        self.given += text
        return text

    def rest(self, answer: str) -> str:
        """What the parts so far lack of the whole answer."""
        return answer[len(self.given) :] if answer.startswith(self.given) else ""


def check_text(name: str, text: Any) -> None:
    """Raise TypeError for what is no string, ValueError for one that no tokenizer can read."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text, got half of a surrogate pair at {error.start}") from error


def check_prompts(prompts: Any) -> None:
    """Raise ValueError for anything but a list of texts that is not empty."""
    given = prompts if isinstance(prompts, Sequence) and not isinstance(prompts, str) else ()
    if not given or not all(isinstance(prompt, str) for prompt in given):
        raise ValueError(f"prompts: expected a non-empty list of strings, got {shown(prompts, 100)}")
    for index, prompt in enumerate(given):
        check_text(f"prompts[{index}]", prompt)


def by_length(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The indices of rows of equal lengths, in the order in which the lengths come."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(len(row), []).append(index)
    return list(groups.values())


def check_question(text: Any) -> None:
    """Raise ValueError for anything but a string that is not empty."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"question: expected a non-empty string, got {shown(text, 100)}")
    check_text("question", text)


# ---- tokenizers


def read_tokenizer(directory: str | os.PathLike[str], of: str, kind: str = "AutoTokenizer") -> Any:
    """A tokenizer of transformers from local files; nothing is downloaded.

    Args:
        of: whose tokenizer, for messages.
        kind: a class of transformers. PreTrainedTokenizerFast takes tokenizer.json as it is, whatever class its config names.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: a file is malformed; it is named.
    """
    with extra("showo2"):
        import transformers

    path = Path(directory)
    files = ("tokenizer.json", "vocab.json") if kind == "AutoTokenizer" else ("tokenizer.json",)
    if not any((path / name).is_file() for name in files):
        raise FileNotFoundError(f"{path}: expected {' or '.join(files)} of {of}")
    try:
        return getattr(transformers, kind).from_pretrained(path, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise refusal(_malformed(path), f"not a tokenizer's file: {error}") from error


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> token ids; nothing is added around them."""
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def plain_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids -> text without special tokens."""
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def _malformed(directory: Path) -> Path:
    """The first of a tokenizer's files that holds no JSON; the folder if each does."""
    for path in sorted(directory.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError):
            return path
    return directory
