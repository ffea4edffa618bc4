"""Tile choice and build facts as text; and `info` with and without a build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashu_ext
from flashu_ext.cli import info
from flashu_ext.ops import explain


def test_tiles_are_explained():
    text = explain.explain_gemm(128, 14336, 1536, "fp32", False, 2)
    assert "stream" in text and "total us" in text
    with pytest.raises(ValueError, match="expected sizes"):
        explain.explain_gemm(-1, 1, 1, "fp32", False)


def test_build_facts():
    facts = explain.build_facts()
    assert facts["version"] == flashu_ext.__version__
    assert facts["abi version"] == "5" and facts["cpu isa"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    built = facts["cuda"] == "on"
    assert (facts["cuda runtime"] != "none") == built and (facts["cuda ptx"] != "none") == built
    assert facts["cuda missing"] == "nothing" or facts["cuda driver"] == "none" or "too old" in facts["cuda missing"]


def test_info_lists_what_is_built():
    text = info.describe(info.collect())
    for word in ("ops", "build", "torch", "on the CPU", "optional"):
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
    text = explain.explain_ffn(1460, 1536, 7168, "bf16", False)
    assert "sm90" in text and "sm80" not in text
    text = explain.explain_ffn(1460, 1536, 7168, "bf16", False, 80, 108)
    assert "sm80" in text and "sm90" not in text
    assert "one pass" in explain.explain_ffn(1, 1536, 7168, "fp16", True)
    with pytest.raises(ValueError, match="capability"):
        explain.explain_ffn(1, 1, 1, "bf16", False, 70)
    with pytest.raises(ValueError, match="dtype"):
        explain.explain_ffn(1, 1, 1, "int8", False)
