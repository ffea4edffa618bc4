"""Files: their mode, that they reach the disk, and that an interruption leaves no other file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flashu_ext.planning.safe_files import atomic_path, save_safetensors


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_file_has_the_mode_of_any_other(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a") as path:
            path.write_text("a")
        save_safetensors(tmp_path / "b", {"x": torch.zeros(1)})  # whose library writes files of mode 0600
        assert os.umask(umask) == umask, "the umask was changed"
    finally:
        os.umask(before)
    for name in ("a", "b"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_size, (tmp_path / "a").exists()))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_path(tmp_path / "a") as path:
        path.write_text("abc")
    assert synced == [(3, False)]


def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as path:
        path.write_text("new")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
