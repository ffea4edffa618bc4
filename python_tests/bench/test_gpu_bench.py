"""The GPU command on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image

from flashu_ext.bench import gpu, predict
from flashu_ext.bench.__main__ import main
from flashu_ext.bench.timing import Timing, measure


def test_tables_on_the_cpu(tmp_path: Path):
    result = gpu.run(gpu.Settings(tmp_path, "cpu", ("ffn", "linear", "rows"), seconds=0.0))
    assert not any("failed" in text for text in result.parts.values()), result.parts
    ffn = [line for line in result.lines if line.op == "ffn"]
    assert len(ffn) == 2 and [line.shape for line in result.lines if line.op == "linear"] == [
        "64 x 160 M=1",
        "64 x 160 M=16",
    ]
    assert not any(line.timing.failures for line in result.lines)
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
    assert "Gathered FFN" in page and "Linear layers" in page and "select_topk" in page and "Geometric mean" in page


def test_a_part_that_fails_does_not_keep_the_next_from_running(tmp_path: Path):
    settings = gpu.Settings(tmp_path, "cpu", ("conformance", "ffn"), seconds=0.0, build=tmp_path / "nothing")
    result = gpu.run(settings)
    assert result.parts["conformance"].startswith("failed: RuntimeError") and "2 shapes" in result.parts["ffn"]


def test_the_page_ends_with_what_was_predicted_beside_what_was_measured():
    times = predict.predicted_times()
    assert times["1.5b M=64"] > 0
    timing = Timing(microseconds={"one run": 40.0}, failures={})
    lines = [gpu.Line("ffn", "1.5b M=64", 1.0, 1.0, timing, "one run", "", None, 50.0)]
    lines.append(gpu.Line("ffn", "new", 1.0, 1.0, timing, "one run", ""))
    text = "\n".join(gpu.predictions(lines))
    assert "| 1.5b M=64 | 50.0 | 40.0 | 0.80 |" in text and "new" not in text and text.endswith("25 %")
    assert gpu.predictions(lines[1:]) == []


def test_commands(tmp_path: Path):
    runner = CliRunner()
    listed = runner.invoke(main, ["--help"])
    assert listed.exit_code == 0 and all(name in listed.output for name in ("gpu", "sass", "ffn", "e2e"))
    refused = runner.invoke(main, ["gpu", "--out", str(tmp_path), "--part", "everything"])
    assert refused.exit_code == 2 and "expected one of boxes" in refused.output
    if not torch.cuda.is_available():
        missing = runner.invoke(main, ["gpu", "--out", str(tmp_path)])
        assert missing.exit_code == 1 and isinstance(missing.exception, RuntimeError)


def test_variants_that_fail_are_left_out():
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this")

    timing = measure({"good": lambda: None, "bad": broken}, torch.device("cpu"), 0.0)
    assert set(timing.microseconds) == {"good"} and timing.failures == {"bad": "no kernel for this"}
