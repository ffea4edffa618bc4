"""setup.py: where it finds torch and tools, what an index page shows."""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "setup.py").is_file():
    pytest.skip("these tests need the source folder", allow_module_level=True)


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_flashu_ext", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path) -> Path:
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_tools_beside_this_python_come_first(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beside, other = program(tmp_path / "venv/cmake"), program(tmp_path / "other/cmake")
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.setattr(sys, "executable", str(beside.parent / "python"))
    assert setup.tool("cmake") == str(beside)
    beside.unlink()
    assert setup.tool("cmake") == str(other)
    other.unlink()
    with pytest.raises(SystemExit, match=r"cmake is needed to build: .*venv/python -m pip install cmake"):
        setup.tool("cmake")


def test_torch_is_found_in_the_environment_around_an_isolated_build(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TORCH_DIR", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup.torch_dir() is None
    assert "torch>=2.11" in setup.get_requires_for_build_wheel()
    (tmp_path / "torch/include").mkdir(parents=True)
    assert setup.torch_dir() == tmp_path / "torch"
    assert "torch>=2.11" not in setup.get_requires_for_build_wheel()
    monkeypatch.setenv("TORCH_DIR", "/elsewhere")
    assert setup.torch_dir() == Path("/elsewhere")


def test_the_index_page_refers_to_no_file(setup: ModuleType):
    text = setup.description()
    assert re.findall(r"\]\((?!https?:)[^)]*\)", text) == [] and "# flashu_ext" in text
    assert "](" in (ROOT / "README.md").read_text() and "https://arxiv.org/abs/2603.15271" in text
