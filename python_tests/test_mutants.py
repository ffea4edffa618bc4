"""The mutants: each text is in its file once; the runner tells killed from survived and restores the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants.__main__ import ROOT, Trial, choose, misplaced
from mutants.copy import Copy
from mutants.lists import load
from mutants.mutant import Mutant, Pytest

SOURCE = "def double(x):\n    return x + x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = "from number import double\n\n\ndef test_double():\n    assert double(3) == 6\n"


def test_every_text_is_found_exactly_once():
    assert not misplaced(choose(quick=False, only=[]), ROOT)


def test_no_two_of_a_list_have_one_name():
    for name, mutants in load().items():
        names = [mutant.name for mutant in mutants]
        assert len(names) == len(set(names)), f"{name}: {sorted(n for n in names if names.count(n) > 1)}"


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    root = tmp_path / "root"
    (root / "flashu_ext").mkdir(parents=True)
    (root / "flashu_ext" / "__init__.py").touch()
    (root / "number.py").write_text(SOURCE)
    (root / "test_number.py").write_text(TESTS)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    copy = Copy(tmp_path / "mutants", root)
    copy.refresh()
    return copy


def mutant(old: str, new: str, *tests: str) -> Mutant:
    return Mutant("a fault", "number.py", old, new, Pytest(*tests))


def test_a_fault_is_killed_or_survives_and_is_taken_out_again(copy: Copy):
    trial = Trial(copy)
    assert trial.run("one", mutant("x + x", "x + 2", "test_number.py")) == "killed (pytest)"
    assert trial.run("two", mutant("x / 2", "x / 3", "test_number.py")) == "survived"
    assert trial.failures == ["two: survived"]
    assert (copy.source / "number.py").read_text() == SOURCE


def test_tests_that_fail_or_do_not_run_prove_nothing(copy: Copy):
    trial = Trial(copy)
    (copy.source / "test_broken.py").write_text("def test_nothing():\n    assert False\n")
    assert "fail without it too" in trial.run("one", mutant("x + x", "x + 2", "test_broken.py"))
    assert "ran no tests" in trial.run("two", mutant("x + x", "x + 2", "test_number.py", "-k", "nothing"))
    assert len(trial.failures) == 2


def test_a_text_that_is_not_there_once_is_named(copy: Copy):
    wrong = misplaced({"two": mutant("x", "y"), "none": mutant("z", "y"), "same": mutant("x + x", "x + x")}, copy.root)
    assert [text.split(":")[0] for text in wrong] == ["two", "none", "same"]


def test_the_copy_follows_the_work_tree(copy: Copy):
    (copy.root / "number.py").write_text(SOURCE + "\n")
    (copy.root / "test_number.py").unlink()
    copy.refresh()
    assert (copy.source / "number.py").read_text() == SOURCE + "\n"
    assert not (copy.source / "test_number.py").exists()
