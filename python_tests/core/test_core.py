"""The pybind11 module: run-list algebra, tile choice, build facts; and `info` with and without a build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_ext import _core
from flashu_ext.cli import info

LIMIT = 40
sets = st.sets(st.integers(0, LIMIT - 1))


@given(sets, sets)
def test_run_lists_are_sets(a: set[int], b: set[int]):
    x, y = _core.runs_from_index(sorted(a), LIMIT), _core.runs_from_index(list(b), LIMIT)
    assert set(_core.index_from_runs(x, LIMIT)) == a
    assert set(_core.index_from_runs(_core.unite(x, y, LIMIT), LIMIT)) == a | b
    assert set(_core.index_from_runs(_core.intersect(x, y, LIMIT), LIMIT)) == a & b
    assert set(_core.index_from_runs(_core.complement(x, LIMIT), LIMIT)) == set(range(LIMIT)) - a
    assert a <= set(_core.index_from_runs(_core.round_out(x, 8, LIMIT), LIMIT))


@pytest.mark.parametrize("runs", [[0, 5, 3, 1], [5, 1, 0, 1], [39, 2], [-1, 2], [0, 0], [2**62, 2**62]])
def test_bad_runs(runs: list[int]):
    with pytest.raises((IndexError, ValueError), match="runs"):
        _core.index_from_runs(runs, LIMIT)
    with pytest.raises((IndexError, ValueError)):
        _core.index_from_runs([1], LIMIT)
    with pytest.raises(ValueError, match="multiple"):
        _core.round_out([0, 1], 0, LIMIT)


def test_tiles_are_explained():
    text = _core.explain_gemm(128, 14336, 1536, "fp32", False, 2)
    assert "stream" in text and "total us" in text
    with pytest.raises(ValueError, match="expected sizes"):
        _core.explain_gemm(-1, 1, 1, "fp32", False)


def test_build_facts():
    facts = _core.build_facts()
    assert facts["abi_version"] == 2 and facts["cpu_isa"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    built = facts["cuda"] == "on"
    assert (facts["cuda_runtime"] != "none") == built and (facts["cuda_ptx"] != "none") == built
    assert facts["cuda_missing"] == "nothing" or facts["cuda_driver"] == "none" or "too old" in facts["cuda_missing"]


def test_info_lists_what_is_built():
    text = info.describe(info.collect())
    for word in ("ops", "core", "torch", "on the CPU", "optional"):
        assert word in text


def test_info_and_import_work_with_nothing_built(tmp_path: Path):
    """A copy of the sources without the compiled files."""
    source = Path(info.__file__).parents[1]
    package = tmp_path / "flashu_ext"
    package.mkdir()
    for path in source.rglob("*.py"):
        target = package / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    code = "import flashu_ext, flashu_ext.cli.info as i; print(i.describe(i.collect()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "libflashu_torch.so is not in" in done.stdout and "pip install" in done.stdout
    code = (
        "import flashu_ext as fx; fx.ops.rms_norm"
        if hasattr(__import__("flashu_ext"), "ops")
        else "import flashu_ext.ops"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "the compiled ops are not available" in done.stderr


def test_cuda_tiles_are_explained():
    text = _core.explain_ffn(1460, 1536, 7168, "bf16", False)
    assert "sm90" in text and "sm80" in text
    assert "sm90" not in _core.explain_ffn(1460, 1536, 7168, "bf16", False, 80, 108)
    assert "one pass" in _core.explain_ffn(1, 1536, 7168, "fp16", True)
    with pytest.raises(ValueError, match="capability"):
        _core.explain_ffn(1, 1, 1, "bf16", False, 70)
    with pytest.raises(ValueError, match="dtype"):
        _core.explain_ffn(1, 1, 1, "int8", False)
