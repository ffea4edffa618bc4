"""Reads a file of prompts and assigns a seed and a file name to every image. Imports no torch.

A file is UTF-8 text with one prompt per line; blank lines and lines that begin with # are ignored. A .jsonl file has one
object per line, in which all but the prompt is optional:

    {"prompt": "a red circle", "seed": 7, "name": "circle"}
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..planning.reading import MAX_LIST_BYTES, read_text, refusal, shown, strict_json

__all__ = ["Job", "check_name", "check_record", "check_seed", "make_jobs", "read_prompts", "slug"]

PROMPT_LENGTH = 100_000
"""Characters of a prompt, of which a model reads some hundred tokens."""
SLUG_LENGTH = 48
INDEX_DIGITS = 4
# File systems allow 255 bytes; the temporary file beside an image has a longer name than the image.
_NAME_BYTES = 200
_KEYS = ("prompt", "seed", "name")


@dataclass(frozen=True)
class Job:
    """One image to generate: its prompt, its seed, and its file name (ends in .png)."""

    prompt: str
    seed: int
    name: str


def read_prompts(path: str | os.PathLike[str], seed: int = 0) -> list[Job]:
    """The images listed in a file, in its order.

    Args:
        seed: of the first image; image i, from 0, has seed + i unless its line gives another.

    Raises:
        ValueError: the file is not UTF-8, has no prompts, or a line is malformed; file and line are named.
        OSError: the file cannot be read.
    """
    path = Path(path)
    text = read_text(path, MAX_LIST_BYTES, encoding="utf-8-sig")
    # Not splitlines(), which also splits at form feeds and Unicode separators within JSON strings.
    lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    if path.suffix == ".jsonl":
        records = [(where, _record(where, line)) for where, line in lines if line]
    else:
        records = [(where, check_record(where, {"prompt": line})) for where, line in lines if line and line[0] != "#"]
    if not records:
        raise refusal(path, "expected at least one prompt, got none")
    return _jobs(records, seed)


def make_jobs(prompts: Sequence[str], seed: int = 0) -> list[Job]:
    """Jobs for a list of prompts, as `read_prompts`.

    Raises:
        TypeError: not a list of strings.
        ValueError: the list is empty, or a prompt is blank.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of strings, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    return _jobs(((f"prompts[{i}]", check_record(f"prompts[{i}]", {"prompt": p})) for i, p in enumerate(prompts)), seed)


def _record(where: str, line: str) -> dict[str, Any]:
    record = strict_json(line, where)
    if not isinstance(record, dict) or "prompt" not in record:
        raise refusal(where, f"expected an object with prompt and optionally seed, name, got {shown(line)}")
    unknown = sorted(set(record) - set(_KEYS))
    if unknown:
        raise refusal(where, f"unknown key {shown(unknown[0])}; known keys: {', '.join(_KEYS)}")
    return check_record(where, record)


def check_record(where: str, record: dict[str, Any]) -> dict[str, Any]:
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise refusal(where, f"prompt: expected a non-empty string, got {shown(prompt)}")
    if len(prompt) > PROMPT_LENGTH:
        raise refusal(where, f"prompt: expected at most {PROMPT_LENGTH} characters, got {len(prompt)}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refusal(where, f"prompt: expected text that UTF-8 can encode, got {shown(prompt)}") from error
    if "seed" in record:
        check_seed(f"{where}: seed", record["seed"])
    if "name" in record:
        check_name(f"{where}: name", record["name"])
    return record


def check_seed(where: str, seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise refusal(where, f"expected an integer in [0, 2^63), got {shown(seed)}")


def check_name(where: str, name: Any) -> None:
    """Check an image's file name: no path, not hidden, no control characters, short enough for file systems.

    Raises:
        ValueError: the name is invalid; the message begins with `where`.
    """
    usable = isinstance(name, str) and name.strip() == name and not name.startswith(".")
    if usable:
        usable = not any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in name) and name not in (
            "",
            ".png",
        )
    if not usable or len(name.encode("utf-8")) > _NAME_BYTES:
        raise refusal(where, f"expected a file name without a path, of at most {_NAME_BYTES} bytes, got {shown(name)}")


def _jobs(records: Sequence[tuple[str, dict[str, Any]]] | Iterator[tuple[str, dict[str, Any]]], seed: int) -> list[Job]:
    records = list(records)
    check_seed("seed", seed)
    digits = max(INDEX_DIGITS, len(str(len(records) - 1)))
    jobs: list[Job] = []
    taken: dict[str, str] = {}
    for index, (where, record) in enumerate(records):
        own = record.get("seed", seed + index)
        check_seed(f"{where}: seed", own)
        name = record.get("name") or "-".join(filter(None, (f"{index:0{digits}}", slug(record["prompt"]))))
        if not name.endswith(".png"):
            name += ".png"
        # On case-insensitive file systems names that differ only in case are one file.
        if name.casefold() in taken:
            raise refusal(
                where, f"name: expected a unique name, {shown(name)} is also that of {taken[name.casefold()]}"
            )
        taken[name.casefold()] = where
        jobs.append(Job(record["prompt"], own, name))
    return jobs


def slug(text: str) -> str:
    """A text's letters and digits joined by '-', shortened for a file name; may be empty."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).casefold())
    return words.strip("-")[:SLUG_LENGTH].strip("-")
