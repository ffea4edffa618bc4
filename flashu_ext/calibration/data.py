"""Reads calibration samples from a folder of images with prompts, questions and answers.

A folder has one file of JSON lines per task, named after it: `generation.jsonl`, `understanding.jsonl`, any other name:

    {"image": "cat.png", "prompt": "a cat on a chair"}                              a generation task
    {"image": "cat.png", "question": "What is on the chair?", "answer": "A cat."}   an understanding task

All lines are checked before anything runs; images are opened one at a time, when needed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..planning.reading import MAX_LIST_BYTES, open_regular, read_image, read_text, refusal, shown, strict_json

if TYPE_CHECKING:
    from ..models.calibration import Sample
    from ..models.pipeline import ModelPipeline

__all__ = ["Samples", "folder_samples", "read_folder"]

_DRAWING = frozenset({"image", "prompt"})
_QUESTION = frozenset({"image", "question", "answer"})
_FIXED = {"generation": _DRAWING, "understanding": _QUESTION}


@dataclass(frozen=True)
class Samples:
    """A task's samples, made lazily, with `len()`."""

    records: tuple[Any, ...]
    make: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, self.records)


def folder_samples(
    pipe: ModelPipeline, directory: str | os.PathLike[str], limit: int | None = None
) -> dict[str, Samples]:
    """task -> samples of a folder, for `calibrate(model, tasks=...)`; `generation` and `understanding` come first.

    Args:
        pipe: of any family; its prompt layout and image codec are used.
        limit: maximum samples per task, the first ones.

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    directory = Path(directory)

    def make(line: tuple[str, Mapping[str, str]]) -> Sample:
        where, record = line
        try:
            image = read_image(directory / record["image"])
            if "prompt" in record:
                return pipe.image_sample(image, record["prompt"])
            return pipe.question_sample(image, record["question"], record["answer"])
        except (ValueError, OSError) as error:
            raise refusal(where, error) from error

    return {task: Samples(tuple(lines), make) for task, lines in read_folder(directory, limit).items()}


def read_folder(
    directory: str | os.PathLike[str], limit: int | None = None
) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """task -> checked lines of a folder's files, each with file and line in words, without opening an image.

    Raises:
        FileNotFoundError: no folder, no `.jsonl` file, or an image is missing.
        ValueError: a line is malformed.
        Errors in a line name file and line.
    """
    directory = Path(directory)
    files = {path.stem: path for path in sorted(directory.glob("*.jsonl"))}
    if not files:
        raise FileNotFoundError(
            f"{directory}: expected generation.jsonl, understanding.jsonl or other <task>.jsonl files"
        )
    order = sorted(files, key=lambda task: (task != "generation", task != "understanding", task))
    return {task: _read_file(directory, files[task], task, limit) for task in order}


def _read_file(directory: Path, path: Path, task: str, limit: int | None) -> list[tuple[str, dict[str, str]]]:
    records: list[tuple[str, dict[str, str]]] = []
    keys = _FIXED.get(task)
    text = read_text(path, MAX_LIST_BYTES)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in itertools.islice(lines, limit):
        where = f"{path}:{number}"
        record = strict_json(line, where)
        allowed = (keys,) if keys else (_DRAWING, _QUESTION)
        if not isinstance(record, dict) or set(record) not in allowed:
            shapes = " or ".join(", ".join(sorted(shape)) for shape in allowed)
            raise refusal(where, f"expected an object with {shapes}, got {shown(line.strip())}")
        keys = frozenset(record)
        for name, value in record.items():
            # An empty prompt is valid; other fields must not be empty.
            if not isinstance(value, str) or (not value.strip() and name != "prompt"):
                raise refusal(where, f"{name}: expected a non-empty string, got {shown(value)}")
        image = PurePosixPath(record["image"])
        if image.is_absolute() or ".." in image.parts:
            raise refusal(where, f"image: expected a path within the folder, got {shown(record['image'])}")
        _check_file(where, directory / image)
        records.append((where, record))
    if not records:
        raise refusal(path, "expected at least one line, got none")
    return records


def _check_file(where: str, path: Path) -> None:
    try:
        with open_regular(path):
            pass
    except FileNotFoundError as error:
        raise refusal(where, f"image: no such file: {path}", FileNotFoundError) from error
    except (ValueError, OSError) as error:
        raise refusal(where, f"image: {error}") from error
