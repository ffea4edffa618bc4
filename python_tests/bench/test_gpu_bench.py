"""The GPU command on the CPU, and the SASS report on cuobjdump's output."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from flashu_ext.bench import gpu, sass
from flashu_ext.bench.__main__ import main
from flashu_ext.bench.timing import measure


def test_tables_on_the_cpu(tmp_path: Path):
    result = gpu.run(gpu.Settings(tmp_path, "cpu", ("ffn", "rows"), seconds=0.0))
    assert not any("failed" in text for text in result.parts.values()), result.parts
    ffn = [line for line in result.lines if line.op == "ffn"]
    assert len(ffn) == 2 and not any(line.timing.failures for line in result.lines)
    assert {"one run", "runs of 8", "index", "copy + silu_mul", "views", "dense"} <= set(ffn[0].timing.microseconds)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["ceilings"]["tflops"] > 0 and len(record["lines"]) == len(result.lines)
    with Image.open(tmp_path / "roofline.png") as image:
        assert image.size[0] > 400
    plotted = CliRunner().invoke(
        main, ["roofline", str(tmp_path / "results.json"), "--out", str(tmp_path / "again.png")]
    )
    assert plotted.exit_code == 0 and (tmp_path / "again.png").stat().st_size > 1000
    page = (tmp_path / "results.md").read_text()
    assert "Gathered FFN" in page and "select_topk" in page and "Geometric mean" in page


def test_a_part_that_fails_does_not_keep_the_next_from_running(tmp_path: Path):
    settings = gpu.Settings(tmp_path, "cpu", ("conformance", "ffn"), seconds=0.0, build=tmp_path / "nothing")
    result = gpu.run(settings)
    assert result.parts["conformance"].startswith("failed: RuntimeError") and "2 shapes" in result.parts["ffn"]


def test_commands(tmp_path: Path):
    runner = CliRunner()
    listed = runner.invoke(main, ["--help"])
    assert listed.exit_code == 0 and all(name in listed.output for name in ("gpu", "sass", "ffn", "e2e"))
    refused = runner.invoke(main, ["gpu", "--out", str(tmp_path), "--part", "everything"])
    assert refused.exit_code == 2 and "expected one of conformance" in refused.output
    if not torch.cuda.is_available():
        missing = runner.invoke(main, ["gpu", "--out", str(tmp_path)])
        assert missing.exit_code == 1 and isinstance(missing.exception, RuntimeError)


def test_variants_that_fail_are_left_out():
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this")

    timing = measure({"good": lambda: None, "bad": broken}, torch.device("cpu"), 0.0)
    assert set(timing.microseconds) == {"good"} and timing.failures == {"bad": "no kernel for this"}


RESOURCES = """
Fatbin elf code:
arch = sm_90a
Resource usage:
 Function gemm_sm90_a:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:900 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function norm_vectors_b:
  REG:32 STACK:{stack} SHARED:32 LOCAL:0 CONSTANT[0]:900 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90a
        Function : gemm_sm90_a
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0  {product}.64x256x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   UTMASTG.2D [UR8], [UR4] ;
        Function : norm_vectors_b
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2] ;
        /*0010*/                   STG.E.128 [R2], R4 ;
"""


def fake_cuobjdump(folder: Path, stack: int, product: str) -> str:
    (folder / "resources").write_text(RESOURCES.format(stack=stack))
    (folder / "sass").write_text(SASS.format(product=product))
    tool = folder / "cuobjdump"
    tool.write_text(f'#!/bin/sh\nif [ "$1" = --dump-sass ]; then cat {folder}/sass; else cat {folder}/resources; fi\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    return str(tool)


def test_sass_report(tmp_path: Path):
    kernels = sass.inspect(Path("library.so"), fake_cuobjdump(tmp_path, 0, "HGMMA"))
    assert [k.name for k in kernels] == ["gemm_sm90_a", "norm_vectors_b"]
    product, norm = kernels
    assert product.registers == 168 and product.counts["HGMMA"] == 1 and product.counts["UTMALDG"] == 1
    assert norm.counts["LDG.128"] == 1 and norm.counts["STG.128"] == 1 and norm.instructions == 2
    assert sass.problems(kernels) == [] and "gemm_sm90_a" in sass.table(kernels)


@pytest.mark.parametrize(
    ("stack", "product", "text"), [(8, "HGMMA", "local memory"), (0, "HMMA", "gemm_sm90_a: no HGMMA")]
)
def test_sass_problems(tmp_path: Path, stack: int, product: str, text: str):
    found = sass.problems(sass.inspect(Path("library.so"), fake_cuobjdump(tmp_path, stack, product)))
    assert len(found) == 1 and text in found[0]
