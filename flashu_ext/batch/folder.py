"""Draws many prompts into a folder that can be gone on with: its manifest, what it misses, the loop.

A list is cut into batches once, by its order alone, and a batch is always drawn whole, also where only one of its images
is missing. So an image's bits depend neither on which process draws it, nor on what was there before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planning.reading import open_regular, read_json, refusal, shown
from .lock import FolderLock
from .prompts import Job, check_name

if TYPE_CHECKING:
    from ..models.showo2.pipeline import Pipeline
    from ..planning.config import FlashUConfig
    from ..planning.plan import TaskPlan

__all__ = ["MANIFEST", "complete_png", "draw", "missing", "open_folder", "settings_record"]

MANIFEST = "manifest.json"
VERSION = 2
EARLIER_VERSION = 1  # its record of the weights leaves most tensors out
SHOWN_DIFFERENCES = 6
MAX_MANIFEST_BYTES = 2**29
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


# ---- the folder


def settings_record(
    pipe: Pipeline,
    config: FlashUConfig | None,
    plan: TaskPlan | None = None,
    *,
    preset: str = "",
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch: int = 1,
    branches_apart: bool = False,
) -> dict[str, Any]:
    """Everything besides prompts and seeds that an image depends on, as JSON holds it.

    Args:
        pipe: whose model draws. config, plan: what it is accelerated with; None: dense.
        preset: its name, for people. steps, guidance_scale: as for `Pipeline.generate_batch`.
        batch: images drawn together. branches_apart: the two branches of guidance run on a rank each.
    """
    from ..models.showo2.sampling import DEFAULT_STEPS
    from .weights import weights_digest

    weight: Any = pipe.model.showo.model.embed_tokens.weight
    fields = None if config is None else json.loads(json.dumps(config.flat()))
    planned = fields.pop("steps") if fields is not None else None
    return {
        "model": pipe.name,
        "weights": weights_digest(pipe.model),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "preset": preset,
        "steps": steps or planned or DEFAULT_STEPS,
        "guidance": float(pipe.guidance_scale if guidance_scale is None else guidance_scale),
        "batch": batch,
        "branches": "apart" if branches_apart else "together",
        "config": fields,
        "plan": _plan_digest(config, plan),
    }


def _plan_digest(config: FlashUConfig | None, plan: TaskPlan | None) -> str | None:
    """Which neurons draw, where some are left out."""
    from ..runtime.generation import TASK

    if config is None or plan is None or not config.needs_plan or TASK not in plan.tasks:
        return None
    digest = hashlib.sha256()
    for layer in range(plan.layers):
        digest.update(repr(plan.kept(TASK, layer).tolist()).encode())
    return digest.hexdigest()


def open_folder(
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    jobs: Sequence[Job],
    *,
    overwrite: bool = False,
    lock: FolderLock | None = None,
) -> list[int]:
    """Make a folder ready for a list of images, or go on with the one that an earlier run left.

    Args:
        out: the folder; made where it is missing. settings: of `settings_record`.
        overwrite: discard the images of an earlier run first, whatever it drew.
        lock: of `out`, held by the run; None: the folder is locked for this call.

    Returns:
        Numbers of the images that it misses; a batch is drawn whole where one of its images is among them.

    Raises:
        ValueError: another run is in the folder, it was drawn with other settings, its manifest is malformed or of an earlier
            version, or an image's file is there and no manifest tells what it is, or it is no file. Nothing in the folder was
            changed then.
    """
    if lock is None:
        with FolderLock(out) as lock:
            lock.begin()
            return open_folder(out, settings, jobs, overwrite=overwrite, lock=lock)
    out, path = Path(out), Path(out) / MANIFEST
    _check_places(out, jobs)
    record = {"version": VERSION, "settings": dict(settings), "images": [dataclasses.asdict(job) for job in jobs]}
    if overwrite:
        _discard(out, jobs)
    elif path.exists():
        _check_same(path, _read_manifest(path), record)
    else:
        for job in jobs:
            if (out / job.name).exists():
                raise refusal(
                    out / job.name,
                    f"there already, and no {MANIFEST} tells how it was drawn; choose another folder or overwrite",
                )
    if not path.exists():
        _write_manifest(path, record)
    return missing(out, jobs)


def _check_places(out: Path, jobs: Sequence[Job]) -> None:
    for job in jobs:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG((out / job.name).stat().st_mode):
                raise refusal(out / job.name, "expected a regular file or none, where an image is to be written")


def missing(out: str | os.PathLike[str], jobs: Sequence[Job]) -> list[int]:
    """Numbers of the images that are not in the folder as whole PNG files."""
    return [index for index, job in enumerate(jobs) if not complete_png(Path(out) / job.name)]


def complete_png(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PNG image from its signature to its end, every checksum right."""
    from PIL import Image

    try:
        with open_regular(path) as file:
            file.seek(-len(_PNG_END), os.SEEK_END)  # which PIL does not ask for
            if file.read() != _PNG_END:
                return False
            file.seek(0)
            with Image.open(file, formats=("PNG",)) as image:
                image.verify()
    except Exception:  # of a file that is missing, cut off or no PNG, and PIL's of its own for one of too many pixels
        return False
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    record = read_json(path, MAX_MANIFEST_BYTES)
    if not isinstance(record, dict) or set(record) != {"version", "settings", "images"}:
        raise refusal(path, f"expected an object with version, settings, images, got {shown(record)}")
    if record["version"] not in (EARLIER_VERSION, VERSION):
        raise refusal(path, f"expected version {VERSION}, got {shown(record['version'])}")
    if not isinstance(record["settings"], dict):
        raise refusal(path, f"settings: expected an object, got {shown(record['settings'])}")
    if not isinstance(record["images"], list):
        raise refusal(path, f"images: expected a list, got {shown(record['images'])}")
    fields = {field.name for field in dataclasses.fields(Job)}
    for index, image in enumerate(record["images"]):
        if not isinstance(image, dict) or set(image) != fields:
            raise refusal(path, f"images[{index}]: expected prompt, seed, name, got {shown(image)}")
        check_name(f"{path}: images[{index}]: name", image["name"])
    return record


def _write_manifest(path: Path, record: Mapping[str, Any]) -> None:
    from ..planning.safe_files import write_text

    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if len(text.encode()) > MAX_MANIFEST_BYTES:
        raise refusal(path, f"expected at most {MAX_MANIFEST_BYTES} bytes, got {len(text.encode())}; draw fewer images")
    write_text(path, text)


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old["version"] != VERSION:
        raise refusal(
            path,
            "written by an earlier version of this program, which did not record all weights; "
            "choose another folder or overwrite",
        )
    differences = _differences(old["settings"], new["settings"])
    before, now = old["images"], new["images"]
    if len(before) != len(now):
        differences.append(f"images: {len(before)} were asked for, now {len(now)}")
    else:
        changed = [index for index, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]]
        if changed:
            index = changed[0]
            differences.append(f"images[{index}]: was {shown(before[index], 160)}, now {shown(now[index], 160)}")
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        listed = "; ".join(differences[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise refusal(path, f"this folder was drawn with other settings: {listed}; choose another folder or overwrite")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in dict.fromkeys((*old, *new)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += _differences(before, now, f"{prefix}{key}.")
        elif json.dumps(before) != json.dumps(now):  # as JSON, where a tuple is a list
            lines.append(f"{prefix}{key:.40}: was {shown(before, 80)}, now {shown(now, 80)}")
    return lines


def _discard(out: Path, jobs: Sequence[Job]) -> None:
    """Images first, manifest last: an interruption leaves no image under a manifest of other settings."""
    path = out / MANIFEST
    names = [job.name for job in jobs]
    with contextlib.suppress(ValueError, FileNotFoundError):
        names += [image["name"] for image in _read_manifest(path)["images"]]
    for name in names:
        (out / (name if name.endswith(".png") else f"{name}.png")).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# ---- the loop


def draw(
    pipe: Pipeline,
    jobs: Sequence[Job],
    batches: Iterable[int],
    out: str | os.PathLike[str],
    *,
    batch: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: Callable[..., Any] | None = None,
    write: bool = True,
    stop: Callable[[], bool] = lambda: False,
    progress: bool | None = None,
) -> int:
    """Draw batches of a list; every image is written when its batch is done, whole or not at all.

    Args:
        jobs: the whole list. batches: numbers of those to draw, in this order; batch i holds the images from i * batch on.
        out: an existing folder. batch: images of a batch. steps, guidance_scale, sampler: as for `Pipeline.generate_batch`.
        write: False draws and keeps nothing: on the rank that only helps with the other branch.
        stop: asked before each batch; True ends the loop.
        progress: a bar on stderr; None: where that is a terminal.

    Returns:
        How many images were written; one that was there as a whole PNG stays as it is.

    Raises:
        As `Pipeline.generate_batch`; OSError: a file cannot be written. What was written before stays.
    """
    from tqdm import tqdm

    from ..planning.safe_files import atomic_path

    groups = [jobs[number * batch : (number + 1) * batch] for number in batches]
    total = sum(len(group) for group in groups)
    written = 0
    with tqdm(total=total, desc="generate", unit="image", disable=None if progress is None else not progress) as bar:
        for group in groups:
            if stop():
                break
            images = pipe.generate_batch(
                [job.prompt for job in group], [job.seed for job in group], steps, guidance_scale, sampler=sampler
            )
            for job, image in zip(group, images, strict=True):
                path = Path(out) / job.name
                if write and not complete_png(path):
                    with atomic_path(path) as temporary:
                        image.save(temporary, format="PNG")
                    written += 1
            bar.update(len(group))
    return written
