"""The embedded model's tokenizer: one token a word of the world, with Show-o2's special token names."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from ..models.showo2.prompts import PromptLayout
from ..planning.extras import extra
from .codec import GRID
from .world import captions, questions, scenes

__all__ = ["MAX_TEXT", "layout", "vocabulary", "write_tokenizer"]

FILE = Path(__file__).parent / "data" / "tokenizer.json"
SPECIAL = (
    "[PAD]",
    "[UNK]",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "user",
    "assistant",
)
MAX_TEXT = 8
"""Tokens of the longest caption ('a red circle left of a blue square')."""


def vocabulary() -> list[str]:
    """Special tokens, then every word that captions, questions and answers use, sorted."""
    rng = random.Random(0)
    words: set[str] = set()
    for scene in (*scenes(False), *scenes(True)):
        for caption in captions(scene):
            words.update(caption.split())
        for _ in range(8):
            for question in questions(scene, rng):
                words.update(question.text.split(), question.answer.split())
    return [*SPECIAL, *sorted(words)]


def write_tokenizer(path: Path = FILE) -> None:
    """Write tokenizer.json (tokenizers library, word level, lower case)."""
    with extra("showo2"):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.add_special_tokens([word for word in SPECIAL if not word.isalpha()])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


@cache
def layout(path: Path = FILE) -> PromptLayout:
    """The embedded model's prompt layout.

    Raises:
        FileNotFoundError: the tokenizer file is missing.
    """
    with extra("showo2"):
        from tokenizers import Tokenizer

    if not path.is_file():
        raise FileNotFoundError(f"{path}: the embedded tokenizer is missing; reinstall the package")
    tokenizer: Any = Tokenizer.from_file(str(path))
    ids = tokenizer.get_vocab()
    return PromptLayout(
        encode=lambda text: tokenizer.encode(text.replace("?", " ?"), add_special_tokens=False).ids,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        bos=ids["<|im_start|>"],
        eos=ids["<|im_end|>"],
        boi=ids["<|vision_start|>"],
        eoi=ids["<|vision_end|>"],
        img_pad=ids["<|image_pad|>"],
        pad=ids["[PAD]"],
        image_tokens=GRID * GRID + 1,
        max_text_len=MAX_TEXT,
        before_image=(ids["<|im_start|>"], ids["user"]),
        after_question=(ids["assistant"],),
    )
