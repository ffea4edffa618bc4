"""The prompt lists of GenEval and DPG-Bench, and the files that their tools read. Imports no torch.

Source of the layouts: GenEval's README.md and evaluation/evaluate_images.py; ELLA's dpg_bench/compute_dpg_bench.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..batch.prompts import Job, check_name, check_record, check_seed
from ..planning.reading import MAX_LIST_BYTES, read_text, refusal, shown, strict_json

__all__ = [
    "BENCHMARKS",
    "DPG_IMAGES",
    "GENEVAL_SAMPLES",
    "Picture",
    "PromptList",
    "json_lines",
    "prompts_of",
    "read_dpg",
    "read_geneval",
]

BENCHMARKS = ("geneval", "dpg")

GENEVAL_SAMPLES = 4
"""Images of a prompt, as GenEval's own generation has it."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

DPG_IMAGES = 4
"""Images of a prompt in one picture, two by two: `--pic-num 4`."""


@dataclass(frozen=True)
class Picture:
    """A picture that a tool reads: its path within the folder given to the tool, and the names of the images in it."""

    path: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class PromptList:
    """A benchmark's prompts as images to draw and as the files of its tool.

    Attributes:
        benchmark: one of `BENCHMARKS`.
        source: the list's file or folder.
        digest: SHA-256 of the prompts with what belongs to them, in their order.
        prompts: as many as the list has.
        jobs: the images, all samples of a prompt one after the other.
        pictures: of the tool's folder.
        texts: path within the tool's folder -> content.
    """

    benchmark: str
    source: str
    digest: str
    prompts: int
    jobs: list[Job]
    pictures: list[Picture]
    texts: dict[str, str] = field(default_factory=dict)

    def leftovers(self, folder: Path) -> list[Path]:
        """Pictures in the tool's folder that the tool would score and this list does not draw."""
        known = {folder / picture.path for picture in self.pictures}
        if self.benchmark == "dpg":
            found = (path for path in folder.glob("*") if path.suffix.lower() in _PICTURES)  # the tool opens any file
        else:
            found = (path for path in folder.glob("*/samples/*.png") if path.relative_to(folder).parts[0].isdigit())
        return sorted(path for path in found if path not in known)


def read_geneval(path: Path, seed: int = 0, samples: int = GENEVAL_SAMPLES) -> PromptList:
    """GenEval's evaluation_metadata.jsonl: one object per line with tag, include and prompt.

    Prompt p's sample s becomes 0000p/samples/000s.png, with its line in 0000p/metadata.jsonl; its seed is seed + p * samples + s.

    Raises:
        ValueError: no prompts, or a malformed line; file and line are named. OSError: the file cannot be read.
    """
    records = [_geneval_record(where, record) for where, record in json_lines(path)]
    if not records:
        raise refusal(path, "expected at least one prompt, got none")
    jobs, pictures, texts = [], [], {}
    for index, record in enumerate(records):
        texts[f"{index:05}/metadata.jsonl"] = json.dumps(record) + "\n"
        for sample in range(samples):
            name = f"{index:05}-{sample:04}.png"
            jobs.append(Job(record["prompt"], seed + index * samples + sample, name))
            pictures.append(Picture(f"{index:05}/samples/{sample:04}.png", (name,)))
    check_seed("seed", seed + len(jobs) - 1)
    return PromptList("geneval", str(path), _digest(texts.values()), len(records), jobs, pictures, texts)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line of a .jsonl file that is not blank. Raises ValueError, OSError."""
    # Not splitlines(), which also splits at Unicode separators within JSON strings.
    for number, line in enumerate(read_text(path, MAX_LIST_BYTES, encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", strict_json(line, f"{path}:{number}")


def _geneval_record(where: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or not {"tag", "include", "prompt"} <= set(record):
        raise refusal(where, f"expected an object with tag, include and prompt, got {shown(record)}")
    check_record(where, {"prompt": record["prompt"]})
    if not isinstance(record["tag"], str) or not record["tag"].strip():
        raise refusal(where, f"tag: expected the name of a task, got {shown(record['tag'])}")
    for key in ("include", "exclude"):
        objects = record.get(key, [])
        if not isinstance(objects, list) or not all(_is_object(each) for each in objects):
            raise refusal(where, f"{key}: expected a list of objects with class and count, got {shown(objects)}")
    return record


def _is_object(each: Any) -> bool:
    count = each.get("count") if isinstance(each, dict) else None
    return isinstance(count, int) and not isinstance(count, bool) and isinstance(each.get("class"), str)


def read_dpg(path: Path, seed: int = 0) -> PromptList:
    """DPG-Bench's prompts: a folder of .txt files, or a .jsonl file of {"prompt": ..., "name": ...}.

    A prompt's four images become one picture NAME.png, two by two. Prompts are taken in the order of their names.

    Raises:
        ValueError: no prompts, a malformed line or file, or a name that the tool would not find; it is named. OSError: a file
            cannot be read.
    """
    entries = _dpg_folder(path) if path.is_dir() else _dpg_list(path)
    if not entries:
        raise refusal(path, "expected at least one prompt in a .txt file, got none")
    taken: dict[str, str] = {}
    for where, name, _ in entries:
        check_name(f"{where}: name", f"{name}-0.png")
        if re.search(r"[.]|^\s*$", name):
            # The tool cuts an image's name at the first dot and looks up the rest.
            raise refusal(
                where, f"name: expected one without a dot, which DPG-Bench's tool cuts there, got {shown(name)}"
            )
        if name.casefold() in taken:
            raise refusal(
                where, f"name: expected a unique name, {shown(name)} is also that of {taken[name.casefold()]}"
            )
        taken[name.casefold()] = where
    jobs, pictures = [], []
    for index, (_, name, prompt) in enumerate(entries):
        names = tuple(f"{name}-{image}.png" for image in range(DPG_IMAGES))
        jobs += [Job(prompt, seed + index * DPG_IMAGES + image, own) for image, own in enumerate(names)]
        pictures.append(Picture(f"{name}.png", names))
    check_seed("seed", seed + len(jobs) - 1)
    digest = _digest(json.dumps([name, prompt]) + "\n" for _, name, prompt in entries)
    return PromptList("dpg", str(path), digest, len(entries), jobs, pictures)


def _dpg_folder(path: Path) -> list[tuple[str, str, str]]:
    """(where, name, prompt) of every .txt file, in the order of names."""
    entries = []
    for file in sorted(path.iterdir()):
        if file.suffix.lower() == ".txt" and not file.name.startswith("."):
            prompt = read_text(file, encoding="utf-8-sig").strip()
            check_record(str(file), {"prompt": prompt})
            entries.append((str(file), file.stem, prompt))
    return entries


def _dpg_list(path: Path) -> list[tuple[str, str, str]]:
    if path.suffix != ".jsonl":
        raise refusal(path, "expected a folder of .txt files, or a .jsonl file with prompt and name")
    entries = []
    for where, record in json_lines(path):
        if not isinstance(record, dict) or set(record) != {"prompt", "name"}:
            raise refusal(where, f"expected an object with prompt and name, got {shown(record)}")
        check_record(where, record)
        entries.append((where, record["name"].removesuffix(".png"), record["prompt"]))
    return sorted(entries, key=lambda entry: entry[1])


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def prompts_of(images: Sequence[dict[str, Any]], benchmark: str) -> dict[str, str]:
    """Name of each prompt in the tool's folder ("00000" or "NAME") -> its prompt, from the images of a folder's record."""
    cut = len("-0000.png") if benchmark == "geneval" else len("-0.png")
    return {image["name"][:-cut]: image["prompt"] for image in images}
