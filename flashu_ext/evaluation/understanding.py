"""Runs tasks of lmms-eval on a pipeline and keeps each task's results, with every question's answer, in a file of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..batch.folder import differences, plan_digest, settings_record
from ..planning.extras import extra
from ..planning.reading import MAX_LIST_BYTES, read_json, read_text, refusal, shown
from ..planning.safe_files import write_text
from .drawing import check_runs

__all__ = ["file_digest", "find_tasks", "is_there", "read_results", "results_path", "run", "settings_of"]

VERSION = 1
TASK = "understanding"
_KEYS = {"version", "task", "settings", "task_settings", "runs", "results", "questions", "samples"}


def settings_of(
    pipe: Any, handle: Any, preset: str, batch: int, limit: int | None, max_new_tokens: int
) -> dict[str, Any]:
    """All settings that answers depend on, as JSON values.

    Args:
        handle: of the accelerated model; None: dense.
        limit: only the first questions of a task.
    """
    config, plan = (None, None) if handle is None else (handle.config, handle.plan)
    record = settings_record(pipe, config, plan, preset=preset, batch=batch)
    own = ("model", "weights", "vae", "dtype", "device", "preset", "batch", "config")
    with extra("evaluate"):
        import lmms_eval  # noqa: F401
    return {key: record[key] for key in own if key in record} | {
        "plan": plan_digest(config, plan, TASK),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "tool": f"lmms-eval {metadata.version('lmms-eval')}",
    }


def results_path(folder: Path, task: str) -> Path:
    """The file of a task's results. Raises ValueError for a name that is no file's."""
    if not task or task.startswith(".") or not all(c.isalnum() or c in "-_." for c in task):
        raise ValueError(f"--tasks: expected names of letters, digits, '-', '_' and '.', got {shown(task)}")
    return folder / f"{task}.json"


def file_digest(task: Path) -> str:
    """SHA-256 of a task's file, and of the Python files beside it, which it may call."""
    digest = hashlib.sha256()
    for file in (task, *sorted(task.resolve().parent.glob("*.py"))):
        digest.update(file.name.encode() + b"\0" + read_text(file, MAX_LIST_BYTES).encode() + b"\0")
    return digest.hexdigest()


def is_there(folder: Path, task: str, settings: dict[str, Any], digest: str | None = None) -> bool:
    """Whether a task's results of these settings are there. digest: of its file, where it is one of the caller's own.

    Raises:
        ValueError: those of other settings are; the differences are named.
    """
    path = results_path(folder, task)
    if not path.exists():
        return False
    differing = differences(read_results(path)["settings"], settings | {"file": digest})
    if differing:
        raise refusal(path, f"of other settings: {'; '.join(differing)}; overwrite, or choose another folder")
    return True


def find_tasks(tasks: Sequence[str], include: Path | None) -> tuple[list[str], Any, dict[str, str]]:
    """Names of lmms-eval's tasks, its manager that knows them, and `file_digest` of those that are files.

    Args:
        tasks: names, groups, tags, or files of tasks in lmms-eval's YAML format.
        include: a folder with more of such files.

    Raises:
        ValueError: there is no such task, or a file names none.
    """
    with extra("evaluate"):
        from lmms_eval import utils
        from lmms_eval.tasks import TaskManager

    digests: dict[str, str] = {}
    names, folders = [], [] if include is None else [str(include)]
    files = {task for task in tasks if task.endswith((".yaml", ".yml"))}
    for task in tasks:
        if task in files:
            if not Path(task).is_file():
                raise ValueError(f"--tasks: expected a file, got {shown(task)}")
            config = utils.load_yaml_config(task)
            if not isinstance(config, dict) or not isinstance(config.get("task"), str):
                raise refusal(task, "expected a task of lmms-eval with its name in 'task'")
            names.append(config["task"])
            digests[config["task"]] = file_digest(Path(task))
            folders.append(str(Path(task).resolve().parent))
        else:
            names.append(task)
    # Its own tasks are more than a thousand files, read only where one is asked for.
    manager = TaskManager("WARNING", include_path=folders or None, include_defaults=len(files) < len(tasks))
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"--tasks: expected tasks of lmms-eval (python -m lmms_eval --tasks list), got {shown(name)}"
            )
    return list(dict.fromkeys(names)), manager, digests


def run(
    pipe: Any,
    settings: dict[str, Any],
    tasks: Sequence[str],
    manager: Any,
    digests: dict[str, str],
    folder: Path,
) -> list[str]:
    """Run tasks, all questions of all of them, and write the results of each.

    Args:
        pipe: a pipeline, accelerated or not.
        settings: of `settings_of`.
        tasks, manager, digests: of `find_tasks`.

    Returns:
        The names of the tasks, of a group its members'; none on ranks other than 0.
    """
    from ..ops import machine
    from .lmms import FlashU

    with extra("evaluate"):
        from lmms_eval.evaluator import simple_evaluate
        from tenacity import RetryError

    model = FlashU(pipe=pipe, batch_size=settings["batch"], max_new_tokens=settings["max_new_tokens"])
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            batch_size=settings["batch"],
            limit=settings["limit"],
            bootstrap_iters=0,
            verbosity="WARNING",
            distributed_executor_backend="torchrun" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "accelerate",
        )
    except RetryError as error:  # of a download that lmms-eval tried several times
        cause = error.last_attempt.exception()
        raise RuntimeError(f"--tasks: lmms-eval cannot have the data: {type(cause).__name__}: {cause}") from error
    if found is None:  # another rank has them
        return []
    ran = {"command": machine.command_line(), "machine": machine.facts()}
    folder.mkdir(parents=True, exist_ok=True)
    for task, config in found["configs"].items():
        results = {key: _plain(value) for key, value in found["results"][task].items()}
        record = {
            "version": VERSION,
            "task": task,
            "settings": settings | {"file": digests.get(task)},
            "task_settings": {
                "version": _plain(found["versions"].get(task)),
                **{key: _plain(config.get(key)) for key in ("dataset_path", "test_split", "generation_kwargs")},
            },
            "runs": [ran],
            "results": results,
            "questions": found["n-samples"][task]["original"],
            "samples": _samples(found["samples"][task], results),
        }
        write_text(results_path(folder, task), json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return list(found["configs"])


def _samples(logged: Sequence[dict[str, Any]], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Number, question, expected answer, answer and metrics of every question, in their order."""
    metrics = {key.partition(",")[0] for key in results}
    return [
        {
            "number": sample["doc_id"],
            "question": _plain(next((each for each in sample["arguments"] if isinstance(each, str)), "")),
            "expected": _plain(sample["target"]),
            "answer": _plain(sample["filtered_resps"]),
            "metrics": {name: _plain(sample[name]) for name in metrics & set(sample)},
        }
        for sample in sorted(logged, key=lambda sample: sample["doc_id"])
    ]


def _plain(value: Any) -> Any:
    """A value as JSON has it; what JSON has no form for as text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "item") and not isinstance(value, str):
        with contextlib.suppress(ValueError, TypeError):
            value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    return str(value)


def read_results(path: Path) -> dict[str, Any]:
    """A file of `run`.

    Raises:
        ValueError: malformed; the file is named. OSError: it cannot be read.
    """
    record = read_json(path, MAX_LIST_BYTES)
    if not isinstance(record, dict) or set(record) != _KEYS or record["version"] != VERSION:
        raise refusal(
            path, f"expected results of version {VERSION} with {', '.join(sorted(_KEYS))}, got {shown(record)}"
        )
    for key, kind in (("task", str), ("settings", dict), ("results", dict), ("questions", int), ("samples", list)):
        if not isinstance(record[key], kind):
            raise refusal(path, f"{key}: expected {kind.__name__}, got {shown(record[key])}")
    numbers = set()
    for index, sample in enumerate(record["samples"]):
        where = f"{path}: samples[{index}]"
        if not isinstance(sample, dict) or not isinstance(sample.get("metrics"), dict):
            raise refusal(where, f"expected an object with metrics, got {shown(sample)}")
        number = sample.get("number")
        if not isinstance(number, int) or number in numbers:
            raise refusal(where, f"number: expected an integer of its own, got {shown(number)}")
        numbers.add(number)
    check_runs(path, record["runs"])
    return record
