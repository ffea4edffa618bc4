"""Lays drawn images out as GenEval's and DPG-Bench's tools read them, and records how they were drawn.

A benchmark's folder has four parts: `drawn`, the images one by one with their manifest; `images`, the folder for the tool;
`drawing.json`; and the results that the tool writes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..batch.folder import MANIFEST, MAX_MANIFEST_BYTES, complete_png, read_manifest
from ..planning.extras import extra
from ..planning.reading import read_image, read_json, refusal, shown
from ..planning.safe_files import atomic_path, write_text
from .lists import BENCHMARKS, Picture, PromptList

__all__ = [
    "DRAWN",
    "IMAGES",
    "RECORD",
    "check_leftovers",
    "check_runs",
    "lay_out",
    "read_drawing",
    "resolution",
    "results_file",
    "write_record",
]

DRAWN, IMAGES, RECORD = "drawn", "images", "drawing.json"
VERSION = 1

_KEYS = {"version", "benchmark", "source", "digest", "prompts", "images", "seed", "runs"}


def results_file(folder: Path, benchmark: str) -> Path:
    """Where the tool is asked to write its results."""
    return folder / ("results.jsonl" if benchmark == "geneval" else "results.txt")


def check_leftovers(prompts: PromptList, folder: Path) -> None:
    """That the tool's folder holds no picture of another list.

    Raises:
        ValueError: it does; the first one is named.
    """
    left = prompts.leftovers(folder / IMAGES)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise refusal(
            left[0], f"not of this list{more}, and the tool would score it; overwrite, or choose another folder"
        )


def lay_out(prompts: PromptList, folder: Path, progress: bool | None = None) -> int:
    """Make `images` from `drawn`: links to single images, grids of several. What is there and not older is kept.

    Returns:
        The number of pictures made. Pictures of another list are deleted.

    Raises:
        ValueError: an image is damaged, or those of a picture are not equal squares. OSError: a file cannot be written.
    """
    from tqdm import tqdm

    drawn, images = folder / DRAWN, folder / IMAGES
    for left in prompts.leftovers(images):
        left.unlink()
    for path, text in prompts.texts.items():
        target = images / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)
    _drop_unknown(prompts, images)
    made = 0
    for picture in tqdm(prompts.pictures, desc="lay out", disable=None if progress is None else not progress):
        target, sources = images / picture.path, [drawn / name for name in picture.images]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _current(target, sources):
            with atomic_path(target) as temporary:
                _make(picture, sources, temporary)
            made += 1
    return made


def _drop_unknown(prompts: PromptList, images: Path) -> None:
    """Delete the metadata of prompts that an earlier, longer list had: GenEval's tool looks into every numbered folder."""
    if prompts.benchmark != "geneval":
        return
    for path in images.glob("*/metadata.jsonl"):
        where = path.relative_to(images)
        if where.parts[0].isdigit() and str(where) not in prompts.texts:
            path.unlink()
            for emptied in (path.parent / "samples", path.parent):
                if emptied.is_dir() and not any(emptied.iterdir()):
                    emptied.rmdir()


def _current(target: Path, sources: list[Path]) -> bool:
    """Whether a picture is whole and not older than any of its images."""
    if not complete_png(target):
        return False
    return target.stat().st_mtime_ns >= max(source.stat().st_mtime_ns for source in sources)


def _make(picture: Picture, sources: list[Path], target: Path) -> None:
    if len(sources) == 1:
        try:
            os.link(sources[0], target)
        except OSError:  # a file system without links
            shutil.copyfile(sources[0], target)
        return
    with extra("showo2"):
        from PIL import Image

    pictures = [read_image(source) for source in sources]
    side = pictures[0].width
    for source, image in zip(sources, pictures, strict=True):
        if image.size != (side, side):
            raise refusal(
                source, f"expected {side} x {side} pixels, as squares of one size fill a picture, got {image.size}"
            )
    grid = Image.new("RGB", (2 * side, 2 * side))
    for index, image in enumerate(pictures):
        grid.paste(image, (index % 2 * side, index // 2 * side))
    grid.save(target, format="PNG")


# ---- the record


def write_record(prompts: PromptList, folder: Path, seed: int, missing: int) -> None:
    """Write `drawing.json` when a run begins: which list, and every run that drew images of it.

    Args:
        missing: images that this run is to draw. A run that has to draw all replaces the earlier ones, one without any is
            not added.
    """
    from ..ops import machine

    path = folder / RECORD
    runs: list[Any] = []
    if missing < len(prompts.jobs) and path.exists():
        runs = _read_record(path)["runs"]
    if missing or not runs:
        runs.append({"missing": missing, "command": machine.command_line(), "machine": machine.facts()})
    record = {
        "version": VERSION,
        "benchmark": prompts.benchmark,
        "source": prompts.source,
        "digest": prompts.digest,
        "prompts": prompts.prompts,
        "images": len(prompts.jobs),
        "seed": seed,
        "runs": runs,
    }
    text = json.dumps(record, indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # its time says when images last came
        write_text(path, text)


def resolution(prompts: PromptList, folder: Path) -> tuple[int, int]:
    """(height, width) in pixels of the drawn images."""
    image = read_image(folder / DRAWN / prompts.jobs[0].name)
    return image.height, image.width


def read_drawing(folder: Path) -> dict[str, Any]:
    """The record of a benchmark's folder, with `settings` and `jobs` of its manifest.

    Raises:
        ValueError: a file is malformed; it is named. OSError: it cannot be read.
    """
    record = _read_record(folder / RECORD)
    manifest = read_manifest(folder / DRAWN / MANIFEST)
    return record | {"settings": manifest["settings"], "jobs": manifest["images"]}


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path, MAX_MANIFEST_BYTES)
    if not isinstance(record, dict) or set(record) != _KEYS or record["version"] != VERSION:
        raise refusal(
            path, f"expected a record of version {VERSION} with {', '.join(sorted(_KEYS))}, got {shown(record)}"
        )
    if record["benchmark"] not in BENCHMARKS:
        raise refusal(path, f"benchmark: expected one of {', '.join(BENCHMARKS)}, got {shown(record['benchmark'])}")
    for key in ("prompts", "images", "seed"):
        if not isinstance(record[key], int):
            raise refusal(path, f"{key}: expected a number, got {shown(record[key])}")
    check_runs(path, record["runs"])
    return record


def check_runs(path: Path, runs: Any) -> None:
    """That a record's runs are objects with a command and facts of the machine. Raises ValueError."""
    for run in runs if isinstance(runs, list) else [None]:
        if (
            not isinstance(run, dict)
            or not isinstance(run.get("command"), str)
            or not isinstance(run.get("machine"), dict)
        ):
            raise refusal(path, f"runs: expected a list of objects with command and machine, got {shown(runs)}")
