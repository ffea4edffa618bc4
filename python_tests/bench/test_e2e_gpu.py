"""`bench e2e --gpu` on the CPU with the tiny model; its trace reader on a hand-written trace; its records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("transformers")

from flashu_ext.bench import e2e_gpu
from flashu_ext.bench.launches import BUCKETS, MARK, bucket, covered, read_trace
from flashu_ext.bench.readme import PENDING, filled
from flashu_ext.bench.shapes import SHAPES, fill_on_device
from flashu_ext.bench.step_plot import plot
from flashu_ext.cli.main import cli
from flashu_ext.models.showo2 import Showo2

RUN = [
    "bench",
    "e2e",
    "--gpu",
    "--device",
    "cpu",
    "--model",
    "tiny",
    "--steps",
    "7",
    "--paper-steps",
    "9",
    "--tokens",
    "2",
]
RUN += ["--repeats", "1"]
FOUR = [part for name in e2e_gpu.VARIANTS[:5] for part in ("--variant", name)]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are slower on several threads; the command's --threads is torch's own for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with e2e_gpu.json and e2e_gpu.png of a run on the CPU, without an upstream checkout."""
    folder = tmp_path_factory.mktemp("e2e_gpu")
    options = ["--batch", "2", *FOUR, "--budget", "300", "--threads", "1", "--upstream", str(folder)]
    files = ["--json", str(folder / "e2e_gpu.json"), "--plot", str(folder / "e2e_gpu.png")]
    before = torch.get_num_threads()
    result = CliRunner().invoke(cli, [*RUN, *options, *files])
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert "each / s" in result.output
    return folder


def test_rows_of_a_run(written: Path) -> None:
    record = e2e_gpu.check(json.loads((written / "e2e_gpu.json").read_text()))
    rows = {(row["task"], row["variant"]): row for row in record["rows"]}
    assert len(rows) == 10
    for (task, variant), row in rows.items():
        if variant == "Show-o2 (upstream)":
            assert (
                row["note"].startswith("failed: ValueError: --upstream: expected a Show-o2 checkout")
                and not row["seconds"]
            )
            continue
        assert row["note"] is None and row["median"] > 0 and not row["extrapolated"], row
        assert row["seconds_each"] == pytest.approx(row["median"] / 2)
        assert row["each_per_second"] == pytest.approx(2 / row["median"])
        assert row["operations"] > 0 and set(row["milliseconds"]) == set(BUCKETS)
        assert all(row[name] is None for name in ("launches", "syncs", "kernels", "peak_bytes"))  # a CPU has none
        assert row["milliseconds"]["products"] > 0 and row["milliseconds"]["attention"] > 0
        if task == "generation":
            assert row["size"] == {"paper": 9, "fast": 13}.get(variant, 7)
            assert row["observed"] == (5 if variant in ("dense", "exact") else row["size"] - 1)
    assert rows["generation", "paper"]["operations"] < rows["generation", "exact"]["operations"]
    assert record["machine"]["torch"] == torch.__version__ and record["command"]


def test_plot_and_table(written: Path) -> None:
    with Image.open(written / "e2e_gpu.png") as image:
        assert image.size[0] > 900
    section = "<!-- results: e2e_gpu -->\nold\n<!-- end -->"
    text = filled(section, written)
    assert "| model | batch | task |" in text and "tiny" in text and "torch.compile" not in text
    assert "failed: ValueError" in text
    with pytest.raises(ValueError, match="rows"):
        plot({"command": "", "machine": {}, "settings": {}, "rows": []}, written / "none.png")
    assert not (written / "none.png").exists()


def test_section_without_a_result_says_so(tmp_path: Path) -> None:
    text = filled("<!-- results: e2e_gpu -->\nold\n<!-- end -->", tmp_path)
    assert PENDING["e2e_gpu"] in text and text.count("Not run yet") == 1


def test_no_budget_no_rows() -> None:
    settings = e2e_gpu.Settings(models=("tiny",), batches=(1,), device="cpu", budget=-1.0)
    report = e2e_gpu.run(settings)
    assert {row.note for row in report.rows} == {e2e_gpu.OVER_BUDGET} and len(report.rows) == 12
    e2e_gpu.check(report.record())


def test_an_image_that_is_too_long_is_extrapolated() -> None:
    sizes: list[int] = []
    row = e2e_gpu.Row("tiny", 1, "generation", "dense", 50)
    case = e2e_gpu._Case(row, lambda: None, sizes.append, scheduled=False)
    assert not e2e_gpu._fits(case, 3, 0.0, torch.device("cpu"), limit=-1.0)
    assert row.extrapolated and len(row.seconds) == 1 and sizes == [6]
    row = e2e_gpu.Row("tiny", 1, "understanding", "dense", 64)
    assert not e2e_gpu._fits(e2e_gpu._Case(row, lambda: None, sizes.append, False), 2, 1.0, torch.device("cpu"), 31.0)
    assert e2e_gpu._fits(e2e_gpu._Case(row, lambda: None, sizes.append, False), 2, 1.0, torch.device("cpu"), 32.0)
    assert not row.seconds


def test_a_row_that_fails_does_not_cost_the_others() -> None:
    def broken(size: int) -> None:
        raise RuntimeError("out of\nmemory")

    rows = [e2e_gpu.Row("tiny", 1, "understanding", name, 2) for name in ("dense", "exact")]
    cases = [
        e2e_gpu._Case(row, lambda: e2e_gpu._as_it_is(None), action, False)
        for row, action in zip(rows, (broken, lambda size: torch.ones(4).sum()), strict=True)
    ]
    settings = e2e_gpu.Settings(repeats=2)
    e2e_gpu._measure(cases, settings, torch.device("cpu"), float("inf"), lambda text: None)
    assert rows[0].note == "failed: RuntimeError: out of memory" and len(rows[1].seconds) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"note": "why"}, "expected seconds, or a note"),
        ({"seconds": [float("nan")]}, "finite"),
        ({"task": "singing"}, "expected one of generation"),
        ({"milliseconds": {"products": 1.0}}, "expected the kinds"),
        ({"more": 1}, "exactly the fields"),
    ],
)
def test_records_are_checked(change: dict[str, Any], said: str) -> None:
    row = e2e_gpu.Row("tiny", 1, "generation", "dense", 7, seconds=[1.0])
    record = e2e_gpu.Report(e2e_gpu.Settings(), [row], {}, "", 1.0).record()
    e2e_gpu.check(record)
    broken = copy.deepcopy(record)
    broken["rows"][0] |= change
    with pytest.raises(ValueError, match=said):
        e2e_gpu.check(broken)


def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_trace() -> None:
    trace = {
        "traceEvents": [
            event("user_annotation", MARK, 100, 50),
            event("gpu_user_annotation", MARK, 110, 90),
            event("cuda_runtime", "cudaLaunchKernel", 99, 1),  # before the range
            event("cuda_runtime", "cudaLaunchKernel", 101, 1),
            event("cuda_driver", "cuLaunchKernelEx", 103, 1),
            event("cuda_runtime", "cudaGraphLaunch", 105, 1),
            event("cuda_runtime", "cudaMemcpyAsync", 106, 1),
            event("cuda_runtime", "cudaStreamSynchronize", 107, 1),
            event("cuda_runtime", "cudaDeviceSynchronize", 151, 40),  # after it
            event("kernel", "nvjet_hsh_128x256", 110, 20),
            event("kernel", "void pytorch_flash::flash_fwd_kernel<cutlass>", 120, 20),  # overlaps
            event("kernel", "void flashu::norm_vectors", 150, 10),
            event("gpu_memcpy", "Memcpy HtoD", 170, 30),
            {"ph": "i", "name": "mark"},
        ]
    }
    asked = read_trace(trace)
    assert (asked.launches, asked.kernels, asked.syncs, asked.operations) == (3, 3, 1, None)
    expected = {"products": 20, "attention": 20, "norms and elementwise": 10, "copies": 30, "idle": 100 - 70}
    assert asked.milliseconds == pytest.approx({kind: us / 1e3 for kind, us in expected.items()})
    with pytest.raises(ValueError, match="got 0"):
        read_trace({"traceEvents": []})


def test_kinds_and_spans() -> None:
    names = {
        "sm90_xmma_gemm_bf16": "products",
        "void flashu::gemm_sm90": "products",
        "fmha_cutlassF_bf16": "attention",
        "cudnn_generated_sdpa_sm90_flash_fprop": "attention",
        "void at::native::vectorized_elementwise_kernel": "norms and elementwise",
        "void at::native::CatArrayBatchedCopy": "copies",
        "aten::addmm": "products",
        "flashu::gathered_ffn": "products",
    }
    assert {name: bucket(name) for name in names} == names
    assert covered([(5, 6), (0, 2), (1, 3)]) == 4 and covered([]) == 0


def test_weights_are_random_everywhere() -> None:
    model = Showo2(SHAPES["tiny"].config).to(torch.bfloat16)
    fill_on_device(model, 0)
    assert all(
        float(parameter.detach().float().std()) > 1e-3 for parameter in model.parameters() if parameter.numel() > 1
    )
    assert {name: SHAPES[name].config.hidden_size for name in ("1.5b", "7b")} == {"1.5b": 1536, "7b": 3584}
    assert SHAPES["7b"].config.image_tokens == 730 and SHAPES["7b"].sequence == 1024


def test_usage() -> None:
    runner = CliRunner()
    if not torch.cuda.is_available():
        missing = runner.invoke(cli, ["bench", "e2e", "--gpu"])
        assert missing.exit_code == 1 and "no CUDA device answers" in missing.output
        assert len(missing.output.strip().splitlines()) == 1
    for arguments in (["--batch", "2"], ["--model", "7b"], ["--model", "tiny", "--model", "bench"]):
        assert runner.invoke(cli, ["bench", "e2e", *arguments]).exit_code == 2
    unknown = runner.invoke(cli, [*RUN, "--variant", "quick"])
    assert unknown.exit_code == 1 and "variant: expected one of" in unknown.output
