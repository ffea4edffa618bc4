"""What `import flashu_ext` gives, and what is said where an optional package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = "print(torch.ops.flashu.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6).shape)"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import flashu_ext, torch",
        "import torch, flashu_ext",
        "import flashu_ext, importlib.util; importlib.util.find_spec('torch'); import torch",
    ],
)
def test_ops_are_there(imports: str):
    assert "[2, 8]" in python(f"{imports}\n{SHAPE}")


def test_fake_kernels_are_there():
    code = """
import flashu_ext, torch
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    print(torch.ops.flashu.rms_norm(torch.ones(3, 8), torch.ones(8), 1e-6).shape)
"""
    assert "[3, 8]" in python(code)


def test_torch_is_not_imported_by_us():
    assert python("import sys, flashu_ext; print('torch' in sys.modules)").strip() == "False"


def test_a_source_folder_before_a_built_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from flashu_ext.ops import native

    source, site = tmp_path / "source" / "flashu_ext", tmp_path / "site"
    for folder in (source, site / "flashu_ext", site / "flashu_ext-0.1.0.dist-info"):
        folder.mkdir(parents=True)
    (site / "flashu_ext-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flashu_ext\nVersion: 0.1.0\n"
    )
    monkeypatch.setattr(native, "PACKAGE", source)
    monkeypatch.setattr(native, "LIBRARY", source / native.LIBRARY.name)
    monkeypatch.setattr(sys, "path", [str(source.parent), str(site)])
    assert len(native.missing()) == 1  # the copy is not built either
    (site / "flashu_ext" / native.LIBRARY.name).touch()
    said = native.missing()[1]
    assert f"A built flashu_ext is installed in {site}, but {source.parent} comes before it" in said


MISSING = """
import sys
sys.modules["{module}"] = None  # as if it was not installed
import flashu_ext as fx
try:
    {code}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "extra", "code"),
    [
        ("transformers", "showo2", "fx.showo2.Pipeline.from_pretrained('nano')"),
        ("tokenizers", "showo2", "from flashu_ext.nano import tokenizer; tokenizer.layout()"),
        ("PIL", "showo2", "from flashu_ext.models import pictures; pictures.to_pil(None)"),
        ("jinja2", "report", "from flashu_ext.report import render; render.page('')"),
        ("skimage.metrics", "report", "import numpy as n; from flashu_ext.studies import fidelity as f; "
         "x = n.zeros((1, 8, 8, 3), n.uint8); f.ssim(x, x)"),
        ("lmms_eval", "evaluate", "import flashu_ext.evaluation.lmms"),
    ],
)  # fmt: skip
def test_a_missing_package_names_its_extra(module: str, extra: str, code: str):
    said = python(MISSING.format(module=module, code=code))
    assert said.startswith(f"{module.split('.')[0]}") and f"pip install 'flashu_ext[{extra}]'" in said
