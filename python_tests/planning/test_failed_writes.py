"""Writes that fail, or whose process is killed, change nothing and leave nothing."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.ranks import environment

from flashu_ext import TaskPlan
from flashu_ext.batch.folder import MANIFEST
from flashu_ext.cli.main import cli
from flashu_ext.models.showo2 import Pipeline
from flashu_ext.planning.safe_files import atomic_path, save_safetensors, write_text

LIMIT = 20
"""Seconds for a process."""


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may become larger than 10 kB: what is written beyond fails, as on a full disk, with another number. Not a fixture:
    the tests' own report may go to a larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text(path, "x" * 20_000),
    "tensors": lambda path: save_safetensors(path, {"x": torch.zeros(20_000)}),
    "plan": lambda path: TaskPlan.from_scores(generation=[torch.rand(20_000)]).save(path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_of_any_length_is_not_written_to(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a" * 5000, "\x1b" * 2000, "plan" * 1000 + "\0"):
        with pytest.raises((OSError, ValueError)) as caught:
            WRITERS[writer](Path(name))
        message = str(caught.value)
        assert repr(name)[1:5] in message.replace("\\\\", "\\") and len(message) <= 500, message
        assert message.isprintable() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        WRITERS[writer](path)
    assert caught.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


@pytest.mark.parametrize("whole_list", [False, True])
def test_an_image_on_a_full_disk(whole_list: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(Pipeline, "generate_batch", lambda *a, **k: [Image.effect_noise((300, 300), 100)])
    prompts, out = tmp_path / "prompts.txt", tmp_path / "images"
    prompts.write_text("a red circle\n")
    arguments = (
        ["--prompts", prompts, "--out", out] if whole_list else ["a red circle", "-o", tmp_path / "0000-one.png"]
    )
    with full_disk():
        result = CliRunner().invoke(cli, ["generate", *map(str, arguments)])
    assert result.exit_code == 1 and "File too large" in result.output and "0000-" in result.output, result.output
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == ([MANIFEST, "prompts.txt"] if whole_list else ["prompts.txt"])


KILLED = """
import os, signal, sys
from flashu_ext.planning.safe_files import atomic_path
with atomic_path(sys.argv[1]) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a"], env=environment(), timeout=LIMIT)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "b") as path:
        path.write_text("whole")
        (draft,) = tmp_path.iterdir()  # the dead process's is gone, this one's is there
        other = "import sys; from flashu_ext.planning.safe_files import write_text; write_text(sys.argv[1], 'c')"
        subprocess.run([sys.executable, "-c", other, tmp_path / "c"], env=environment(), timeout=LIMIT, check=True)
        assert draft.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
