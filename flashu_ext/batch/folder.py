"""Generates a list of prompts into a folder; interrupted runs can be resumed from its manifest.

Batches are fixed by the list's order, and a batch is always generated whole, even if only one of its images is missing. So
an image's bits depend neither on the process that generates it nor on the images already there.
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

from ..planning.extras import extra
from ..planning.reading import open_regular, read_json, refusal, shown
from .lock import FolderLock
from .prompts import Job, check_name

if TYPE_CHECKING:
    from ..models.pictures import Size
    from ..models.pipeline import ModelPipeline
    from ..planning.config import FlashUConfig
    from ..planning.plan import TaskPlan

__all__ = [
    "MANIFEST",
    "complete_png",
    "differences",
    "generate",
    "missing",
    "open_folder",
    "plan_digest",
    "read_manifest",
    "settings_record",
]

MANIFEST = "manifest.json"
VERSION = 2
EARLIER_VERSION = 1  # its digest of the weights omits most tensors
SHOWN_DIFFERENCES = 6
MAX_MANIFEST_BYTES = 2**29
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


# ---- the folder


def settings_record(
    pipe: ModelPipeline,
    config: FlashUConfig | None,
    plan: TaskPlan | None = None,
    *,
    preset: str = "",
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: Size | None = None,
    batch: int = 1,
    branches_apart: bool = False,
) -> dict[str, Any]:
    """All settings that an image depends on, besides prompt and seed, as JSON values.

    Args:
        pipe: its model generates the images.
        config, plan: of the acceleration; None: dense.
        preset: its name, for readers.
        steps, guidance_scale, size: as for `Pipeline.generate_batch`.
        batch: images generated together.
        branches_apart: each branch of guidance runs on its own rank.
    """
    from ..models.accelerated import unwrapped
    from ..models.adapter import adapter_of
    from ..planning.fingerprint import module_digest, weights_digest

    parts = adapter_of(unwrapped(pipe.model))
    fields = None if config is None else json.loads(json.dumps(config.flat()))
    planned = fields.pop("steps") if fields is not None else None
    # Left out where it is the model's own, as in folders of earlier versions.
    grid, vae = pipe.grid(size), getattr(pipe.codec, "vae", None)
    return {
        **({} if grid == pipe.grid() else {"grid": list(grid)}),
        **({} if vae is None else {"vae": module_digest(vae)}),
        "model": pipe.name,
        "weights": weights_digest(pipe.model),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "device": parts.device.type,
        "preset": preset,
        "steps": steps or planned or parts.grid_points,
        "guidance": float(pipe.guidance_scale if guidance_scale is None else guidance_scale),
        "batch": batch,
        "branches": "apart" if branches_apart else "together",
        "config": fields,
        "plan": plan_digest(config, plan),
    }


def plan_digest(config: FlashUConfig | None, plan: TaskPlan | None, task: str | None = None) -> str | None:
    """SHA-256 of the neurons kept for a task (None: generation); None if none are pruned."""
    from ..runtime.generation import TASK

    task = task or TASK
    if config is None or plan is None or not config.needs_plan or task not in plan.tasks:
        return None
    digest = hashlib.sha256()
    for layer in range(plan.layers):
        digest.update(repr(plan.kept(task, layer).tolist()).encode())
    return digest.hexdigest()


def open_folder(
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    jobs: Sequence[Job],
    *,
    overwrite: bool = False,
    lock: FolderLock | None = None,
) -> list[int]:
    """Prepare a folder for a list of images, new or left by an earlier run.

    Args:
        out: the folder; created if missing.
        settings: from `settings_record`.
        overwrite: first delete the images of an earlier run, whatever its settings.
        lock: of `out`, held by the run; None: the folder is locked for this call.

    Returns:
        Indices of the missing images. A batch with a missing image is generated whole.

    Raises:
        ValueError: another run uses the folder, the folder has other settings, its manifest is malformed or of an earlier
            version, or an image file exists without a manifest or is no regular file. The folder is unchanged then.
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
        _check_same(path, read_manifest(path), record)
    else:
        for job in jobs:
            if (out / job.name).exists():
                raise refusal(
                    out / job.name,
                    f"exists already, without a {MANIFEST} that says how it was generated; choose another folder or overwrite",
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
    """Indices of the images without a complete PNG file in the folder."""
    return [index for index, job in enumerate(jobs) if not complete_png(Path(out) / job.name)]


def complete_png(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a complete PNG image: signature, checksums and end chunk."""
    with extra("showo2"):
        from PIL import Image

    try:
        with open_regular(path) as file:
            file.seek(-len(_PNG_END), os.SEEK_END)  # not checked by PIL
            if file.read() != _PNG_END:
                return False
            file.seek(0)
            with Image.open(file, formats=("PNG",)) as image:
                image.verify()
    except Exception:  # as PIL raises them for missing, truncated, other or too large files
        return False
    return True


def read_manifest(path: Path) -> dict[str, Any]:
    """A folder's record: version, settings (`settings_record`) and images (fields of `Job`).

    Raises:
        ValueError: malformed; the file is named. OSError: it cannot be read.
    """
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
    differing = differences(old["settings"], new["settings"])
    before, now = old["images"], new["images"]
    if len(before) != len(now):
        differing.append(f"images: {len(before)} were requested, now {len(now)}")
    else:
        changed = [index for index, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]]
        if changed:
            index = changed[0]
            differing.append(f"images[{index}]: was {shown(before[index], 160)}, now {shown(now[index], 160)}")
    if differing:
        more = len(differing) - SHOWN_DIFFERENCES
        listed = "; ".join(differing[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise refusal(
            path, f"this folder was generated with other settings: {listed}; choose another folder or overwrite"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines that name each setting of two records that differs, with both values."""
    lines = []
    for key in dict.fromkeys((*old, *new)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += differences(before, now, f"{prefix}{key}.")
        elif json.dumps(before) != json.dumps(now):  # as JSON, which writes tuples as lists
            lines.append(f"{prefix}{key:.40}: was {shown(before, 80)}, now {shown(now, 80)}")
    return lines


def _discard(out: Path, jobs: Sequence[Job]) -> None:
    """Delete images first, the manifest last: after an interruption no image lies under a manifest of other settings."""
    path = out / MANIFEST
    names = [job.name for job in jobs]
    with contextlib.suppress(ValueError, FileNotFoundError):
        names += [image["name"] for image in read_manifest(path)["images"]]
    for name in names:
        (out / (name if name.endswith(".png") else f"{name}.png")).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# ---- the loop


def generate(
    pipe: ModelPipeline,
    jobs: Sequence[Job],
    batches: Iterable[int],
    out: str | os.PathLike[str],
    *,
    batch: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: Size | None = None,
    sampler: Callable[..., Any] | None = None,
    write: bool = True,
    stop: Callable[[], bool] = lambda: False,
    progress: bool | None = None,
) -> int:
    """Generate batches of a list; images are written atomically after their batch.

    Args:
        jobs: the whole list.
        batches: numbers of the batches to generate, in this order; batch i starts at image i * batch.
        out: an existing folder.
        batch: images per batch.
        steps, guidance_scale, size, sampler: as for `Pipeline.generate_batch`.
        write: False: generate without writing, on the rank that only computes the other branch.
        stop: called before each batch; True ends the loop.
        progress: show a progress bar on stderr; None: if that is a terminal.

    Returns:
        The number of images written; complete PNG files that exist already are not replaced.

    Raises:
        As `Pipeline.generate_batch`; OSError: a file cannot be written. Earlier files stay.
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
                [job.prompt for job in group],
                [job.seed for job in group],
                steps,
                guidance_scale,
                size=size,
                sampler=sampler,
            )
            for job, image in zip(group, images, strict=True):
                path = Path(out) / job.name
                if write and not complete_png(path):
                    with atomic_path(path) as temporary:
                        image.save(temporary, format="PNG")
                    written += 1
            bar.update(len(group))
    return written
